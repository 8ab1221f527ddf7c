"""Seconds of a transformer's steps, predicted from operations, bytes and operators counted: a roofline a part."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional

from ..cache.gates import deciding, plan, refreshed_steps
from ..models import costs_of
from ..rules.forecasts import FORECASTS
from ..rules.when import COMPUTED, EXPECTED, FORECAST, PREVIOUS, SPAN

FLOAT32 = 4

REFRESHED = "refreshed"
"""Among the names of the gates that reuse at a step: it refreshes chosen tokens."""

GATE_OPERATORS = 31
"""Of a rule's decision, as the loop's exported graph has them (tests/predict/test_roofline.py)."""


@dataclass(frozen=True)
class Accelerator:
    """What a device and its host do in a second.

    Args:
        name: what it is called.
        peak: operations of matrix products a second.
        bandwidth: bytes a second between its memory and its cores.
        efficiency: the share of both that is reached, in (0, 1].
        fused: the share of the bytes moved outside of products and attention that a compiled graph saves by running
            several operators as one, in [0, 1).
        launch_seconds: what the host takes to launch one operator of a compiled graph.
        dispatch_seconds: what it takes to launch one from Python.
        turn_seconds: what a step takes on top while the device waits for the host: reading a decision, Python, the
            next call.
    """

    name: str
    peak: float
    bandwidth: float
    efficiency: float = 1.0
    fused: float = 0.0
    launch_seconds: float = 0.0
    dispatch_seconds: float = 0.0
    turn_seconds: float = 0.0


@dataclass(frozen=True)
class Design:
    """How a generation is run.

    Args:
        name: what it is called.
        graph: as a compiled graph; else operator by operator.
        whole_loop: the host turns round once a generation; else once a step.
        hoisted: what does not depend on the step, as the model's condition() has it, is computed once.
        lean: on a reuse the text stream is not finished behind attention where only the skipped blocks need it.
        float32: differences and forecasts are in float32; else in the stream's dtype.
    """

    name: str
    graph: bool = True
    whole_loop: bool = False
    hoisted: bool = False
    lean: bool = False
    float32: bool = False


PYNATIVE = Design("operator by operator", graph=False)
PER_STEP = Design("a graph a step")
WHOLE_LOOP = Design("the whole loop as one graph", whole_loop=True, hoisted=True, lean=True, float32=True)
"""This package's."""


@dataclass(frozen=True)
class Work:
    """What a part of a step asks for.

    Args:
        part: its name.
        operations: floating-point operations of matrix products, two for each multiply-add.
        bytes: read from the device's memory and written to it.
        operators: how many the host launches.
    """

    part: str
    operations: float
    bytes: float
    operators: int = 0


@dataclass(frozen=True)
class Shapes:
    """A transformer and what goes into it.

    Args:
        config: the transformer's.
        batch: B, latents a call.
        image_tokens: S, height / 16 * width / 16 for Flux.
        text_tokens: T.
        itemsize: bytes of an element: 2 for bfloat16.
        weight_itemsize: of a weight of the blocks, itemsize for None: 1 where they are quantised to int8.
    """

    config: SimpleNamespace
    batch: int
    image_tokens: int
    text_tokens: int
    itemsize: int = 2
    weight_itemsize: Optional[int] = None

    @property
    def costs(self):
        """The operations, a StepCosts."""
        return self.model.step_costs(self.config, self.batch, self.image_tokens, self.text_tokens)

    @property
    def model(self):
        """What counts the transformer's parts, such as models/flux_costs.py."""
        return costs_of(self.config)

    @property
    def width(self):
        """D."""
        return self.model.width(self.config)

    @property
    def channels(self):
        """C, the velocity's."""
        return self.model.channels(self.config)

    @property
    def tokens(self):
        """T + S."""
        return self.image_tokens + self.text_tokens

    def stream(self, tokens):
        """Bytes of a stream of so many tokens."""
        return self.batch * tokens * self.width * self.itemsize

    def weights(self, squares):
        """Bytes of so many of the blocks' matrices, in squares of the transformer's width."""
        return squares * self.width**2 * (self.weight_itemsize or self.itemsize)


