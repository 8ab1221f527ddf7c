"""When a step may be reused: every caching rule, each a declaration, and the gates that are made of them.

A rule's score is written with operators alone: command lines read this file, and must not wait for MindSpore.
"""

from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Callable, Mapping, Optional, Tuple

import numpy as np

from .options import Option

COMPUTED, PREVIOUS, FORECAST, EXPECTED = "computed", "previous", "forecast", "expected"
"""What a probe is compared with: the last computed step's, the one before, what the computed steps' probes forecast,
what the span is expected to give."""

PROBE = "probe"
"""What a rule looks at that compares what CacheConfig.probe says, of the blocks before the span."""

LATENTS = "latents"
"""What a rule looks at that is asked before the embedding: a reuse then stands for the whole model."""

VERIFIED = "verified"
"""What a rule looks at that runs the last block on what it is expected to get."""

SCALAR, SPAN = "scalar", "span"
"""The shapes of what a rule keeps from step to step: one number, or as what its span begins and ends with."""


@dataclass(frozen=True)
class Rule:
    """One caching rule: all that this package knows of it.

    A step may be reused while the score is strictly below the threshold, so that one which is no number computes.

    Args:
        name: as CacheConfig.gate has it.
        source: the paper's equation, or the project's function and version.
        text: what it does, behind its name.
        threshold: the field of CacheConfig that its score stays below.
        score: score(difference, accumulated, numbers), a scalar from the probe's relative difference d, from the scores
            accumulated since the last computed step, and from ``numbers``.
        reference: COMPUTED, PREVIOUS, FORECAST or EXPECTED. Against PREVIOUS a score is summed: it is ``accumulated``
            at the next step if this one is reused.
        looks_at: PROBE, LATENTS, VERIFIED, or the name of a probe that the model has.
        difference: difference(reference, probe, state, mean), a scalar, ``probe`` being this step's; None for
            arithmetic.relative_difference, which alone takes batch_reduction.
        state: {name: SCALAR or SPAN}, what it keeps beside; it is no number until ``observe`` has said one.
        observe: observe(state, before, behind, mean), the state after a computed step, from what went into the span
            and what came out of it. ``mean`` is arithmetic.mean, or what stands for it where devices share the tokens.
        options: {field of CacheConfig: Option}, its own.
        numbers: its own fields whose numbers the score gets, one after the other: one for a number, as many for a tuple
            as it may have.
        fewest_orders: the least taylorseer_derivative that it works with.
        computes_last: whether a generation's last step always computes.
        everything_at: the threshold at which every difference passes, where the rule is the only one; None for none.
        threshold_at: threshold_at(config, progress), the threshold at each step (N,) of a generation, ``progress``
            being the share of it that lies before, i/N; None for one that stays.
        unasked: so many reuses in a row do not ask it.
        at_the_next: whether what it says counts at the next step: this one is reused before it is heard.
    """

    name: str
    source: str
    text: str
    threshold: str
    score: Callable
    reference: str = COMPUTED
    looks_at: str = PROBE
    difference: Optional[Callable] = None
    state: Mapping[str, str] = field(default_factory=dict)
    observe: Optional[Callable] = None
    options: Mapping[str, Option] = field(default_factory=dict)
    numbers: Tuple[str, ...] = ()
    fewest_orders: int = 0
    computes_last: bool = False
    everything_at: Optional[float] = None
    threshold_at: Optional[Callable] = None
    unasked: int = 0
    at_the_next: bool = False

    @property
    def compares_itself(self):
        """Whether the score is the difference itself, not a sum over steps."""
        return self.reference != PREVIOUS

    @property
    def needs_a_block(self):
        """Whether blocks have to run before it can be asked."""
        return self.looks_at == PROBE


def difference_itself(difference, accumulated, numbers):
    """d."""
    return difference


def sum_of_differences(difference, accumulated, numbers):
    """The sum of d."""
    return accumulated + difference


def sum_of_polynomials(difference, accumulated, coefficients):
    """The sum of p(d), coefficients of p with the highest power first."""
    rescaled = difference * 0
    for coefficient in coefficients:
        rescaled = rescaled * difference + coefficient
    return accumulated + rescaled


def velocity_change(previous, latents, state, mean):
    """k mean|x - x_prev| / mean|v_c|: by how much of itself the velocity has changed since the step before."""
    _, _, slope, size = state
    return slope * mean((latents.float() - previous.float()).abs()) / size


def velocity_slope(state, latents, velocity, mean):
    """x_c, v_c, k = mean|v_c - v_c'| / mean|x_c - x_c'| and mean|v_c| of the last two computed steps, c' before c."""
    last_latents, last_velocity, _, _ = state
    latents, velocity = latents.float(), velocity.float()
    changes = (velocity - last_velocity).abs(), (latents - last_latents).abs(), velocity.abs()
    velocity_moved, latents_moved, size = mean(changes)
    return latents, velocity, velocity_moved / latents_moved, size


def verification_error(expected, verified, state, mean):
    """mean(|y' - y| / (|y| + 1e-10)), y' what was expected of the last block and y what it gives (SpeCa)."""
    verified = verified.float()
    return mean((expected - verified).abs() / (verified.abs() + 1e-10))


def falling_threshold(config, progress):
    """max(floor, tau beta^progress)."""
    return np.maximum(config.speca_floor, config.speca_threshold * config.speca_decay**progress)


