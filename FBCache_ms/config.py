"""What a user may ask of the cache."""

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real

_TAG = re.compile(
    r"F(?P<Fn>\d+)B(?P<Bn>\d+)_W(?P<W>\d+)(?:I(?P<I>\d+))?M(?P<M>\d+)MC(?P<MC>\d+)"
    r"_T(?P<T>[01])(?:O(?P<O>\d+))?_R(?P<R>\d+(?:\.\d+)?(?:e-?\d+)?)"
)
PRESETS = {
    "conservative": "F1B0_W0M0MC0_T0O0_R0.05",
    "balanced": "F1B0_W0M0MC0_T0O0_R0.12",
    "aggressive": "F1B0_W0M0MC0_T0O0_R0.2",
}
"""Tags by name."""

_FIXED = {"Fn": 1, "Bn": 0, "I": 1, "M": 0, "MC": 0}


@dataclass(frozen=True)
class CacheConfig:
    """How First-Block Cache decides and what TaylorSeer adds on a reused step.

    Args:
        residual_diff_threshold: largest relative difference, mean|r* - r| / mean|r*| of the first block's residual r
            against that of the last computed step r*, below which a step is reused. In [0, 1]; 0 turns the cache off.
            ParaAttention, first_block_cache.
        taylorseer_derivative: order of the forecast; 0 reuses the last residual as it is. A whole number from 0 on.
            TaylorSeer, arXiv 2503.06923.
        warmup_steps: steps at the start that are always computed. A whole number from 0 on; the very first step is
            computed whatever it says. ParaAttention.

    Raises:
        TypeError: a value is not a number of the kind named above.
        ValueError: a value is out of its range.
    """

    residual_diff_threshold: float = 0.12
    taylorseer_derivative: int = 0
    warmup_steps: int = 0

    def __post_init__(self):
        threshold = self.residual_diff_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise TypeError(f"residual_diff_threshold must be a number in [0, 1], not {threshold!r}")
        if not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise ValueError(f"residual_diff_threshold must be in [0, 1], not {threshold!r}")
        for name in ("taylorseer_derivative", "warmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be a whole number from 0 on, not {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")

    @classmethod
    def from_tag(cls, tag):
        """The configuration that a cache-dit style tag names, for instance ``F1B0_W4M0MC0_T1O2_R0.12``.

        F first and B last blocks that always run, W warm-up steps, I interval of forced steps (left out when 1), M and
        MC most reuses in all and in a row (0 = no limit), T TaylorSeer on or off, O its order, R the threshold.

        Raises ValueError for any other text, and for a part that is not supported.
        """
        match = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if match is None:
            raise ValueError(f"cache tag {tag!r} must read like F1B0_W4M0MC0_T1O2_R0.12")
        for name, only in _FIXED.items():
            if match[name] is not None and int(match[name]) != only:
                raise ValueError(f"cache tag {tag!r}: {name}={match[name]} is not supported; only {name}={only} is")
        order = int(match["O"] or 0) if match["T"] == "1" else 0
        if match["T"] == "1" and order == 0:
            raise ValueError(f"cache tag {tag!r}: T1 needs an order O of 1 or more")
        return cls(float(match["R"]), order, int(match["W"]))

    @classmethod
    def preset(cls, name):
        """The configuration of that name in PRESETS. Raises ValueError for any other."""
        if name not in PRESETS:
            raise ValueError(f"cache preset {name!r} must be one of {', '.join(PRESETS)}")
        return cls.from_tag(PRESETS[name])

    def __str__(self):
        threshold = f"{self.residual_diff_threshold:g}"
        if float(threshold) != self.residual_diff_threshold:
            threshold = repr(float(self.residual_diff_threshold))
        order = self.taylorseer_derivative
        return f"F1B0_W{self.warmup_steps}M0MC0_T{int(order > 0)}O{order}_R{threshold}"
