"""What a sweep can go through: named lists of configurations, as the field's papers and tables have them."""

from dataclasses import dataclass
from typing import Optional

from FBCache_ms.config import FITTED, CacheConfig
from FBCache_ms.rules.schedules import LEARNT, MASKS

UNCACHED = "F0B0_W0_R0.12,gate=none"
"""The tag of the graph that has no gate at all: what a speed-up is a speed-up over."""

ROWS = ("F1B0_W0_R0.08", "F1B0_W0_R0.12")
"""The rows of the field's tables beside their baselines."""

FBCACHE_GRID = (0, 0.05, 0.1, 0.12, 0.15, 0.2)
TEACACHE_GRID = (0.25, 0.4, 0.6, 0.8)
GATES_GRID = (0, 0.2, 0.4, 0.6, 0.8, 1.0)
FIXED = 0.4


@dataclass(frozen=True)
class Row:
    """A row of a sweep.

    Args:
        case: what the row belongs to; a plot draws each case by itself.
        name: what it is called within a table or a plot.
        cache: its tag or preset; "{own}" stands for a mask that fits the number of steps.
        steps: the share of the steps that it takes.
        threshold: what varies within its case, None where nothing does.
    """

    case: str
    name: str
    cache: str
    steps: float = 1.0
    threshold: Optional[float] = None

    def cache_at(self, steps):
        """Its tag for a run of ``steps`` steps."""
        return self.cache.replace("{own}", own_mask(steps))

    def steps_of(self, steps):
        """How many of ``steps`` steps it takes."""
        return max(round(self.steps * steps), 1)


BASELINE = Row("Baseline", "no cache", UNCACHED)


def is_for(cache, steps):
    """Whether a tag, a preset or its file has no mask, or one for so many steps."""
    mask = CacheConfig.named(cache).steps_computation_mask
    return mask is None or len(mask) == steps


