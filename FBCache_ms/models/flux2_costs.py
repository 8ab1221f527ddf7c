"""What a FLUX.2 checkpoint holds, and what its transformer asks for, counted from the config and the shapes."""

from types import SimpleNamespace

from ..predict.flops import StepCosts
from .block_costs import BlockCosts, channels, condition_works, ends_works, width

PIPELINE = "Flux2Pipeline"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
GUIDANCE = {"guidance_scale": 4.0}
"""The scales that the pipeline takes, and those of a command line that gives none."""

PUBLISHED = SimpleNamespace(
    _class_name="Flux2Transformer2DModel",
    num_layers=8,
    num_single_layers=48,
    num_attention_heads=48,
    attention_head_dim=128,
    in_channels=128,
    out_channels=None,
    patch_size=1,
    joint_attention_dim=15360,
    timestep_guidance_channels=256,
    mlp_ratio=3.0,
    axes_dims_rope=(32, 32, 32, 32),
)
"""The config of black-forest-labs/FLUX.2-dev."""

# For an MLP of ratio 3: its first layer makes what gates, too.
DOUBLE = BlockCosts(weights=26, operands=19, passes=145, operators=108)
SINGLE = BlockCosts(weights=13, operands=15, passes=156, operators=63)
STEP_OPERATORS, CONDITION_OPERATORS = 43, (25, 24)


def stacks(config):
    """How many double and how many single blocks."""
    return config.num_layers, config.num_single_layers


def step_costs(config, batch, image_tokens, text_tokens):
    """The StepCosts of a Flux2Transformer2DModel's config at these shapes.

    A block of either kind has 4 D^2 weights for the attention's projections and 3 r D^2 for the gated MLP, r its ratio.
    """
    wide, tokens = width(config), image_tokens + text_tokens
    weights = (4 + 3 * config.mlp_ratio) * wide**2
    block = round(batch * (2 * weights * tokens + 4 * wide * tokens**2))
    embedding = 2 * batch * (config.timestep_guidance_channels * wide + wide**2)
    rest = (
        2 * batch * image_tokens * wide * (config.in_channels + channels(config))
        + 2 * batch * text_tokens * wide * config.joint_attention_dim
        + 2 * embedding
        + 2 * batch * (6 + 6 + 3 + 2) * wide**2
    )
    return StepCosts(*stacks(config), block, block, rest)


def block(shapes, index, text=True):
    """Block number ``index``'s Works; it is not divided, so that the text stream behind it is always there."""
    double = index < shapes.config.num_layers
    kind, operations = (DOUBLE, shapes.costs.double) if double else (SINGLE, shapes.costs.single)
    return kind.works(shapes, operations, True)


def condition(shapes):
    """What does not depend on the step: the embedded text and guidance."""
    width, sinusoids = shapes.width, shapes.config.timestep_guidance_channels
    return condition_works(shapes, CONDITION_OPERATORS, (sinusoids + width) * width)


def ends(shapes):
    """What every step computes around the blocks, the modulation of all of them included."""
    config, width = shapes.config, shapes.width
    modulations = (6 + 6 + 3 + 2) * width
    weights = (modulations + width + config.timestep_guidance_channels + config.in_channels + shapes.channels) * width
    return ends_works(shapes, condition(shapes), weights, STEP_OPERATORS)
