"""Floating-point operations of Flux, counted from its config and the shapes: two for each multiply-add of a matrix."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """What one call of the transformer takes, in floating-point operations.

    Args:
        doubles, singles: number of blocks of each kind.
        double, single: of one block.
        rest: of all around the blocks.
    """

    doubles: int
    singles: int
    double: int
    single: int
    rest: int

    @property
    def total(self):
        """Of the whole call."""
        return self.doubles * self.double + self.singles * self.single + self.rest

    def of_blocks(self, start, stop):
        """Of the blocks start to stop - 1, doubles and singles counted together."""
        doubles = max(min(stop, self.doubles) - start, 0)
        return doubles * self.double + (stop - start - doubles) * self.single


def step_costs(config, batch, image_tokens, text_tokens):
    """The StepCosts of a FluxTransformer2DModel's config at these shapes.

    Attention over N tokens takes 4 N^2 D, a projection of N tokens from a to b features 2 N a b; a block of either kind
    has 4 D^2 weights for the attention's projections and 8 D^2 for the MLP's.
    """
    width = config.num_attention_heads * config.attention_head_dim
    tokens = image_tokens + text_tokens
    blocks = batch * (24 * width**2 * tokens + 4 * width * tokens**2)
    vector = 2 * batch * width**2
    embedded = 2 if config.guidance_embeds else 1
    out_channels = getattr(config, "out_channels", None) or config.in_channels
    rest = (
        2 * batch * image_tokens * width * (config.in_channels + out_channels * config.patch_size**2)
        + 2 * batch * text_tokens * width * config.joint_attention_dim
        + embedded * (2 * batch * 256 * width + vector)
        + 2 * batch * config.pooled_projection_dim * width
        + vector
        + 2 * vector
    )
    return StepCosts(config.num_layers, config.num_single_layers, blocks + 12 * vector, blocks + 3 * vector, rest)
