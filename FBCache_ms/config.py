"""What a user may ask of the cache."""

import json
import math
import re
import textwrap
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Optional, Tuple

from .schedules import MAX_STEPS, SCHEDULES

PROBED = ("fbcache", "cg_taylor", "dicache")
WITH_TEACACHE = ("teacache", "fbcache_and_teacache", "fbcache_or_teacache")
WITH_FBCACHE = (*PROBED, "fbcache_and_teacache", "fbcache_or_teacache")
ASKED = (*WITH_FBCACHE, "teacache")
GATES = (*ASKED, "static", "none")
BEFORE_ANY_BLOCK = ("teacache", "static", "none")

FEW_STEPS = 4
"""FLUX.1-schnell's number of steps, for which it was distilled."""

_TAG = re.compile(
    r"F(?P<Fn>\d+)B(?P<Bn>\d+)_W(?P<W>\d+)(?:I(?P<I>\d+))?(?:M(?P<M>\d+))?(?:MC(?P<MC>\d+))?"
    r"(?:_T(?P<T>[01])(?:O(?P<O>\d+))?)?_R(?P<R>\d+(?:\.\d+)?(?:e-?\d+)?)(?P<more>(?:,\w+=[^,]+)*)"
)
PRESETS = {
    "conservative": "F1B0_W0M0MC0_T0O0_R0.05",
    "balanced": "F1B0_W0M0MC0_T0O0_R0.12",
    "aggressive": "F1B0_W0M0MC0_T0O0_R0.2",
    "slow": "F4B0_W4M0MC4_T0O0_R0.12",
    "medium": "F1B0_W4M0MC6_T0O0_R0.24",
    "fast": "F1B0_W8I2M0MC8_T0O0_R0.8",
    "ultra": "F1B0_W8I4M0MC10_T1O1_R0.8",
    "double_gate": "F1B0_W0M0MC0_T0O0_R0.09,span=stacks,residual_diff_threshold_single=0.12",
    "teacache": "F0B0_W0M0MC0_T0O0_R0.12,gate=teacache",
    "cg_taylor": "F1B0_W0M0MC0_T1O1_R0.12,gate=cg_taylor",
    "dicache": "F1B0_W6M0MC0_T1O1_R0.4,gate=dicache,probe=hidden,forecast=dicache,end=0.95",
    "taylorseer": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=taylorseer,schedule_interval=5",
    "hicache": "F0B0_W0M0MC0_T1O2_R0.12,gate=static,schedule=taylorseer,schedule_interval=5,forecast=hicache",
    "fora": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=fora,schedule_interval=3",
    "delta_dit": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=fora,schedule_interval=3,span=single",
    "magcache": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=magcache",
    "mask_slow": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=mask_slow",
    "mask_medium": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=mask_medium",
    "mask_fast": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=mask_fast",
    "mask_ultra": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=mask_ultra",
    "learnt_6": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=learnt_6",
    "learnt_8": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=learnt_8",
    "learnt_10": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=learnt_10",
    "learnt_12": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=learnt_12",
}
"""Tags by name. slow to ultra and the four masks are cache-dit 1.5.3's, double_gate has Nunchaku's defaults.

learnt_6 to learnt_12 are learnt on the embedded checkpoint, at 28 and at 50 steps; what they gain over plain
First-Block Cache on prompts that they were not learnt from, benchmarks/frontier.py measures, and README.md shows.
"""


def _option(default, kind, allowed, group, text, used_with=None):
    """A field with all that its check, the command line and the documentation need.

    ``allowed`` is an interval (low, high), either end None, or a tuple of words; ``used_with`` names the field and its
    values without which this one would have no effect.
    """
    return field(
        default=default,
        metadata={"kind": kind, "allowed": allowed, "group": group, "text": text, "used_with": used_with},
    )