FBCACHE = Rule(
    name="fbcache",
    source="ParaAttention 0.3.38, first_block_cache; cache-dit 1.5.3, DBCache",
    text="compares the probe with the last computed step's",
    threshold="residual_diff_threshold",
    score=difference_itself,
    everything_at=1,
)
CG_TAYLOR = Rule(
    name="cg_taylor",
    source="CG-Taylor, arXiv 2508.02240",
    text="with its own forecast (arXiv 2508.02240)",
    threshold="residual_diff_threshold",
    score=difference_itself,
    reference=FORECAST,
    fewest_orders=1,
)
DICACHE = Rule(
    name="dicache",
    source="DiCache, arXiv 2508.17356",
    text="sums its changes from step to step (DiCache)",
    threshold="residual_diff_threshold",
    score=sum_of_differences,
    reference=PREVIOUS,
)
TEACACHE = Rule(
    name="teacache",
    source="TeaCache4FLUX, teacache_flux.py",
    text="sums a polynomial of the modulated input's changes, before any block (TeaCache)",
    threshold="teacache_threshold",
    score=sum_of_polynomials,
    reference=PREVIOUS,
    looks_at="modulated",
    options={
        "teacache_threshold": Option(
            0.4,
            Real,
            (0, None),
            "gate",
            "TeaCache's rel_l1_thresh: reuse while the sum is below it; published: 0.25, 0.4, 0.6, 0.8",
        ),
        "teacache_coefficients": Option(
            (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
            tuple,
            (1, 5),
            "gate",
            "TeaCache's polynomial, 1 to 5 coefficients, highest power first; the default is FLUX.1-dev's",
            fitted_to="FluxTransformer2DModel",
        ),
    },
    numbers=("teacache_coefficients",),
    computes_last=True,
)

EASYCACHE = Rule(
    name="easycache",
    source="EasyCache, arXiv 2507.02860",
    text="sums the velocity's expected changes, from the latents alone: a reuse runs nothing of the model (EasyCache)",
    threshold="easycache_threshold",
    score=sum_of_differences,
    reference=PREVIOUS,
    looks_at=LATENTS,
    difference=velocity_change,
    state={"latents": SPAN, "velocity": SPAN, "slope": SCALAR, "size": SCALAR},
    observe=velocity_slope,
    options={
        "easycache_threshold": Option(
            0.1,
            Real,
            (0, None),
            "gate",
            "EasyCache's tau: reuse while the sum is below it; 0.05 to 0.4; its R is warmup_steps",
        ),
    },
    computes_last=True,
)

SPECA = Rule(
    name="speca",
    source="SpeCa, arXiv 2509.11628",
    text="runs the last block on what it is expected to get, and compares it with what was expected of it (SpeCa)",
    threshold="speca_threshold",
    score=difference_itself,
    reference=EXPECTED,
    looks_at=VERIFIED,
    difference=verification_error,
    options={
        "speca_threshold": Option(
            7.0,
            Real,
            (0, None),
            "gate",
            "SpeCa's tau: a step is reused while the error of the last block's forecast is below tau beta^(i/N)",
        ),
        "speca_decay": Option(0.3, Real, (0, 1), "gate", "SpeCa's beta: by how much tau has fallen at the end"),
        "speca_floor": Option(0.1, Real, (0, None), "gate", "SpeCa's least threshold"),
    },
    threshold_at=falling_threshold,
    unasked=2,
)
SPECA_NEXT = replace(
    SPECA,
    name="speca_next",
    text="the same, heard at the next step, as its authors' code has it",
    at_the_next=True,
)

RULES = {rule.name: rule for rule in (FBCACHE, CG_TAYLOR, DICACHE, TEACACHE, EASYCACHE, SPECA, SPECA_NEXT)}


@dataclass(frozen=True)
class Gate:
    """What decides over one span, as CacheConfig.gate names it.

    Args:
        text: what it does.
        rules: all of which have to agree; none for a schedule alone.
        within: those of a gate within the span, which is asked where this one computes.
        is_there: whether there is a gate in the graph at all.
        refreshes: whether its schedule may say of a step that it refreshes chosen tokens. A reuse then is of the stream
            behind the last block, not of what the blocks added.
    """

    text: str
    rules: Tuple[Rule, ...] = ()
    within: Tuple[Rule, ...] = ()
    is_there: bool = True
    refreshes: bool = False

    @property
    def every_rule(self):
        """Its rules and those within."""
        return self.rules + self.within

    @property
    def needs_a_block(self):
        """Whether blocks have to run before one of its rules can be asked."""
        return any(rule.needs_a_block for rule in self.every_rule)

    @property
    def before_embedding(self):
        """Whether it is asked before the embedding, so that a reuse stands for the whole model."""
        return any(rule.looks_at == LATENTS for rule in self.every_rule)

    @property
    def verifies(self):
        """Whether the last block checks what is expected of it."""
        return any(rule.looks_at == VERIFIED for rule in self.every_rule)

    @property
    def probes_alone(self):
        """Whether one rule decides, by a probe that any stack of blocks has."""
        return len(self.every_rule) == 1 and self.needs_a_block

    @property
    def gives_ratio(self):
        """Whether its probe's changes may scale a forecast; one that is forecast itself has no room for them."""
        return self.probes_alone and self.rules[0].reference != FORECAST


GATES = {
    **{rule.name: Gate(rule.text, (rule,)) for rule in RULES.values()},
    "fbcache_and_teacache": Gate("where both agree", (FBCACHE, TEACACHE)),
    "fbcache_or_teacache": Gate("where either does", (TEACACHE,), (FBCACHE,)),
    "static": Gate("the schedule alone"),
    "refresh": Gate("the same, with steps that refresh chosen tokens (ToCa, DuCa)", refreshes=True),
    "none": Gate("no cache in the graph", is_there=False),
}


def gates_where(test):
    """The names of the gates that pass a test."""
    return tuple(name for name, gate in GATES.items() if test(gate))