def own_mask(steps):
    """A mask for the row that shows one: the first quarter computed, then every third step, and the last."""
    return "".join(str(int(step < steps // 4 or step % 3 == 0 or step == steps - 1)) for step in range(steps))


def _grid(case, tag, thresholds):
    return tuple(Row(case, f"{case} {value:g}", tag.format(value), threshold=value) for value in thresholds)


def fbcache(thresholds=FBCACHE_GRID):
    """First-Block Cache over its thresholds."""
    return _grid("FBCache", "F1B0_W0_R{0:g}", thresholds)


def teacache(thresholds=TEACACHE_GRID):
    """TeaCache over its thresholds."""
    return _grid("TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold={0:g}", thresholds)


def combination():
    """First-Block Cache and, or, TeaCache: the product of both grids."""
    rows = []
    for word in ("and", "or"):
        tag = "F1B0_W0_R{0:g},gate=fbcache_%s_teacache,teacache_threshold={1:g}" % word
        for other in TEACACHE_GRID:
            case = f"FBCache {word} TeaCache {other:g}"
            rows += [Row(case, f"{case}: {value:g}", tag.format(value, other), 1, value) for value in FBCACHE_GRID]
    return tuple(rows)


def gates(thresholds=GATES_GRID):
    """The double gate's experiment: plain, each gate alone, both; then one at 0.4 while the other varies."""
    stacks = "F1B0_W0_R{0},span=stacks,residual_diff_threshold_single={1}"
    return (
        *_grid("plain", "F1B0_W0_R{0:g}", thresholds),
        *_grid("single gate", stacks.format("0", "{0:g}"), thresholds),
        *_grid("double gate", stacks.format("{0:g}", "0"), thresholds),
        *_grid("both gates", stacks.format("{0:g}", "{0:g}"), thresholds),
        *_grid(f"double at {FIXED}, single", stacks.format(FIXED, "{0:g}"), thresholds),
        *_grid(f"single at {FIXED}, double", stacks.format("{0:g}", FIXED), thresholds),
    )


def dbcache():
    """cache-dit's tags: its presets with and without TaylorSeer, and how many blocks always run."""
    tags = (
        "F1B0_W4_R0.08",
        "F1B0_W4_R0.12",
        "F1B0_W4_T1O1_R0.12",
        "F4B0_W4MC4_R0.12",
        "F4B0_W4MC4_T1O1_R0.12",
        "F1B0_W4MC6_R0.24",
        "F1B0_W4MC6_T1O1_R0.24",
        "F1B0_W8I2MC8_R0.8",
        "F1B0_W8I2MC8_T1O1_R0.8",
        "F1B0_W8I2MC10_R0.8",
        "F1B0_W8I2MC10_T1O1_R0.8",
        "F1B0_W8I4MC10_R0.8",
        "F1B0_W8I4MC10_T1O1_R0.8",
        "F3B2_W4_R0.12",
        "F4B4_W4_R0.12",
    )
    return tuple(Row("DBCache + TaylorSeer" if "_T1" in tag else "DBCache", tag, tag) for tag in tags)


def masks():
    """Schedules that are known before the loop."""
    names = (*MASKS, "magcache", "fora", "taylorseer", "hicache", "spectrum", *LEARNT, *FITTED)
    return tuple(Row("static", name, name) for name in names)


def fewer_steps():
    """The control: no cache, and fewer steps."""
    return tuple(Row("fewer steps", f"{share:.0%} of the steps", UNCACHED, share) for share in (0.6, 0.34, 0.22))


def rules():
    """Every rule once or more."""
    return (
        *fewer_steps(),
        Row("ParaAttention", "First-Block Cache", "conservative"),
        Row("ParaAttention", "First-Block Cache", "balanced"),
        Row("ParaAttention", "First-Block Cache", "aggressive"),
        Row("ParaAttention", "First-Block Cache + TaylorSeer", "F1B0_W0_T1O1_R0.2"),
        Row("ParaAttention", "First-Block Cache + TaylorSeer", "F1B0_W0_T1O2_R0.2"),
        Row("ParaAttention", "every 4th channel compared", "F1B0_W0_R0.12,downsample_factor=4"),
        Row("Comfy-WaveSpeed", "hidden state compared", "F1B0_W0_R0.12,probe=hidden"),
        Row("ComfyUI", "window, hits in a row", "F1B0_W0MC2_R0.2,start=0.1,end=0.9"),
        Row("cache-dit", "DBCache slow", "slow"),
        Row("cache-dit", "DBCache medium", "medium"),
        Row("cache-dit", "DBCache fast", "fast"),
        Row("cache-dit", "DBCache ultra", "ultra"),
        Row("cache-dit", "DBCache, last blocks run", "F3B2_W2MC3_R0.15"),
        Row("cache-dit", "accumulated limit", "F1B0_W0_R0.2,max_accumulated_residual_diff=2"),
        Row("cache-dit", "dynamic mask", "F1B0_W0_R0.24,schedule=mask_medium"),
        Row("cache-dit", "static mask slow", "mask_slow"),
        Row("cache-dit", "static mask medium", "mask_medium"),
        Row("cache-dit", "static mask fast", "mask_fast"),
        Row("cache-dit", "static mask ultra", "mask_ultra"),
        Row("cache-dit", "a mask of one's own", "F0B0_W0_R0.12,gate=static,steps_computation_mask={own}"),
        Row("Nunchaku", "double gate", "double_gate"),
        Row("Nunchaku", "double gate, single stack alone", "F1B0_W0_R0,span=stacks,residual_diff_threshold_single=0.2"),
        Row("Nunchaku", "double gate, double stack alone", "F1B0_W0_R0.2,span=stacks,residual_diff_threshold_single=0"),
        Row("TeaCache", "TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.25"),
        Row("TeaCache", "TeaCache", "teacache"),
        Row("TeaCache", "TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.8"),
        Row("here", "First-Block Cache and TeaCache", "F1B0_W0_R0.12,gate=fbcache_and_teacache"),
        Row("here", "First-Block Cache or TeaCache", "F1B0_W0_R0.2,gate=fbcache_or_teacache,teacache_threshold=0.25"),
        Row("TaylorSeer", "TaylorSeer", "taylorseer"),
        Row("TaylorSeer", "TaylorSeer, order 2", "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer"),
        Row("HiCache", "HiCache", "hicache"),
        Row("here", "Newton", "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=newton"),
        Row(
            "here",
            "Newton in sigma",
            "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=newton,forecast_coordinate=sigma",
        ),
        Row("Spectrum", "Spectrum, 14 of 50", "spectrum"),
        Row(
            "Spectrum",
            "Spectrum, 10 of 50",
            "F0B0_W0_T1O4_R0.12,gate=static,schedule=spectrum_10,forecast=spectrum",
        ),
        Row("MeanCache", "MeanCache, 10 of 50", "meancache"),
        Row(
            "MeanCache",
            "MeanCache, 17 of 50",
            "F0B0_W0_T1O3_R0.12,gate=static,schedule=meancache_17,forecast=meancache,meancache_steps=2/1/1/1/1/1/4",
        ),
        Row(
            "MeanCache",
            "MeanCache, 25 of 50",
            "F0B0_W0_T1O4_R0.12,gate=static,schedule=meancache_25,forecast=meancache,meancache_steps=1/1/1/5",
        ),
        Row("FORA", "FORA", "fora"),
        Row("ToCa", "ToCa", "toca"),
        Row("DuCa", "DuCa", "duca"),
        Row("Delta-DiT", "Delta-DiT", "delta_dit"),
        Row("MagCache", "MagCache", "magcache"),
        Row("EasyCache", "EasyCache", "easycache"),
        Row("CG-Taylor", "CG-Taylor", "cg_taylor"),
        Row("SpeCa", "SpeCa", "speca"),
        Row("SpeCa", "SpeCa, heard at once", "F0B0_W0MC8_T1O2_R0.12,gate=speca"),
        Row("DiCache", "DiCache", "dicache"),
        Row("DiCache", "DiCache's gate, reuse", "F1B0_W6_R0.4,gate=dicache"),
        Row("here", "decision by the worst sample", "F1B0_W0_R0.12,batch_reduction=max"),
        *(Row("here", "learnt mask", name) for name in LEARNT),
        *(Row("here", "fitted weights", name) for name in FITTED),
    )


CASES = {
    function.__name__: function
    for function in (fbcache, teacache, combination, gates, dbcache, masks, fewer_steps, rules)
}