def blocks(shapes, start, stop, text=True):
    """The Works of blocks start to stop - 1, doubles and singles counted together; ``text`` is of the last one."""
    works = []
    for index in range(start, stop):
        works += shapes.model.block(shapes, index, text or index < stop - 1)
    return works


def refreshed_blocks(shapes):
    """The Works of all blocks at a step that refreshes chosen tokens.

    Raises ValueError for a family whose blocks cannot.
    """
    works = getattr(shapes.model, "refreshed_block", None)
    if works is None:
        raise ValueError(f"{shapes.config._class_name} has no block that refreshes chosen tokens")
    return [work for index in range(sum(shapes.model.stacks(shapes.config))) for work in works(shapes, index)]


@dataclass(frozen=True)
class CacheWork:
    """The Works of a configuration's gates.

    Args:
        shapes: the Shapes.
        config: the CacheConfig.
        float32: whether differences and forecasts are computed in float32.
    """

    shapes: Shapes
    config: object
    float32: bool

    @property
    def wide(self):
        """Bytes of an element in computations."""
        return FLOAT32 if self.float32 else self.shapes.itemsize

    @property
    def kept(self):
        """Bytes of an element of the differences kept."""
        return FLOAT32 if self.config.derivatives_dtype == "float32" else self.shapes.itemsize

    def cast(self, itemsize):
        """Bytes an element that are moved to compute with it."""
        return 0 if itemsize == self.wide else itemsize + self.wide

    def elements(self, tokens):
        """Of a stream."""
        return self.shapes.batch * tokens * self.shapes.width

    def span_elements(self, gate):
        """Of the span's residual: the image stream's, and the text's where blocks run behind it."""
        if gate.whole_model:
            return self.shapes.batch * self.shapes.image_tokens * self.shapes.channels
        return self.elements(self.shapes.image_tokens + gate.needs_text * self.shapes.text_tokens)

    def probe_elements(self, gate):
        """Of what a gate compares."""
        if gate.whole_model:
            return self.span_elements(gate)
        tokens = self.shapes.image_tokens + gate.probes_text * self.shapes.text_tokens
        return self.elements(tokens) / self.config.downsample_factor

    def forecast_bytes(self):
        """An element's, of a forecast: each difference read, and weighted and added from the first order on."""
        orders = self.config.taylorseer_derivative
        return (orders + 1) * (2 * self.kept + self.cast(self.kept)) + orders * 5 * self.wide

    def differences_bytes(self):
        """An element's, of an update of the finite differences."""
        orders, item = self.config.taylorseer_derivative, self.shapes.itemsize
        each = 2 * self.kept + self.cast(self.kept) + 7 * self.wide
        stacked = 2 * self.wide + self.cast(self.kept) + 2 * self.kept
        return self.cast(item) + orders * each + (orders + 1) * stacked

    def decide(self, gate):
        """The decision: a probe, and for each rule mean|r* - r| / mean|r*|."""
        item = self.shapes.itemsize
        elements = self.probe_elements(gate)
        moved = 3 * item * elements
        for rule in gate.rules:
            moved += (2 * self.cast(item) + 9 * self.wide) * elements
            if rule.reference == PREVIOUS:
                moved += 2 * item * elements
            if rule.reference in (FORECAST, EXPECTED):
                moved += self.forecast_bytes() * elements
        return [Work("decision", 0, moved, GATE_OPERATORS * len(gate.rules))] if gate.rules else []

    def forecast(self, gate):
        """What a reused step adds in the blocks' stead."""
        orders, item = self.config.taylorseer_derivative, self.shapes.itemsize
        moved = (self.forecast_bytes() + self.cast(item) + 3 * item) * self.span_elements(gate)
        if FORECASTS[self.config.forecast].takes_ratio:
            moved += 2 * (self.cast(item) + 5 * self.wide) * self.probe_elements(gate)
        return [Work("forecast", 0, moved, 6 + 7 * orders)]

    def store(self, gate):
        """What a computed step keeps."""
        orders, item = self.config.taylorseer_derivative, self.shapes.itemsize
        moved = (3 * item + self.differences_bytes()) * self.span_elements(gate)
        moved += 2 * item * self.probe_elements(gate) * sum(rule.reference == COMPUTED for rule in gate.rules)
        kept = sum(kind == SPAN for rule in gate.rules for kind in rule.state.values())
        moved += kept * (self.cast(item) + 7 * self.wide) * self.span_elements(gate)
        if gate.forecasts_probe or FORECASTS[self.config.forecast].takes_ratio:
            moved += self.differences_bytes() * self.probe_elements(gate)
        return [Work("store", 0, moved, 16 + 8 * orders)]

    def record(self, gate):
        """What a computed step keeps of every block beside: what attention and the MLP gave each of its streams."""
        doubles, singles = self.shapes.model.stacks(self.shapes.config)
        moved = 4 * self.shapes.stream(self.shapes.tokens) * (doubles + singles)
        return [Work("record", 0, moved, 4 * doubles + 2 * singles)] if gate.refreshes else []


