"""What a Qwen-Image checkpoint holds, and what its transformer asks for, counted from the config and the shapes."""

from types import SimpleNamespace

from ..predict.flops import StepCosts
from ..predict.roofline import Work
from .block_costs import BlockCosts, channels, condition_works, ends_works, width

PIPELINE = "QwenImagePipeline"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
GUIDANCE = {"true_cfg_scale": 4.0}
"""The scales that the pipeline takes, and those of a command line that gives none."""

PUBLISHED = SimpleNamespace(
    _class_name="QwenImageTransformer2DModel",
    num_layers=60,
    num_attention_heads=24,
    attention_head_dim=128,
    in_channels=64,
    out_channels=16,
    patch_size=2,
    joint_attention_dim=3584,
    guidance_embeds=False,
    axes_dims_rope=(16, 56, 56),
)
"""The config of Qwen/Qwen-Image."""

DOUBLE = BlockCosts(
    weights=36,
    operands=18,
    passes=144,
    operators=129,
    text_products=9,
    text_weights=9,
    text_operands=12,
    text_passes=17,
    text_operators=12,
)
STEP_OPERATORS, CONDITION_OPERATORS = 28, (45, 0)


def stacks(config):
    """How many double and how many single blocks."""
    return config.num_layers, 0


def step_costs(config, batch, image_tokens, text_tokens):
    """The StepCosts of a QwenImageTransformer2DModel's config at these shapes; its blocks are Flux's double ones."""
    wide, tokens = width(config), image_tokens + text_tokens
    vector = 2 * batch * wide**2
    block = batch * (24 * wide**2 * tokens + 4 * wide * tokens**2) + 12 * vector
    rest = (
        2 * batch * image_tokens * wide * (config.in_channels + channels(config))
        + 2 * batch * text_tokens * wide * config.joint_attention_dim
        + 2 * batch * 256 * wide
        + vector
        + 2 * vector
    )
    return StepCosts(config.num_layers, 0, block, 0, rest)


def block(shapes, index, text=True):
    """Block number ``index``'s Works; without ``text``, and in the last one, what its text stream needs is left out."""
    return DOUBLE.works(shapes, shapes.costs.double, text and index < shapes.config.num_layers - 1)


def condition(shapes):
    """What does not depend on the step: the embedded text."""
    return condition_works(shapes, CONDITION_OPERATORS)


def ends(shapes):
    """What every step computes around the blocks, and attention's mask, which is of a byte each and made thrice."""
    weights = (3 * shapes.width + shapes.config.in_channels + shapes.channels + 256) * shapes.width
    mask = Work("attention's mask", 0, 3 * shapes.batch * shapes.tokens**2)
    return ends_works(shapes, condition(shapes), weights, STEP_OPERATORS) + [mask]
