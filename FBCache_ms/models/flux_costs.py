"""What a Flux checkpoint holds, and what its transformer's parts ask for, counted from the config and the shapes.

Operations are floating-point ones, two for each multiply-add of a matrix.
"""

from types import SimpleNamespace

from ..predict.flops import StepCosts
from ..predict.roofline import Work

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

# As the loop's exported graph has them, views counted (tests/predict/test_roofline.py). "Passes" are bytes that
# operators other than matrix products and attention read and write, each on its own, in units of the whole stream.
DOUBLE_OPERATORS, DOUBLE_PASSES = 128, 140
SINGLE_OPERATORS, SINGLE_PASSES = 70, 136
STEP_OPERATORS, CONDITION_OPERATORS, TERMS_OPERATORS = 28, 37, 42
TEXT_HALF_OPERATORS, TEXT_HALF_PASSES = 11, 24
ROTARY_BYTES = 40


def stacks(config):
    """How many double and how many single blocks."""
    return config.num_layers, config.num_single_layers


def width(config):
    """D."""
    return config.num_attention_heads * config.attention_head_dim


def channels(config):
    """C, the velocity's."""
    return (getattr(config, "out_channels", None) or config.in_channels) * config.patch_size**2


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
    return StepCosts(*stacks(config), blocks + 12 * vector, blocks + 3 * vector, rest)


def block(shapes, index, text=True):
    """Block number ``index``'s Works; without ``text`` what only the text stream behind it needs is left out."""
    costs, width, tokens = shapes.costs, shapes.width, shapes.tokens
    double = index < shapes.config.num_layers
    stream, texts = shapes.stream(tokens), shapes.stream(shapes.text_tokens)
    attention = 4 * shapes.batch * width * tokens**2
    products = (costs.double if double else costs.single) - attention
    weights, operands = (36, 18 * stream) if double else (15, 17 * stream)
    passes, operators = (DOUBLE_PASSES, DOUBLE_OPERATORS) if double else (SINGLE_PASSES, SINGLE_OPERATORS)
    others = passes * stream
    if not text:
        # The text's MLP; a single block's is projected together with attention's output.
        products -= 2 * shapes.batch * shapes.text_tokens * (8 if double else 9) * width**2
        operands -= (10 if double else 11) * texts
        others -= TEXT_HALF_PASSES * texts
        if double:
            weights, operators = weights - 8, operators - TEXT_HALF_OPERATORS
    return [
        Work("blocks: products", products, shapes.weights(weights) + operands, operators),
        Work("blocks: attention", attention, 4 * stream),
        Work("blocks: the rest", 0, others),
    ]


def condition(shapes):
    """What does not depend on the step: the embedded text, guidance and pooled prompt, sinusoids, rotary tables."""
    width, batch, inputs = shapes.width, shapes.batch, shapes.config.joint_attention_dim
    embedded = batch * shapes.text_tokens * (inputs + width) + inputs * width
    rotary = ROTARY_BYTES * shapes.tokens * shapes.config.attention_head_dim
    operations = 2 * batch * shapes.text_tokens * inputs * width
    guidance = 256 + width if shapes.config.guidance_embeds else 0
    terms = (guidance + shapes.config.pooled_projection_dim + width) * width
    return [
        Work("text embedding", operations, embedded * shapes.itemsize, CONDITION_OPERATORS),
        Work("guidance, prompt and times", 2 * batch * terms, terms * shapes.itemsize, TERMS_OPERATORS),
        Work("rotary tables", 0, rotary),
    ]


def ends(shapes):
    """What every step computes around the blocks: the embedded latents and time, the output, the scheduler's update."""
    config, width, image = shapes.config, shapes.width, shapes.stream(shapes.image_tokens)
    operations = shapes.costs.rest - sum(work.operations for work in condition(shapes))
    weights = shapes.weights(3) + (config.in_channels + shapes.channels + 256) * width * shapes.itemsize
    return [Work("around the blocks", operations, weights + 8 * image, STEP_OPERATORS)]
