"""What a user may ask of the cache."""

import json
import re
import textwrap
from dataclasses import dataclass, field, make_dataclass, replace
from numbers import Integral, Real
from pathlib import Path

from .rules.forecasts import FORECASTS
from .rules.options import Option, did_you_mean, value_text
from .rules.schedules import MAX_STEPS, SCHEDULE_OPTIONS, SCHEDULES
from .rules.when import GATES, RULES, gates_where

FEW_STEPS = 4
"""FLUX.1-schnell's number of steps, for which it was distilled."""

_TAG = re.compile(
    r"F(?P<Fn>\d+)B(?P<Bn>\d+)_W(?P<W>\d+)(?:I(?P<I>\d+))?(?:M(?P<M>\d+))?(?:MC(?P<MC>\d+))?"
    r"(?:_T(?P<T>[01])(?:O(?P<O>\d+))?)?_R(?P<R>\d+(?:\.\d+)?(?:e-?\d+)?)(?P<more>(?:,\w+=[^,]+)*)"
)


def numbers_in(name):
    """The whole numbers in a name, a list."""
    return list(map(int, re.findall(r"\d+", name)))


FITTED = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))["config"]
    for file in sorted((Path(__file__).parent / "presets").glob("*.json"), key=lambda file: numbers_in(file.stem)[::-1])
}
"""Tags by name, from the preset files that fbcache learn wrote for the embedded checkpoint."""

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
    "teacache_qwenimage": (
        "F0B0_W0M0MC0_T0O0_R0.12,gate=teacache,teacache_threshold=0.2,teacache_coefficients=-450/280/-45/3.2/-0.02"
    ),
    "easycache": "F0B0_W3M0MC0_T0O0_R0.12,gate=easycache",
    "cg_taylor": "F1B0_W0M0MC0_T1O1_R0.12,gate=cg_taylor",
    "speca": "F0B0_W0M0MC8_T1O2_R0.12,gate=speca_next",
    "dicache": "F1B0_W6M0MC0_T1O1_R0.4,gate=dicache,probe=hidden,forecast=dicache,end=0.95",
    "taylorseer": "F0B0_W0M0MC0_T1O1_R0.12,gate=static,schedule=taylorseer,schedule_interval=5",
    "hicache": "F0B0_W0M0MC0_T1O2_R0.12,gate=static,schedule=taylorseer,schedule_interval=5,forecast=hicache",
    "spectrum": "F0B0_W0M0MC0_T1O4_R0.12,gate=static,schedule=spectrum_14,forecast=spectrum",
    "meancache": (
        "F0B0_W0M0MC0_T1O3_R0.12,gate=static,schedule=meancache_10,forecast=meancache,meancache_steps=2/1/1/1/1/1/1/4"
    ),
    "fora": "F0B0_W0M0MC0_T0O0_R0.12,gate=static,schedule=fora,schedule_interval=3",
    "toca": "F0B0_W0M0MC0_T0O0_R0.12,gate=refresh,schedule=toca,schedule_interval=12",
    "duca": "F0B0_W0M0MC0_T0O0_R0.12,gate=refresh,schedule=duca,schedule_interval=5",
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
    **FITTED,
}
"""Tags by name. slow to ultra and the four masks are cache-dit 1.5.3's, double_gate has Nunchaku's defaults.

teacache_qwenimage has the coefficients and the threshold that vLLM-Omni publishes for Qwen-Image.

learnt_6 to learnt_12 are learnt on the embedded checkpoint, at 28 and at 50 steps; what they gain over plain
First-Block Cache on prompts that they were not learnt from, benchmarks/frontier.py measures (docs/benchmarks.md).
fitted_N_of_M are learnt there too, for M steps alone; their files say how.
"""


_PROBES = gates_where(lambda gate: gate.needs_a_block)
_BY_RESIDUAL = gates_where(lambda gate: any(rule.threshold == "residual_diff_threshold" for rule in gate.every_rule))
_ASKED = gates_where(lambda gate: gate.rules)
_BY_SAMPLE = gates_where(lambda gate: gate.rules and not any(rule.difference for rule in gate.every_rule))

