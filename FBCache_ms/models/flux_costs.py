"""What a Flux checkpoint holds, and what its transformer's parts ask for, counted from the config and the shapes.

Operations are floating-point ones, two for each multiply-add of a matrix.
"""

from types import SimpleNamespace

from ..predict.flops import StepCosts
from ..predict.roofline import Work
from ..rules.refresh import streams
from .block_costs import BlockCosts, RefreshCosts, channels, condition_works, ends_works, width

PIPELINE = "FluxPipeline"
COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
GUIDANCE = {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
"""The scales that the pipeline takes, and those of a command line that gives none."""

PUBLISHED = SimpleNamespace(
    _class_name="FluxTransformer2DModel",
    num_layers=19,
    num_single_layers=38,
    num_attention_heads=24,
    attention_head_dim=128,
    in_channels=64,
    out_channels=None,
    patch_size=1,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
"""The config of black-forest-labs/FLUX.1-dev."""

DOUBLE = BlockCosts(
    weights=36,
    operands=18,
    passes=140,
    operators=128,
    text_products=8,
    text_weights=8,
    text_operands=10,
    text_passes=24,
    text_operators=11,
)
# Its text's MLP is projected together with attention's output.
SINGLE = BlockCosts(
    weights=15, operands=17, passes=136, operators=70, text_products=9, text_operands=11, text_passes=24
)
REFRESHED_DOUBLE = RefreshCosts(weights=28, operands=10, passes=14, chosen_passes=17, operators=57)
REFRESHED_SINGLE = RefreshCosts(weights=12, operands=11, passes=13, chosen_passes=29, operators=32)
STEP_OPERATORS, CONDITION_OPERATORS = 28, (37, 42)
ROTARY_BYTES = 40


def stacks(config):
    """How many double and how many single blocks."""
    return config.num_layers, config.num_single_layers


def step_costs(config, batch, image_tokens, text_tokens):
    """The StepCosts of a FluxTransformer2DModel's config at these shapes.

    Attention over N tokens takes 4 N^2 D, a projection of N tokens from a to b features 2 N a b; a block of either kind
    has 4 D^2 weights for the attention's projections and 8 D^2 for the MLP's.
    """
    wide = width(config)
    tokens = image_tokens + text_tokens
    blocks = batch * (24 * wide**2 * tokens + 4 * wide * tokens**2)
    vector = 2 * batch * wide**2
    embedded = 2 if config.guidance_embeds else 1
    rest = (
        2 * batch * image_tokens * wide * (config.in_channels + channels(config))
        + 2 * batch * text_tokens * wide * config.joint_attention_dim
        + embedded * (2 * batch * 256 * wide + vector)
        + 2 * batch * config.pooled_projection_dim * wide
        + vector
        + 2 * vector
    )
    refresh = sum(operations for operations, _ in refreshes(config, batch, image_tokens, text_tokens))
    return StepCosts(*stacks(config), blocks + 12 * vector, blocks + 3 * vector, rest, refresh)


def refreshes(config, batch, image_tokens, text_tokens):
    """For each block the operations of a refresh, and how many tokens that chooses.

    It takes all modulations, and the MLPs of chosen tokens, in single blocks with attention's projection out, which is
    one with the MLP's.
    """
    square, found = batch * width(config) ** 2, []
    for index, block in enumerate(streams(*stacks(config), text_tokens, image_tokens)):
        chosen = sum(number for _, number in block)
        double = index < config.num_layers
        found.append((square * (16 * chosen + 24 if double else 18 * chosen + 6), chosen))
    return found


def block(shapes, index, text=True):
    """Block number ``index``'s Works; without ``text`` what only the text stream behind it needs is left out."""
    double = index < shapes.config.num_layers
    kind, operations = (DOUBLE, shapes.costs.double) if double else (SINGLE, shapes.costs.single)
    return kind.works(shapes, operations, text)


def refreshed_block(shapes, index):
    """Its Works where chosen tokens are refreshed."""
    kind = REFRESHED_DOUBLE if index < shapes.config.num_layers else REFRESHED_SINGLE
    return kind.works(shapes, *refreshes(shapes.config, shapes.batch, shapes.image_tokens, shapes.text_tokens)[index])


def condition(shapes):
    """What does not depend on the step: the embedded text, guidance and pooled prompt, sinusoids, rotary tables."""
    width = shapes.width
    guidance = (256 + width) * width if shapes.config.guidance_embeds else 0
    pooled = (shapes.config.pooled_projection_dim + width) * width
    rotary = ROTARY_BYTES * shapes.tokens * shapes.config.attention_head_dim
    return condition_works(shapes, CONDITION_OPERATORS, guidance, pooled) + [Work("rotary tables", 0, rotary)]


def ends(shapes):
    """What every step computes around the blocks."""
    weights = (3 * shapes.width + shapes.config.in_channels + shapes.channels + 256) * shapes.width
    return ends_works(shapes, condition(shapes), weights, STEP_OPERATORS)
