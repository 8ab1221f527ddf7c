"""Floating-point operations of a transformer, counted from its config and the shapes, two for each multiply-add."""

from dataclasses import dataclass

from ..models import costs_of


@dataclass(frozen=True)
class StepCosts:
    """What one call of the transformer takes, in floating-point operations.

    Args:
        doubles, singles: number of blocks of each kind.
        double, single: of one block.
        rest: of all around the blocks.
        refresh: of all blocks at a step that refreshes chosen tokens; 0 for a family that has no such steps.
    """

    doubles: int
    singles: int
    double: int
    single: int
    rest: int
    refresh: int = 0

    @property
    def total(self):
        """Of the whole call."""
        return self.doubles * self.double + self.singles * self.single + self.rest

    def of_blocks(self, start, stop):
        """Of the blocks start to stop - 1, doubles and singles counted together."""
        doubles = max(min(stop, self.doubles) - start, 0)
        return doubles * self.double + (stop - start - doubles) * self.single


def step_costs(config, batch, image_tokens, text_tokens):
    """The StepCosts of a transformer's config at these shapes."""
    return costs_of(config).step_costs(config, batch, image_tokens, text_tokens)