OPTIONS = {
    "residual_diff_threshold": Option(
        0.12,
        Real,
        (0, 1),
        "gate",
        "the gate's limit on the relative difference d = mean|r* - r| / mean|r*| of the probe r against its reference "
        "r*; a step is reused while its score is strictly below it (ParaAttention); FLUX.1-dev: careful 0.08, fast "
        "0.12; 0: never; 1, with gate fbcache and span blocks: whatever the difference (cache-dit)",
        used_with=("gate", _BY_RESIDUAL),
    ),
    "taylorseer_derivative": Option(
        0,
        Integral,
        (0, None),
        "forecast",
        "order of the forecast; 0: plain reuse (TaylorSeer, arXiv 2503.06923)",
        shapes_graph=True,
    ),
    "warmup_steps": Option(
        0,
        Integral,
        (0, None),
        "schedule",
        "W: of so many steps at the start every warmup_interval-th is computed; the very first one always is; a "
        f"generation of {FEW_STEPS} steps or fewer needs 1 or more here, or a schedule, to be cached at all "
        "(ParaAttention, cache-dit; the last part FBCache_ms)",
    ),
    "warmup_interval": Option(
        1, Integral, (1, None), "schedule", "I: distance, in steps, of the warm-up's computed steps (cache-dit)"
    ),
    "max_cached_steps": Option(
        -1,
        Integral,
        (-1, None),
        "limits",
        "M: reuses in all, -1: no limit (cache-dit)",
        used_with=("gate", _ASKED),
    ),
    "max_consecutive_cache_hits": Option(
        -1,
        Integral,
        (-1, None),
        "limits",
        "MC: reuses in a row, -1: no limit, 0: cache off (ComfyUI, cache-dit)",
        used_with=("gate", _ASKED),
    ),
    "max_accumulated_residual_diff": Option(
        0.0,
        Real,
        (0, None),
        "limits",
        "no reuse once the differences compared in a generation sum up to this; 0: no limit (cache-dit)",
        used_with=("gate", _PROBES),
    ),
    "gate": Option(
        "fbcache",
        str,
        tuple(GATES),
        "gate",
        "what decides: " + "; ".join(f"{name} {gate.text}" for name, gate in GATES.items()),
        shapes_graph=True,
    ),
    "probe": Option(
        "residual",
        str,
        ("residual", "hidden"),
        "gate",
        "what the gate compares: what the first blocks add to the image stream, or the stream behind them "
        "(Comfy-WaveSpeed, DiCache)",
        used_with=("gate", _PROBES),
        shapes_graph=True,
    ),
    "downsample_factor": Option(
        1,
        Integral,
        (1, None),
        "gate",
        "compare every so many-th channel of the probe (ParaAttention)",
        used_with=("gate", _PROBES),
        shapes_graph=True,
    ),
    "batch_reduction": Option(
        "mean",
        str,
        ("mean", "max"),
        "gate",
        "one decision for a batch: by the means over all of it (ParaAttention), or by the sample that differs most "
        "(FBCache_ms)",
        used_with=("gate", _BY_SAMPLE),
        shapes_graph=True,
    ),
    "residual_diff_threshold_single": Option(
        0.12,
        Real,
        (0, 1),
        "gate",
        "the single stack's residual_diff_threshold (Nunchaku)",
        used_with=("span", ("stacks",)),
    ),
    **{
        name: option.used(
            ("gate", gates_where(lambda gate, name=name: any(name in each.options for each in gate.every_rule)))
        )
        for rule in RULES.values()
        for name, option in rule.options.items()
    },
    "Fn_compute_blocks": Option(
        None,
        Integral,
        (0, None),
        "span",
        "F: first blocks, doubles and singles counted together, that always run; the probe is what they add; default: "
        "1, or 0 where the gate needs no block (cache-dit's DBCache)",
        shapes_graph=True,
    ),
    "Bn_compute_blocks": Option(
        0, Integral, (0, None), "span", "B: last blocks that always run (cache-dit)", shapes_graph=True
    ),
    "span": Option(
        None,
        str,
        ("blocks", "stacks", "single", "model"),
        "span",
        "what a reuse stands for: the blocks between F and B; the rest of the double and of the single stack, each "
        "under a gate of its own (Nunchaku); the single stack alone (Delta-DiT); the whole model, embedding and head "
        "too (EasyCache, MeanCache); default: blocks, or model where the gate looks at the latents or the forecast is "
        "of the velocity",
        shapes_graph=True,
    ),
    "forecast": Option(
        "taylor",
        str,
        tuple(FORECASTS),
        "forecast",
        "from the differences of order 0 to taylorseer_derivative: "
        + "; ".join(forecast.text for forecast in FORECASTS.values()),
        shapes_graph=True,
    ),
    "forecast_target": Option(
        None,
        str,
        ("residual", "output"),
        "forecast",
        "what is forecast: what the span adds to what goes into it, or what it gives, the velocity where the span is "
        "the model; default: residual, or output with gates refresh and speca and forecast meancache",
        shapes_graph=True,
    ),
    "forecast_coordinate": Option(
        "step",
        str,
        ("step", "sigma"),
        "forecast",
        "what distances are measured in: steps (TaylorSeer), or the noise level (after ResilPhase's phase)",
        used_with=("forecast", tuple(name for name, forecast in FORECASTS.items() if forecast.in_any_coordinate)),
    ),
    **{
        name: option.used(("forecast", (forecast.name,)))
        for forecast in FORECASTS.values()
        for name, option in forecast.options.items()
    },
    "derivatives_dtype": Option(
        "model",
        str,
        ("model", "float32"),
        "forecast",
        "what the differences are kept in: model, the transformer's dtype, or float32, twice the memory of bfloat16; "
        "measured, float32 improves no forecast: bfloat16 loses far less of them than the transformer's own rounding "
        "does (FBCache_ms.eval.precision)",
        shapes_graph=True,
    ),
    "start": Option(
        0.0,
        Real,
        (0, 1),
        "schedule",
        "no reuse before this share of the sampling; step i of N lies at i/N, or at 1 - t where the caller gives noise "
        "levels t of its own, before the scheduler shifts them (ComfyUI)",
    ),
    "end": Option(
        1.0, Real, (0, 1), "schedule", "no reuse after this share of the sampling, counted as for start (ComfyUI)"
    ),
    **SCHEDULE_OPTIONS,
}
"""The fields of CacheConfig; a rule's own and a forecast's own come from their declarations."""

