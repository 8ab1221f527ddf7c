"""What a generation did: the decisions of its gates, and what they saved."""

from dataclasses import dataclass
from typing import Optional, Tuple

BRANCHES = ("cond", "uncond")
"""mindone's names for the two guidance branches of true CFG."""

NOT_COMPARED = -1.0
"""Stands in the trace for the difference of a step that was not compared; a real one is never negative."""

COMPUTED, REUSED, NOT_REACHED, REFRESHED = 0, 1, -1, 2
"""What the trace says of a step; a gate inside another is not reached while the outer one reuses."""


@dataclass(frozen=True)
class GateStats:
    """What one gate did in one generation.

    Args:
        name: the gate's, for instance "fbcache", or "double" and "single".
        reused: an entry a step: true where its blocks were skipped, None where an outer gate had skipped them already.
        residual_diffs: one relative difference a step, None where the step was not compared.
        refreshed_steps: indices of those reused steps at which its blocks ran for chosen tokens.
    """

    name: str
    reused: Tuple[Optional[bool], ...]
    residual_diffs: Tuple[Optional[float], ...]
    refreshed_steps: Tuple[int, ...] = ()

    @property
    def computed_steps(self):
        """Indices of the steps at which the gate's blocks ran."""
        return [step for step, reused in enumerate(self.reused) if reused is False]

    @property
    def cached_steps(self):
        """Indices of the steps at which the gate skipped its blocks, or all of them but chosen tokens."""
        return [step for step, reused in enumerate(self.reused) if reused]

    @property
    def run_lengths(self):
        """How many reuses followed each other, in order: [2, 1] for computed, reused, reused, computed, reused."""
        marks = "".join("r" if reused else " " for reused in self.reused)
        return [len(run) for run in marks.split()]


@dataclass(frozen=True)
class CacheStats:
    """What one generation did; ``print`` shows a table.

    Args:
        gates: a GateStats each.
        skipped: share of the denoise loop's floating-point operations, in both branches, that was skipped, in [0, 1];
            None if unknown, and in ``uncond``.
        uncond: the same for true CFG's negative branch, None without it.
    """

    gates: Tuple[GateStats, ...]
    skipped: Optional[float] = None
    uncond: Optional["CacheStats"] = None

    @property
    def reused(self):
        """One bool a step, true where any gate skipped blocks."""
        return tuple(any(step) for step in zip(*(gate.reused for gate in self.gates)))

    @property
    def residual_diffs(self):
        """The first gate's differences, or at a step where it has none those of the next one."""
        return tuple(
            next((diff for diff in step if diff is not None), None)
            for step in zip(*(gate.residual_diffs for gate in self.gates))
        )

    @property
    def computed_steps(self):
        """Indices of the steps that ran every block."""
        return [step for step, reused in enumerate(self.reused) if not reused]

    @property
    def cached_steps(self):
        """Indices of the steps at which blocks were skipped."""
        return [step for step, reused in enumerate(self.reused) if reused]

    def __str__(self):
        rows = [("branch", "gate", "computed", "reused", "longest run", "differences")]
        for branch, stats in zip(BRANCHES, (self, self.uncond)):
            for gate in stats.gates if stats else ():
                diffs = [diff for diff in gate.residual_diffs if diff is not None]
                spread = f"{min(diffs):.3f} .. {max(diffs):.3f}" if diffs else "-"
                reused, refreshed = len(gate.cached_steps), len(gate.refreshed_steps)
                reused = f"{reused} ({refreshed} refreshed)" if refreshed else str(reused)
                longest = max(gate.run_lengths, default=0)
                rows.append((branch, gate.name, str(len(gate.computed_steps)), reused, str(longest), spread))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in rows]
        if self.skipped is not None:
            lines.append(f"{self.skipped:.1%} of the operations skipped")
        return "\n".join(lines)


def skipped_share(gates, traces, costs):
    """Share of a generation's operations that its gates skipped, in [0, 1].

    ``traces`` are each branch's GateStats, ``costs`` each branch's flops.StepCosts.
    """
    whole = saved = 0
    for trace, call in zip(traces, costs):
        whole += len(trace[0].reused) * call.total
        for gate, decisions in zip(gates, trace):
            start, stop = gate.span(call.doubles, call.singles)
            saved += len(decisions.cached_steps) * (call.total if gate.whole_model else call.of_blocks(start, stop))
            saved -= len(decisions.refreshed_steps) * call.refresh
            # Where the last block checks what is expected of it, it does so at every step.
            saved -= len(decisions.reused) * call.of_blocks(stop - 1, stop) * gate.verifies
    return saved / whole if whole else 0.0