def step(shapes, config, design, reused=()):
    """A step's Works.

    Args:
        shapes: the Shapes.
        config: the CacheConfig; gate="none" for the plain transformer.
        design: the Design.
        reused: names of the gates that reuse at this step; with REFRESHED, chosen tokens' MLPs run.
    """
    cache = CacheWork(shapes, config, design.float32)
    counts = shapes.model.stacks(shapes.config)

    def run(gates, start, stop):
        works = []
        for gate in gates:
            first, last = gate.span(*counts)
            skips = gate.name in reused
            text = not (design.lean and skips) or gate.needs_text or gate.probes_text
            works += blocks(shapes, start, first, text)
            works += cache.decide(gate)
            works += blocks(shapes, last - 1, last) if gate.verifies else []
            if gate.refreshes and REFRESHED in reused:
                works += refreshed_blocks(shapes) + cache.store(gate)
            elif skips:
                works += cache.forecast(gate)
            else:
                works += run(gate.inner, first, last) + cache.store(gate) + cache.record(gate)
            start = last
        return works + blocks(shapes, start, stop)

    works = run(plan(config), 0, sum(counts))
    if any(gate.whole_model and gate.name in reused for gate in plan(config)):
        return works
    hoisted = [] if design.hoisted else shapes.model.condition(shapes)
    return hoisted + shapes.model.ends(shapes) + works


def work_seconds(device, design, work):
    """A part's on the device: what takes longer, computing or moving bytes."""
    moved = work.bytes if work.operations or not design.graph else work.bytes * (1 - device.fused)
    return max(work.operations / device.peak, moved / device.bandwidth) / device.efficiency


def seconds(device, design, works):
    """Of Works in a row: the device's, or the host's where it launches operators slower than the device runs them."""
    launch = device.launch_seconds if design.graph else device.dispatch_seconds
    return max(
        sum(work_seconds(device, design, work) for work in works), launch * sum(work.operators for work in works)
    )


def run_seconds(device, design, shapes, config, steps):
    """Of a generation's denoise loop.

    Args:
        device, design, shapes, config: as above.
        steps: for each step the names of the gates that reuse, as step takes them.
    """
    turns = 1 if design.whole_loop else len(steps)
    total = turns * device.turn_seconds
    if design.hoisted:
        total += seconds(device, design, shapes.model.condition(shapes))
    kinds = {}
    for reused in map(frozenset, steps):
        if reused not in kinds:
            kinds[reused] = seconds(device, design, step(shapes, config, design, reused))
        total += kinds[reused]
    return total


def decisions(config, steps, computed):
    """For each step the names of the gates that reuse, from how many steps each gate computes.

    Which steps those are changes no time. Gates compute the same steps as far as they can, and one within another is
    asked at the steps that the outer one computes. As many of those that reuse are REFRESHED as the schedule says.

    Args:
        config: the CacheConfig.
        steps: N.
        computed: a number for each of gates.deciding(gates.plan(config)).
    """
    gates = deciding(plan(config))
    found = [frozenset(gate.name for gate, count in zip(gates, computed) if index >= count) for index in range(steps)]
    reused = steps - refreshed_steps(config, steps)
    return found[:reused] + [names | {REFRESHED} for names in found[reused:]]