@dataclass(frozen=True)
class CacheConfig:
    """When a step is reused, for which blocks, and what is added for them."""

    residual_diff_threshold: float = _option(
        0.12,
        Real,
        (0, 1),
        "gate",
        "the gate's limit on the relative difference d = mean|r* - r| / mean|r*| of the probe r against its reference "
        "r*; a step is reused while its score is strictly below it (ParaAttention); 0: never; 1, with gate fbcache and "
        "span blocks: whatever the difference (cache-dit)",
        used_with=("gate", WITH_FBCACHE),
    )
    taylorseer_derivative: int = _option(
        0, Integral, (0, None), "forecast", "order of the forecast; 0: plain reuse (TaylorSeer, arXiv 2503.06923)"
    )
    warmup_steps: int = _option(
        0,
        Integral,
        (0, None),
        "schedule",
        "W: of so many steps at the start every warmup_interval-th is computed; the very first one always is; a "
        f"generation of {FEW_STEPS} steps or fewer needs 1 or more here, or a schedule, to be cached at all "
        "(ParaAttention, cache-dit; the last part FBCache_ms)",
    )
    warmup_interval: int = _option(
        1, Integral, (1, None), "schedule", "I: distance, in steps, of the warm-up's computed steps (cache-dit)"
    )
    max_cached_steps: int = _option(
        -1,
        Integral,
        (-1, None),
        "limits",
        "M: reuses in all, -1: no limit (cache-dit)",
        used_with=("gate", ASKED),
    )
    max_consecutive_cache_hits: int = _option(
        -1,
        Integral,
        (-1, None),
        "limits",
        "MC: reuses in a row, -1: no limit, 0: cache off (ComfyUI, cache-dit)",
        used_with=("gate", ASKED),
    )
    max_accumulated_residual_diff: float = _option(
        0.0,
        Real,
        (0, None),
        "limits",
        "no reuse once the differences compared in a generation sum up to this; 0: no limit (cache-dit)",
        used_with=("gate", WITH_FBCACHE),
    )
    gate: str = _option(
        "fbcache",
        str,
        GATES,
        "gate",
        "what decides: fbcache compares the probe with the last computed step's; cg_taylor with its own forecast "
        "(arXiv 2508.02240); dicache sums its changes from step to step (DiCache); teacache sums a polynomial of the "
        "modulated input's changes, before any block (TeaCache); fbcache_and_teacache where both agree, "
        "fbcache_or_teacache where either does; static: the schedule alone; none: no cache in the graph",
    )
    probe: str = _option(
        "residual",
        str,
        ("residual", "hidden"),
        "gate",
        "what the gate compares: what the first blocks add to the image stream, or the stream behind them "
        "(Comfy-WaveSpeed, DiCache)",
        used_with=("gate", WITH_FBCACHE),
    )
    downsample_factor: int = _option(
        1,
        Integral,
        (1, None),
        "gate",
        "compare every so many-th channel of the probe (ParaAttention)",
        used_with=("gate", WITH_FBCACHE),
    )
    batch_reduction: str = _option(
        "mean",
        str,
        ("mean", "max"),
        "gate",
        "one decision for a batch: by the means over all of it (ParaAttention), or by the sample that differs most "
        "(FBCache_ms)",
        used_with=("gate", ASKED),
    )
    residual_diff_threshold_single: float = _option(
        0.12,
        Real,
        (0, 1),
        "gate",
        "the single stack's residual_diff_threshold (Nunchaku)",
        used_with=("span", ("stacks",)),
    )
    teacache_threshold: float = _option(
        0.4,
        Real,
        (0, None),
        "gate",
        "TeaCache's rel_l1_thresh: reuse while the sum is below it; published: 0.25, 0.4, 0.6, 0.8",
        used_with=("gate", WITH_TEACACHE),
    )
    teacache_coefficients: Tuple[float, ...] = _option(
        (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        tuple,
        (1, 5),
        "gate",
        "TeaCache's polynomial, 1 to 5 coefficients, highest power first; the default is FLUX.1-dev's",
        used_with=("gate", WITH_TEACACHE),
    )
    Fn_compute_blocks: Optional[int] = _option(
        None,
        Integral,
        (0, None),
        "span",
        "F: first blocks, doubles and singles counted together, that always run; the probe is what they add; default: "
        "1, or 0 where the gate needs no block (cache-dit's DBCache)",
    )
    Bn_compute_blocks: int = _option(0, Integral, (0, None), "span", "B: last blocks that always run (cache-dit)")
    span: str = _option(
        "blocks",
        str,
        ("blocks", "stacks", "single"),
        "span",
        "what a reuse stands for: the blocks between F and B; the rest of the double and of the single stack, each "
        "under a gate of its own (Nunchaku); the single stack alone (Delta-DiT)",
    )
    forecast: str = _option(
        "taylor",
        str,
        ("taylor", "hicache", "newton", "dicache"),
        "forecast",
        "from the differences of order 0 to taylorseer_derivative: TaylorSeer's k^i/i!; HiCache's Hermite polynomials; "
        "Newton's, with the true gaps; DiCache's, scaled by the probe",
    )
    forecast_coordinate: str = _option(
        "step",
        str,
        ("step", "sigma"),
        "forecast",
        "what distances are measured in: steps (TaylorSeer), or the noise level (after ResilPhase's phase)",
        used_with=("forecast", ("taylor", "newton")),
    )
    hicache_sigma: float = _option(
        0.5,
        Real,
        (0, 1),
        "forecast",
        "HiCache's contraction; 0.3 for schnell (HiCache, arXiv 2508.16984)",
        used_with=("forecast", ("hicache",)),
    )
    derivatives_dtype: str = _option(
        "model",
        str,
        ("model", "float32"),
        "forecast",
        "what the differences are kept in: model, the transformer's dtype, or float32, twice the memory of bfloat16; "
        "measured, float32 improves no forecast: bfloat16 loses far less of them than the transformer's own rounding "
        "does (FBCache_ms.eval.precision)",
    )
    start: float = _option(
        0.0,
        Real,
        (0, 1),
        "schedule",
        "no reuse before this share of the sampling; step i of N lies at i/N, or at 1 - t where the caller gives noise "
        "levels t of its own, before the scheduler shifts them (ComfyUI)",
    )
    end: float = _option(
        1.0, Real, (0, 1), "schedule", "no reuse after this share of the sampling, counted as for start (ComfyUI)"
    )
    schedule: Optional[str] = _option(
        None,
        str,
        tuple(SCHEDULES),
        "schedule",
        "steps that are computed: taylorseer, the first three and every N-th from there; fora, every N-th; magcache; "
        "cache-dit's four masks; learnt_N, N steps in all, learnt on the embedded checkpoint. At the others the gate "
        "decides, or with the static gate they are reused",
    )
    schedule_interval: int = _option(
        5,
        Integral,
        (1, None),
        "schedule",
        "N, in steps (TaylorSeer, FORA, Delta-DiT)",
        used_with=("schedule", ("taylorseer", "fora")),
    )
    steps_computation_mask: Optional[Tuple[int, ...]] = _option(
        None,
        tuple,
        (1, None),
        "schedule",
        "a schedule of one's own, a digit a step: 1 computes, 0 as above (cache-dit)",
    )
    magcache_threshold: float = _option(
        0.24, Real, (0, None), "schedule", "largest accumulated error (MagCache)", used_with=("schedule", ("magcache",))
    )
    magcache_max_skips: int = _option(
        5, Integral, (0, None), "schedule", "MagCache's K: reuses in a row", used_with=("schedule", ("magcache",))
    )
    magcache_retention: float = _option(
        0.1, Real, (0, 1), "schedule", "share of steps computed first (MagCache)", used_with=("schedule", ("magcache",))
    )
    magcache_ratios: Optional[Tuple[float, ...]] = _option(
        None,
        tuple,
        (1, None),
        "schedule",
        "each step's residual norm over the one before; default: FLUX.1-dev's (MagCache)",
        used_with=("schedule", ("magcache",)),
    )

    def __post_init__(self):
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        if self.Fn_compute_blocks is None:
            object.__setattr__(self, "Fn_compute_blocks", self._default_first_blocks())
        for option in fields(self):
            needs = option.metadata["used_with"]
            if needs and getattr(self, option.name) != option.default and getattr(self, needs[0]) not in needs[1]:
                raise ValueError(
                    f"{option.name}={getattr(self, option.name)} has no effect with {needs[0]}="
                    f"{getattr(self, needs[0])!r}; it needs {' or '.join(needs[1])}"
                )
        self._check_combination()

    def _default_first_blocks(self):
        return 0 if self.gate in BEFORE_ANY_BLOCK else 1

    def _check_combination(self):
        """Raises ValueError, with the reason, for fields that make no sense together."""
        if self.schedule is not None and self.steps_computation_mask is not None:
            raise ValueError("schedule and steps_computation_mask both name the computed steps; give one")
        if self.gate == "static" and self.schedule is None and self.steps_computation_mask is None:
            raise ValueError("gate 'static' needs a schedule or a steps_computation_mask")
        if self.Fn_compute_blocks == 0 and self.gate not in BEFORE_ANY_BLOCK:
            raise ValueError(
                f"Fn_compute_blocks=0: gate {self.gate!r} compares what the first blocks add, so one must run; only "
                f"{' and '.join(BEFORE_ANY_BLOCK)} do without"
            )
        if self.span == "stacks" and self.gate not in PROBED:
            raise ValueError(f"span 'stacks' needs a gate that probes each stack: {', '.join(PROBED)}")
        if self.span == "single" and self.gate == "fbcache_or_teacache":
            raise ValueError(
                "span 'single' has one gate, behind the double stack, and 'fbcache_or_teacache' is two within each "
                "other; use fbcache, teacache or fbcache_and_teacache"
            )
        blocks = (self.Fn_compute_blocks, self.Bn_compute_blocks)
        if self.span != "blocks" and blocks != (self._default_first_blocks(), 0):
            raise ValueError(
                f"span {self.span!r} sets its own blocks; leave out Fn_compute_blocks and Bn_compute_blocks"
            )
        if self.gate == "cg_taylor" and self.taylorseer_derivative == 0:
            raise ValueError("gate 'cg_taylor' tests a forecast, so taylorseer_derivative must be 1 or more")
        if self.forecast == "dicache" and self.taylorseer_derivative != 1:
            raise ValueError(
                f"forecast 'dicache' is made of two residuals, so taylorseer_derivative must be 1, not "
                f"{self.taylorseer_derivative}"
            )
        if self.forecast == "dicache" and self.gate not in ("fbcache", "dicache"):
            raise ValueError("forecast 'dicache' is scaled by the probe's changes, so gate must be fbcache or dicache")
        if (self.forecast, self.forecast_coordinate) != ("taylor", "step") and self.taylorseer_derivative == 0:
            raise ValueError(
                f"forecast {self.forecast!r} by {self.forecast_coordinate} is plain reuse at taylorseer_derivative=0; "
                "give an order of 1 or more"
            )
        if self.derivatives_dtype != "model" and self.taylorseer_derivative == 0:
            raise ValueError(
                f"derivatives_dtype {self.derivatives_dtype!r} has no effect with taylorseer_derivative=0: one "
                "residual is kept, which comes in the transformer's dtype; give an order of 1 or more"
            )
        if self.start > self.end:
            raise ValueError(f"start={self.start} is behind end={self.end}")

    def changed(self, **changes):
        """A copy with other fields; Fn_compute_blocks follows the gate unless it was chosen."""
        if self.Fn_compute_blocks == self._default_first_blocks():
            changes.setdefault("Fn_compute_blocks", None)
        return replace(self, **changes)

    def check_blocks(self, doubles, singles):
        """Raises ValueError if in a transformer of so many double and single blocks a reuse would skip none."""
        first, last = self.Fn_compute_blocks, self.Bn_compute_blocks
        if self.span == "blocks" and first + last >= doubles + singles:
            raise ValueError(
                f"Fn_compute_blocks={first} and Bn_compute_blocks={last} leave none of the transformer's "
                f"{doubles + singles} blocks to skip"
            )
        if self.span == "stacks" and min(doubles, singles) < 2 or self.span == "single" and singles < 1:
            raise ValueError(
                f"span {self.span!r} finds nothing to skip in {doubles} double and {singles} single blocks"
            )

    @property
    def structure(self):
        """What makes a graph of its own; every other field is a number that goes into it."""
        return tuple(getattr(self, name) for name in _STRUCTURE)

    def switched_off(self):
        """A configuration of the same structure that computes every step."""
        structure = dict(zip(_STRUCTURE, self.structure))
        return CacheConfig(**structure, warmup_steps=MAX_STEPS, schedule="fora" if self.gate == "static" else None)

    def leaves_alone(self, steps):
        """Whether a generation of so many steps is left uncached although a gate would be asked.

        Where FEW_STEPS or fewer do a distilled model's whole work, a gate may reuse nothing unless warmup_steps, of 1
        or more, or a schedule says which steps are computed first.
        """
        said = self.warmup_steps or self.schedule or self.steps_computation_mask
        single = self.span == "stacks" and self.residual_diff_threshold_single > 0
        reuses = self.residual_diff_threshold > 0 or single or self.gate in WITH_TEACACHE
        return steps <= FEW_STEPS and self.gate in ASKED and reuses and not said

    @property
    def depends_on_steps(self):
        """Whether the same step may be treated otherwise in a generation with another number of steps."""
        fixed = self.schedule in (None, "taylorseer", "fora") and self.steps_computation_mask is None
        whole = (self.start, self.end, self.forecast_coordinate) == (0, 1, "step")
        return not fixed or not whole or self.gate in WITH_TEACACHE

    @classmethod
    def from_tag(cls, tag):
        """The configuration that a cache-dit style tag names, for instance ``F8B0_W8I2M0MC3_T1O1_R0.08``.

        F first and B last blocks that always run, W warm-up steps, I interval of forced steps (left out when 1), M and
        MC most reuses in all and in a row (0 or left out: no limit), T TaylorSeer on or off, O its order, R the
        threshold; then any other fields as ``,name=value``: ``F1B0_W0_R0.12,gate=teacache,end=0.8``.

        Raises ValueError for any other text.
        """
        match = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if match is None:
            raise ValueError(f"cache tag {tag!r} must read like F1B0_W4M0MC0_T1O2_R0.12")
        order = int(match["O"] or 0) if match["T"] == "1" else 0
        if match["T"] == "1" and order == 0:
            raise ValueError(f"cache tag {tag!r}: T1 needs an order O of 1 or more")
        values = {
            "residual_diff_threshold": float(match["R"]),
            "taylorseer_derivative": order,
            "warmup_steps": int(match["W"]),
            "warmup_interval": int(match["I"] or 1),
            "max_cached_steps": int(match["M"] or 0) or -1,
            "max_consecutive_cache_hits": int(match["MC"] or 0) or -1,
            "Fn_compute_blocks": int(match["Fn"]),
            "Bn_compute_blocks": int(match["Bn"]),
        }
        options = {option.name: option for option in fields(cls)}
        for part in match["more"].split(",")[1:]:
            name, _, text = part.partition("=")
            if name not in options:
                raise ValueError(
                    f"cache tag {tag!r}: {name} must be one of {', '.join(options)}{did_you_mean(name, options)}"
                )
            if name in values and not (name.startswith("max_") and values[name] == -1):
                raise ValueError(f"cache tag {tag!r} names {name} twice")
            values[name] = parse(options[name], text)
        return cls(**values)

    @classmethod
    def preset(cls, name):
        """The configuration of that name in PRESETS. Raises ValueError for any other."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"cache preset {name!r} must be one of {known}{did_you_mean(name, PRESETS)}")
        return cls.from_tag(PRESETS[name])

    @classmethod
    def named(cls, text):
        """The configuration of a preset's name, a tag, or a preset file (.json, as eval/tune.py writes it).

        Raises ValueError for any other text, and for a file without a tag as its "config".
        """
        if isinstance(text, str) and text.endswith(".json"):
            try:
                text = json.loads(Path(text).read_text(encoding="utf-8"))["config"]
            except OSError as error:
                raise ValueError(f"cache preset file {text} cannot be read: {error.strerror}") from None
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f'cache preset file {text} must hold a JSON object with a tag as its "config"'
                ) from None
        if text in PRESETS:
            return cls.preset(text)
        if isinstance(text, str) and not re.match(r"F\d", text):
            raise ValueError(
                f"cache {text!r} is no tag like F1B0_W4M0MC0_T1O2_R0.12, no preset file (.json) and none of the "
                f"presets {', '.join(PRESETS)}{did_you_mean(text, PRESETS)}"
            )
        return cls.from_tag(text)

    def __str__(self):
        order = self.taylorseer_derivative
        interval = "" if self.warmup_interval == 1 else f"I{self.warmup_interval}"
        most, row = max(self.max_cached_steps, 0), max(self.max_consecutive_cache_hits, 0)
        tag = (
            f"F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}_W{self.warmup_steps}{interval}M{most}MC{row}"
            f"_T{int(order > 0)}O{order}_R{value_text(self.residual_diff_threshold)}"
        )
        for option in fields(self):
            value = getattr(self, option.name)
            in_tag = option.name in _TAGGED and not (option.name.startswith("max_") and value == 0)
            if not in_tag and value != option.default:
                tag += f",{option.name}={value_text(value)}"
        return tag


_STRUCTURE = (
    "taylorseer_derivative",
    "gate",
    "probe",
    "downsample_factor",
    "batch_reduction",
    "Fn_compute_blocks",
    "Bn_compute_blocks",
    "span",
    "forecast",
    "derivatives_dtype",
)
_TAGGED = (
    "residual_diff_threshold",
    "taylorseer_derivative",
    "warmup_steps",
    "warmup_interval",
    "max_cached_steps",
    "max_consecutive_cache_hits",
    "Fn_compute_blocks",
    "Bn_compute_blocks",
)


def did_you_mean(word, allowed):
    """The end of an error's message: a question that names the nearest allowed word, or nothing if none is near."""
    words = {name.lower(): name for name in allowed}
    near = get_close_matches(str(word).lower(), words, 1)
    return f"; did you mean {words[near[0]]}?" if near else ""


def range_text(option):
    """A field's range, in words."""
    kind, allowed = option.metadata["kind"], option.metadata["allowed"]
    if kind is str:
        return "one of " + ", ".join(allowed)
    if kind is tuple:
        return "digits 0 and 1" if option.name == "steps_computation_mask" else "numbers, in text with / between them"
    low, high = allowed
    if kind is Integral:
        return f"a whole number from {low} on"
    return f"a number from {low} on" if high is None else f"a number in [{low}, {high}]"


def parse(option, text):
    """A field's value from its text in a tag or on the command line. Raises ValueError for what is none."""
    kind = option.metadata["kind"]
    try:
        if kind is tuple:
            return tuple(map(int, text)) if option.name == "steps_computation_mask" else _numbers(text)
        return {Real: float, Integral: int, str: str}[kind](text)
    except ValueError:
        raise ValueError(f"{option.name} must be {range_text(option)}, not {text!r}") from None


def _numbers(text):
    return tuple(float(number) for number in text.split("/"))


def value_text(value):
    """A field's value in a tag: the inverse of parse."""
    if isinstance(value, tuple):
        return ("" if set(value) <= {0, 1} and not any(isinstance(x, float) for x in value) else "/").join(
            map(value_text, value)
        )
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _checked(option, value):
    """The value as it is kept. Raises TypeError or ValueError, naming the field, for one that is not allowed."""
    kind, allowed = option.metadata["kind"], option.metadata["allowed"]
    message = f"{option.name} must be {range_text(option)}, not {value!r}"
    if value is None and option.default is None:
        return None
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(message)
        if value not in allowed:
            raise ValueError(message + did_you_mean(value, allowed))
        return value
    if kind is tuple:
        return _checked_tuple(option, value, message)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(message)
    low, high = allowed
    if not math.isfinite(value) or value < low or high is not None and value > high:
        raise ValueError(message)
    return int(value) if kind is Integral else float(value)


def _checked_tuple(option, value, message):
    try:
        values = tuple(value)
    except TypeError:
        raise TypeError(message) from None
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in values):
        raise TypeError(message)
    shortest, longest = option.metadata["allowed"]
    if len(values) < shortest or longest is not None and len(values) > longest or not all(map(math.isfinite, values)):
        raise ValueError(message)
    if option.name == "steps_computation_mask":
        if not set(values) <= {0, 1}:
            raise ValueError(message)
        return tuple(map(int, values))
    return tuple(map(float, values))


def _documentation():
    """The fields, for help(): each with its range, default, source."""
    lines = ["", "", "    Args:"]
    for option in fields(CacheConfig):
        default = "" if option.default is None else f" Default: {value_text(option.default)}."
        text = f"{option.name}: {option.metadata['text']}. Is {range_text(option)}.{default}"
        lines.append(textwrap.fill(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12))
    lines += [
        "",
        "    Raises:",
        "        TypeError: a value is not of the kind named above, or a field is unknown.",
        "        ValueError: a value is out of its range, has no effect, or makes no sense beside another.",
    ]
    return "\n".join(lines) + "\n    "


CacheConfig.__doc__ += _documentation()