_STACKS = gates_where(lambda gate: gate.probes_alone and f"{gate.rules[0].threshold}_single" in OPTIONS)

_Fields = make_dataclass(
    "_Fields",
    [(name, object, field(default=option.default, metadata={"option": option})) for name, option in OPTIONS.items()],
    frozen=True,
)


@dataclass(frozen=True)
class CacheConfig(_Fields):
    """When a step is reused, for which blocks, and what is added for them."""

    def __post_init__(self):
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.checked(name, getattr(self, name)))
        for name in _FOLLOWING:
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._default(name))
        for name, option in OPTIONS.items():
            needs = option.used_with
            if needs and getattr(self, name) != option.default and getattr(self, needs[0]) not in needs[1]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with {needs[0]}={getattr(self, needs[0])!r}; "
                    f"it needs {' or '.join(needs[1])}"
                )
        self._check_combination()

    @property
    def has_gate(self):
        """Whether there is a gate in the graph at all."""
        return GATES[self.gate].is_there

    @property
    def rules(self):
        """Every Rule that decides, those of a gate within another included."""
        return GATES[self.gate].every_rule

    @property
    def refreshes(self):
        """Whether there may be steps that refresh chosen tokens."""
        return GATES[self.gate].refreshes

    def _default(self, name):
        """A field's default, which for those in _FOLLOWING is the gate's or the forecast's."""
        gate, of_velocity = GATES[self.gate], FORECASTS[self.forecast].of_velocity
        following = {
            "Fn_compute_blocks": int(gate.needs_a_block),
            "span": "model" if gate.before_embedding or of_velocity else "blocks",
            "forecast_target": "output" if of_velocity or gate.refreshes or gate.verifies else "residual",
        }
        return following.get(name, OPTIONS[name].default)

    def _check_combination(self):
        """Raises ValueError, with the reason, for fields that make no sense together."""
        gate, forecast, order = GATES[self.gate], FORECASTS[self.forecast], self.taylorseer_derivative
        scheduled = self.schedule is not None or self.steps_computation_mask is not None
        if self.schedule is not None and self.steps_computation_mask is not None:
            raise ValueError("schedule and steps_computation_mask both name the computed steps; give one")
        if self.warmup_interval > 1 and self.warmup_steps == 0:
            raise ValueError(f"warmup_interval={self.warmup_interval} has no effect with warmup_steps=0")
        if gate.is_there and not gate.rules and not scheduled:
            raise ValueError(f"gate {self.gate!r} needs a schedule or a steps_computation_mask")
        if self.Fn_compute_blocks == 0 and gate.needs_a_block:
            others = gates_where(lambda other: not other.needs_a_block)
            raise ValueError(
                f"Fn_compute_blocks=0: gate {self.gate!r} compares what the first blocks add, so one must run; only "
                f"{' and '.join(others)} do without"
            )
        if self.span == "stacks" and self.gate not in _STACKS:
            raise ValueError(f"span 'stacks' needs a gate that probes each stack: {', '.join(_STACKS)}")
        if self.span == "single" and gate.within:
            others = gates_where(lambda other: other.rules and not other.within)
            raise ValueError(
                f"span 'single' has one gate, behind the double stack, and {self.gate!r} is two within each other; use "
                f"one of {', '.join(others)}"
            )
        if gate.rules and (self.span == "model") != gate.before_embedding:
            raise ValueError(
                f"span {self.span!r} does not begin where gate {self.gate!r} is asked; leave the span out, or for the "
                f"whole model take gate {' or '.join(gates_where(lambda other: other.before_embedding))}"
            )
        blocks = (self.Fn_compute_blocks, self.Bn_compute_blocks)
        if self.span != "blocks" and blocks != (self._default("Fn_compute_blocks"), 0):
            raise ValueError(
                f"span {self.span!r} sets its own blocks; leave out Fn_compute_blocks and Bn_compute_blocks"
            )
        for rule in self.rules:
            if order < rule.fewest_orders:
                raise ValueError(
                    f"gate {rule.name!r} tests a forecast, so taylorseer_derivative must be {rule.fewest_orders} or "
                    "more"
                )
        if forecast.only_order not in (None, order):
            raise ValueError(
                f"forecast {self.forecast!r} is made of two computed steps, so taylorseer_derivative must be "
                f"{forecast.only_order}, not {order}"
            )
        if forecast.of_velocity and (self.span, self.forecast_target) != ("model", "output"):
            raise ValueError(
                f"forecast {self.forecast!r} is of the velocity, so span must be 'model' and forecast_target 'output', "
                f"not {self.span!r} and {self.forecast_target!r}"
            )
        if forecast.takes_ratio and not gate.gives_ratio:
            names = gates_where(lambda other: other.gives_ratio)
            raise ValueError(
                f"forecast {self.forecast!r} is scaled by the probe's changes, so gate must be {' or '.join(names)}"
            )
        if self.forecast_target == "output" and not gate.is_there:
            raise ValueError(f"forecast_target {self.forecast_target!r} has no effect with gate {self.gate!r}")
        if gate.verifies and (self.span, *blocks, self.forecast_target) != ("blocks", 0, 0, "output"):
            raise ValueError(
                f"gate {self.gate!r} compares what the last block gives: span must be 'blocks', forecast_target "
                "'output', and Fn_compute_blocks and Bn_compute_blocks 0"
            )
        if gate.refreshes and (self.span, *blocks, order, self.forecast_target) != ("blocks", 0, 0, 0, "output"):
            raise ValueError(
                f"gate {self.gate!r} keeps what every block gives and reuses the stream behind the last: span must be "
                "'blocks', forecast_target 'output', and Fn_compute_blocks, Bn_compute_blocks and "
                "taylorseer_derivative 0"
            )
        if self.schedule is not None and SCHEDULES[self.schedule].refreshes and not gate.refreshes:
            names = gates_where(lambda other: other.refreshes)
            raise ValueError(
                f"schedule {self.schedule!r} has steps that refresh chosen tokens, so gate must be "
                f"{' or '.join(names)}, not {self.gate!r}"
            )
        default = OPTIONS["forecast"].default, OPTIONS["forecast_coordinate"].default
        if (self.forecast, self.forecast_coordinate) != default and order == 0:
            raise ValueError(
                f"forecast {self.forecast!r} by {self.forecast_coordinate} is plain reuse at taylorseer_derivative=0; "
                "give an order of 1 or more"
            )
        if forecast.rows and (not gate.is_there or gate.rules):
            names = gates_where(lambda other: other.is_there and not other.rules and not other.refreshes)
            raise ValueError(
                f"forecast {self.forecast!r} has weights for steps that are known to be reused, so gate must be "
                f"{' or '.join(names)}, not {self.gate!r}"
            )
        if self.derivatives_dtype != "model" and order == 0:
            raise ValueError(
                f"derivatives_dtype {self.derivatives_dtype!r} has no effect with taylorseer_derivative=0: one "
                "residual is kept, which comes in the transformer's dtype; give an order of 1 or more"
            )
        if self.start > self.end:
            raise ValueError(f"start={self.start} is behind end={self.end}")

    def changed(self, **changes):
        """A copy with other fields; those in _FOLLOWING follow the gate and the forecast unless they were chosen."""
        for name in _FOLLOWING:
            if getattr(self, name) == self._default(name):
                changes.setdefault(name, None)
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

    @property
    def fitted_defaults(self):
        """{field: transformer} of what has its default here, in use, and was fitted to one model."""
        return {
            name: option.fitted_to
            for name, option in OPTIONS.items()
            if option.fitted_to and getattr(self, name) == option.default
            if getattr(self, option.used_with[0]) in option.used_with[1]
        }

    @property
    def learnt_from(self):
        """What of it was learnt on the embedded checkpoint and says little of any other, in words; None for nothing."""
        if self.schedule is not None and SCHEDULES[self.schedule].learnt:
            return f"schedule {self.schedule}"
        if str(self) in FITTED.values():
            return "this table of weights"
        return None

    def switched_off(self):
        """A configuration of the same structure that computes every step."""
        structure = dict(zip(_STRUCTURE, self.structure))
        schedule = "fora" if self.has_gate and not self.rules else None
        return CacheConfig(**structure, warmup_steps=MAX_STEPS, schedule=schedule)

    def leaves_alone(self, steps):
        """Whether a generation of so many steps is left uncached although a gate would be asked.

        Where FEW_STEPS or fewer do a distilled model's whole work, a gate may reuse nothing unless warmup_steps, of 1
        or more, or a schedule says which steps are computed first.
        """
        said = self.warmup_steps or self.schedule or self.steps_computation_mask
        single = self.span == "stacks" and self.residual_diff_threshold_single > 0
        reuses = single or any(getattr(self, rule.threshold) > 0 for rule in self.rules)
        return steps <= FEW_STEPS and reuses and not said

    @property
    def by_noise(self):
        """Whether a forecast's distances are measured in the noise level."""
        return self.forecast_coordinate == "sigma" or FORECASTS[self.forecast].by_noise

    @property
    def depends_on_steps(self):
        """Whether the same step may be treated otherwise in a generation with another number of steps."""
        masked = self.steps_computation_mask is not None or (
            self.schedule is not None and SCHEDULES[self.schedule].depends_on_steps
        )
        return (
            masked
            or self.by_noise
            or (self.start, self.end) != (0, 1)
            or FORECASTS[self.forecast].rows is not None
            or FORECASTS[self.forecast].coordinate is not None
            or any(rule.computes_last or rule.threshold_at is not None for rule in self.rules)
        )

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
        for part in match["more"].split(",")[1:]:
            name, _, text = part.partition("=")
            if name not in OPTIONS:
                raise ValueError(
                    f"cache tag {tag!r}: {name} must be one of {', '.join(OPTIONS)}{did_you_mean(name, OPTIONS)}"
                )
            if name in values and not (name.startswith("max_") and values[name] == -1):
                raise ValueError(f"cache tag {tag!r} names {name} twice")
            values[name] = OPTIONS[name].parse(name, text)
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
            file = text
            try:
                text = json.loads(Path(file).read_text(encoding="utf-8"))["config"]
            except OSError as error:
                raise ValueError(f"cache preset file {file} cannot be read: {error.strerror}") from None
            except (KeyError, TypeError, ValueError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'cache preset file {file} must hold a JSON object with a tag as its "config"')
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
        for name in OPTIONS:
            value = getattr(self, name)
            in_tag = name in _TAGGED and not (name.startswith("max_") and value == 0)
            if not in_tag and value != self._default(name):
                tag += f",{name}={value_text(value)}"
        return tag


_FOLLOWING = "Fn_compute_blocks", "span", "forecast_target"
_STRUCTURE = tuple(name for name, option in OPTIONS.items() if option.shapes_graph)
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


def _documentation():
    """The fields, for help(): each with its range, default, source."""
    lines = ["", "", "    Args:"]
    for name, option in OPTIONS.items():
        default = "" if option.default is None else f" Default: {value_text(option.default)}."
        text = f"{name}: {option.text}. Is {option.range}.{default}"
        lines.append(textwrap.fill(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12))
    lines += [
        "",
        "    Raises:",
        "        TypeError: a value is not of the kind named above, or a field is unknown.",
        "        ValueError: a value is out of its range, has no effect, or makes no sense beside another.",
    ]
    return "\n".join(lines) + "\n    "


CacheConfig.__doc__ += _documentation()
