"""CacheContext: the state of one cached generation, the decision and the forecast."""

from contextlib import contextmanager

import numpy as np

import mindspore as ms
from mindspore import Parameter, ops

from ..config import CacheConfig
from ..rules import kernels
from ..rules.arithmetic import (
    mean,
    probe_ratio,
    relative_difference,
    ridge_inverse,
    ridge_weights,
    within_limits,
)
from ..rules.forecasts import FORECASTS, SUMS
from ..rules.schedules import MAX_STEPS
from ..rules.when import COMPUTED, EXPECTED, FORECAST, PREVIOUS, PROBE, SPAN
from .buffers import Buffer, Differences, StepTables, Tallies
from .gates import (
    FORECAST_NUMBER,
    LIMITS,
    GatePlan,
    check_shape,
    deciding,
    every_gate,
    places,
    plan,
    step_tables,
)
from .refresh import kept_blocks
from .stats import BRANCHES, NOT_COMPARED, NOT_REACHED, REFRESHED, REUSED, CacheStats, GateStats, skipped_share


@ms.jit_class
class AskedRule:
    """A rule of a gate with what it keeps: its reference, where that is an earlier probe, and the sum of its scores.

    Args:
        rule: the Rule.
        numbers: the places of its own numbers among the gate's.
        reference: the Buffer of an earlier probe, None where the reference is a forecast.
        sum: the Buffer of the scores accumulated since the last computed step.
        state: the Buffers of what the rule keeps beside.
    """

    def __init__(self, rule, numbers, reference, sum, state):
        self.score, self.numbers, self.unasked, self.at_the_next = rule.score, numbers, rule.unasked, rule.at_the_next
        self.difference, self.observe = rule.difference, rule.observe
        self.reference, self.sum, self.state = reference, sum, state
        self.against_previous, self.against_computed = rule.reference == PREVIOUS, rule.reference == COMPUTED
        self.against_expected = rule.reference == EXPECTED

    def kept(self):
        """What the rule keeps beside, as it is now."""
        return tuple([buffer.read() for buffer in self.state])

    def take(self, before, behind, mean):
        """Takes over what it keeps from a computed step's span."""
        if self.observe is not None:
            kept = self.observe(self.kept(), before, behind, mean)
            for place in range(len(self.state)):
                self.state[place].write(kept[place])


@ms.jit_class
class Gate:
    """A decision for a span of blocks: the rules that make it, the span's residual, and what has been decided."""

    span = GatePlan.span

    def __init__(
        self, plan, order, config, shape, text_len, channels, dtype, tables, tallies, buffer, over_ranks, blocks=()
    ):
        self.over_ranks, self.mean = over_ranks, over_ranks or mean
        batch, tokens, width = shape
        shape = (batch, tokens, channels) if plan.whole_model else shape
        self.whole_model, self.channels = plan.whole_model, channels
        forecast = FORECASTS[config.forecast]
        self.name, self.index, self.tables, self.tallies = plan.name, order.index(plan), tables, tallies
        self.stack, self.first, self.last = plan.stack, plan.first, plan.last
        self.needs_text, self.probes_text = plan.needs_text, plan.probes_text
        self.orders, self.takes_ratio = config.taylorseer_derivative + 1, forecast.takes_ratio
        self.has_rows, self.refreshes, self.blocks = forecast.rows is not None, plan.refreshes, blocks
        self.forecast_weights, self.forecast_gaps = forecast.weights, forecast.gaps
        self.of_output, self.regresses = config.forecast_target == "output", forecast.keeps == SUMS
        self.looks_at = tuple(config.probe if rule.looks_at == PROBE else rule.looks_at for rule in plan.rules)
        self.factor, self.batch_reduction = config.downsample_factor, config.batch_reduction

        def named(name, shape, initial=0, dtype=ms.float32):
            return buffer(f"{plan.name}_{name}", shape, initial, dtype)

        def differences(name, shape):
            kept = ms.float32 if config.derivatives_dtype == "float32" else dtype
            return Differences(named(name, (self.orders, *shape), dtype=kept), forecast.keeps)

        self.filled = named("filled", (), dtype=ms.int32)
        self.nodes = named("nodes", (self.orders,))
        self.inverse = named("inverse", (self.orders, self.orders)) if self.regresses else None
        self.unit, self.one = ms.Tensor(np.eye(self.orders), ms.float32), ms.Tensor(1, ms.int32)
        self.not_compared, self.nothing = ms.Tensor(NOT_COMPARED, ms.float32), ms.Tensor(0, ms.float32)
        self.residual = differences("derivatives", shape)
        self.text_residual = differences("text_derivatives", (batch, text_len, width)) if plan.needs_text else None
        probe_shape = (batch, tokens + text_len * plan.probes_text, -(-width // self.factor))
        shapes = [probe_shape if rule.looks_at == PROBE else shape for rule in plan.rules]
        self.probe_shape, self.probe_shapes = probe_shape, tuple(shapes)
        self.forecasts_probe = plan.forecasts_probe or forecast.takes_ratio
        self.probe_differences = differences("probes", probe_shape) if self.forecasts_probe else None
        references = [
            None if rule.reference in (FORECAST, EXPECTED) else named(f"{rule.name}_reference", probed, dtype=dtype)
            for rule, probed in zip(plan.rules, shapes)
        ]
        sums = [named(f"{rule.name}_sum", ()) for rule in plan.rules]
        states = [
            tuple(
                named(f"{rule.name}_{name}", shape if kind == SPAN else (), np.nan) for name, kind in rule.state.items()
            )
            for rule in plan.rules
        ]
        self.rules = tuple(map(AskedRule, plan.rules, places(plan.rules), references, sums, states))
        self.decides, self.verifies = plan.decides, plan.verifies
        heard = len(plan.rules) == 1 and plan.rules[0].unasked == 0 and not plan.rules[0].at_the_next
        # A step that a gate within may still reuse is counted there.
        self.counts_computed = not any(within.decides for within in plan.inner)
        self.asks_one_rule = heard and len(plan.inner) == 0 and not plan.refreshes
        # Each step's decision, and the difference that it was made by.
        self.trace = named("trace", (2, MAX_STEPS), NOT_REACHED)
        self.inner = tuple(
            Gate(within, order, config, shape, text_len, channels, dtype, tables, tallies, buffer, over_ranks)
            for within in plan.inner
        )

    def number(self, place):
        """One of the gate's numbers."""
        return self.tables.number(self.index, place)

    def decide(self, probes):
        """Whether this step is reused, a scalar, from a probe for each rule.

        No limit may be reached, the schedule's among them, and every rule's score must be strictly below its threshold.
        """
        compared = tuple([self.compare(self.rules[place], probes[place]) for place in range(len(self.rules))])
        reuse, scores = self.decided(compared)
        for place in range(len(self.rules)):
            rule = self.rules[place]
            if rule.against_previous:
                rule.reference.write(probes[place])
            if rule.against_previous or rule.at_the_next:
                rule.sum.write(ops.where(reuse, scores[place], 0.0))
        return reuse

    def decided(self, compared):
        """The decision, written down, from each rule's difference and score; and the scores to accumulate."""
        tallies, tables = self.tallies.values.read(), self.tables
        if self.asks_one_rule:
            difference, score = compared[0]
            step, first, trace = tables.step.read(), tables.first(self.index), self.trace.read()
            by_kernel = kernels.decision(tallies, tables.limits, step, first, difference, score, trace)
            if by_kernel is not None:
                reuse, tallies, trace = by_kernel
                self.tallies.values.write(tallies)
                self.trace.write(trace)
                return reuse, (score,)
        limits = tables.limit(self.index)
        asked = within_limits(tallies, limits[:LIMITS])
        reuse, differences, scores = asked, (), ()
        for place in range(len(self.rules)):
            rule, (difference, score) = self.rules[place], compared[place]
            passes = score < limits[LIMITS + place]
            if rule.unasked > 0:
                passes = ops.logical_or(tallies[1] < rule.unasked, passes)
            if rule.at_the_next:
                passes, score = rule.sum.read() < 1, ops.where(passes, 0.0, 1.0)
            reuse = ops.logical_and(reuse, passes)
            differences, scores = differences + (difference,), scores + (score,)
        self.write_down(reuse, asked, differences)
        return reuse, scores

    def compare(self, rule, probe):
        """A rule's difference and its score."""
        if rule.difference is None:
            difference = relative_difference(self.reference(rule), probe, self.batch_reduction, self.over_ranks)
        else:
            difference = rule.difference(self.reference(rule), probe, rule.kept(), self.mean)
        numbers = tuple([self.number(number) for number in rule.numbers])
        return difference, rule.score(difference, rule.sum.read(), numbers)

    def reference(self, rule):
        """What a rule compares the probe with."""
        if rule.against_expected:
            return self.residual.forecast(self.weights(1.0))
        if rule.reference is None:
            return self.probe_differences.forecast(self.weights(1.0))
        return rule.reference.read()

    def write_down(self, reuse, asked, differences):
        """Writes the decision down, and the first rule's difference if the gate was asked."""
        mark, compared, summed = reuse.astype(ms.float32), self.not_compared, self.nothing
        if self.refreshes:
            mark = ops.where(self.refresh() > 0, float(REFRESHED), mark)
        if len(differences) > 0:
            compared = ops.where(asked, differences[0], NOT_COMPARED)
        if len(differences) > 0 and len(self.inner) == 0:
            summed = ops.where(ops.logical_and(asked, ops.isfinite(differences[0])), differences[0], 0.0)
        here = self.tables.every_step == self.tables.step.read()
        self.trace.write(ops.where(here, ops.stack((mark, compared)).expand_dims(1), self.trace.read()))
        self.tallies.count(reuse, self.counts_computed, summed)

    def refresh(self):
        """Which of the generation's refreshes this step is, from 1 on, int32; 0 for any other step.

        Where nothing is kept yet, as in a context that goes on with another's generation, a step computes.
        """
        number = self.tables.row(self.index)[0].astype(ms.int32)
        return ops.where(self.filled.read() > 0, number, 0)

    def weights(self, ratio):
        """The forecast's weights at this step, a scalar for each order."""
        if self.regresses:
            weights = ridge_weights(self.inverse.read(), self.basis())
            return tuple([weights[order] for order in range(self.orders)])
        own = self.tables.row(self.index) if self.has_rows else self.number(FORECAST_NUMBER)
        return self.forecast_weights(self.tables.x(), self.last_nodes(), own, ratio)

    def basis(self):
        """The functions that a regression is on, at this step, (K,)."""
        return ops.stack(self.forecast_gaps(self.tables.x(), self.last_nodes()))

    def last_nodes(self):
        """The coordinates of the last computed steps, newest first."""
        nodes = self.nodes.read()
        return tuple([nodes[order] for order in range(self.orders)])

    def kept(self, before, behind):
        """What of a stream the differences are of: what the span adds to it, or what it gives."""
        return behind if self.of_output else behind - before

    def behind(self, before, forecast):
        """A stream behind the span, from what ``kept`` is expected to be."""
        forecast = forecast.to(before.dtype)
        return forecast if self.of_output else before + forecast

    def forecast(self, added):
        """What is expected of ``kept`` at this step in float32: (image stream, text stream or None).

        ``added`` is what the blocks before the span have added, (B, S, D), in a tuple, empty where nobody asks.
        """
        ratio = 1.0
        if self.takes_ratio:
            nodes = self.last_nodes()
            ratio = probe_ratio(added[0], self.probe_differences.derivatives.read(), nodes[0] - nodes[1], self.mean)
        weights, text = self.weights(ratio), None
        image = self.residual.forecast(weights)
        self.residual.used(image)
        if self.needs_text:
            text = self.text_residual.forecast(weights)
            self.text_residual.used(text)
        return image, text

    def stats(self, steps, branch):
        """The trace of the first ``steps`` steps of a guidance branch, a GateStats."""
        reused, diffs = self.trace.value.asnumpy().reshape(-1, 2, MAX_STEPS)[branch, :, :steps]
        refreshed = tuple(np.flatnonzero(reused == REFRESHED).tolist())
        decisions = tuple(None if mark == NOT_REACHED else mark in (REUSED, REFRESHED) for mark in reused.tolist())
        compared = (diffs != NOT_COMPARED) & np.isfinite(diffs)
        return GateStats(self.name, decisions, tuple(np.where(compared, diffs, None).tolist()), refreshed)

    def store(self, probes, added, before, behind, text, text_behind):
        """Takes over a computed step, from the image and the text stream before and behind the span.

        Its probes are the references, and what is kept of the streams goes into the differences, as ``added`` does.
        """
        filled, x, nodes = self.filled.read(), self.tables.x(), self.last_nodes()
        gaps = () if self.forecast_gaps is None else self.forecast_gaps(x, nodes)
        self.residual.update(self.kept(before, behind), filled, gaps)
        if self.needs_text:
            self.text_residual.update(self.kept(text, text_behind), filled, gaps)
        if self.forecasts_probe:
            self.probe_differences.update(added[0] if self.takes_ratio else probes[0], filled, gaps)
        for place in range(len(self.rules)):
            if self.rules[place].against_computed:
                self.rules[place].reference.write(probes[place])
            self.rules[place].take(before, behind, self.mean)
        if self.regresses:
            penalised = self.unit / self.number(FORECAST_NUMBER)
            inverse = ops.where(filled == 0, penalised, self.inverse.read())
            self.inverse.write(ridge_inverse(inverse, self.basis()))
        if self.orders > 1:
            self.nodes.write(ops.stack((x,) + nodes[:-1]))
        self.filled.write(ops.minimum(filled + 1, self.orders) if self.orders > 1 else self.one)


@ms.jit_class
class CacheContext:
    """The preallocated state of one generation's cache, for one shape.

    Every value that a generation changes is a Parameter, so that the compiled graph keeps it on the device, and
    reset() puts all of them back. The configuration's numbers are Parameters too: changing them compiles nothing.

    Args:
        batch_size: B, latents per call.
        seq_len: S, image tokens: height / 16 * width / 16 for Flux.
        inner_dim: D, the transformer's width: 3072 for Flux.
        taylorseer_derivative: order of the forecast, 0 for plain reuse.
        branches: 1, or 2 for true CFG, which caches its positive and its negative prompt apart; every buffer then has
            a leading axis of that length.
        mindspore_dtype: dtype of the large buffers, of the differences unless derivatives_dtype says otherwise;
            computations are in float32 whatever it is.
        config: the CacheConfig to start with; its order is taylorseer_derivative's default.
        text_len: T, text tokens; only where blocks run behind the span, or the single stack has a gate of its own.
        steps, sigmas: as in configure.
        channels: C, of the velocity; only where a reuse stands for the whole model.
        stacks: how many double and how many single blocks; only where chosen tokens are refreshed.
        over_ranks: where several devices share the tokens, the mean over those of all, as arithmetic.mean is called.

    Raises:
        ValueError: a size is below 1, branches is neither 1 nor 2, text_len or steps is missing, or config and
            taylorseer_derivative disagree.
    """

    def __init__(
        self,
        batch_size,
        seq_len,
        inner_dim,
        taylorseer_derivative=None,
        branches=1,
        mindspore_dtype=ms.float32,
        config=None,
        text_len=0,
        steps=None,
        sigmas=None,
        channels=0,
        over_ranks=None,
        stacks=(0, 0),
    ):
        if config is None:
            config = CacheConfig(taylorseer_derivative=taylorseer_derivative or 0)
        if taylorseer_derivative not in (None, config.taylorseer_derivative):
            raise ValueError(
                f"taylorseer_derivative is {taylorseer_derivative}, but {config.taylorseer_derivative} in the config"
            )
        check_shape(config, batch_size, seq_len, inner_dim, text_len, branches, channels, stacks)
        plans = plan(config)
        self.structure, self.branches = config.structure, branches
        self.shape, self.text_len = (batch_size, seq_len, inner_dim), text_len
        self.branch = Parameter(ms.Tensor(0, ms.int32), name="cache_branch", requires_grad=False)
        buffers = []

        def buffer(name, shape, initial, dtype):
            buffers.append(Buffer(name, shape, initial, dtype, self.branch, branches))
            return buffers[-1]

        # Whether forget() tells of every generation; otherwise the timesteps show where one begins.
        self.told = False
        self.step = buffer("step", (), 0, ms.int32)
        self.timestep = buffer("timestep", (), 0, ms.float32)
        self.tables = StepTables(config, self.step)
        blocks, self.token_order = (), None
        if any(gate.refreshes for gate in plans):
            blocks, self.token_order = kept_blocks(buffer, self.shape, text_len, stacks, mindspore_dtype)
        self.gates = tuple(
            Gate(
                gate,
                every_gate(plans),
                config,
                self.shape,
                text_len,
                channels,
                mindspore_dtype,
                self.tables,
                Tallies(buffer(f"{gate.name}_tallies", (LIMITS,), Tallies.initial, ms.float32)),
                buffer,
                over_ranks,
                blocks,
            )
            for gate in plans
        )
        self.whole_model = any(gate.whole_model for gate in plans)
        self.buffers = tuple(buffers)
        self.traced = (self.step, *(gate.trace for gate in every_gate(self.gates)))
        self.tallied = tuple(gate.tallies.values for gate in self.gates)
        self.configure(config, steps, sigmas)

    def configure(self, config, steps=None, sigmas=None, progress=None):
        """Takes over a CacheConfig's numbers; compiles nothing.

        Args:
            config: one of the same structure.
            steps: how many steps a generation has; only for a config that depends on it.
            sigmas: (steps + 1,) or longer, the noise levels; only where the config is ``by_noise``.
            progress: as for schedules.step_actions.

        Raises ValueError if the structure is another, or steps or sigmas are missing.
        """
        if config.structure != self.structure:
            raise ValueError(f"{config} needs a CacheContext of its own: this one was made for {self.structure}")
        if steps is None and config.depends_on_steps:
            raise ValueError(f"{config} depends on the number of steps; give steps")
        self.tables.set(*map(ms.Tensor, step_tables(config, steps or MAX_STEPS, sigmas, progress)))

    @contextmanager
    def __call__(self, name):
        """Turns to the buffers of a guidance branch: mindone's FluxPipeline enters "cond" and "uncond" each step.

        Raises ValueError for another name, and for "uncond" if this context has one branch only.
        """
        if name not in BRANCHES[: self.branches]:
            raise ValueError(
                f"cache_context {name!r} must be one of {', '.join(BRANCHES[: self.branches])}; for true CFG make the "
                "CacheContext with branches=2"
            )
        self.select(ms.Tensor(BRANCHES.index(name), ms.int32))
        yield self

    def select(self, branch):
        """Turns to the buffers of branch number ``branch``."""
        ops.assign(self.branch, branch)

    def reset(self):
        """Puts every buffer of the active branch back to where a generation starts."""
        for buffer in self.buffers:
            buffer.reset()

    def begin_step(self, timestep):
        """Resets if a new generation has begun: if forget() told so, or, where nobody tells, if this timestep shows it.

        Timesteps, scalars, fall within a generation. One that is as large as the last is a new generation's only after
        a first step: a half-precision schedule may repeat a value. What would be step 1000 is a new generation's.
        """
        if self.told:
            if self.step.read() == 0:
                self.reset()
        else:
            last, timestep = self.timestep.read(), timestep.astype(ms.float32)
            step = self.step.read()
            again = ops.logical_and(timestep == last, step <= 1)
            if ops.logical_or(ops.logical_or(timestep > last, again), step >= MAX_STEPS):
                self.reset()
            self.timestep.write(timestep)

    def end_step(self):
        """Goes on to the next step."""
        self.step.count()

    def trace(self):
        """The steps, decisions and tallies of the generation so far, NumPy arrays for ``go_on``."""
        return [buffer.value.asnumpy() for buffer in (*self.traced, *self.tallied)]

    def go_on(self, trace):
        """Goes on with a generation that another context of this structure has begun; its next step computes."""
        for branch in range(self.branches):
            self.select(ms.Tensor(branch, ms.int32))
            self.reset()
        decided, tallies = trace[: len(self.traced)], trace[len(self.traced) :]
        # As many reuses in a row as a generation begins with.
        tallies = [np.maximum(each, Tallies.initial).astype(np.float32) for each in tallies]
        for buffer, values in zip((*self.traced, *self.tallied), decided + tallies):
            ops.assign(buffer.value, ms.Tensor(values))

    def forget(self):
        """Makes the next step, of either branch, a generation's first."""
        for buffer in (self.timestep, self.step):
            ops.assign(buffer.value, ops.zeros_like(buffer.value))

    def parameters(self):
        """Every buffer and setting."""
        settings = (self.branch, self.tables.limits, self.tables.coordinates, self.tables.numbers)
        settings += () if self.token_order is None else (self.token_order,)
        return [buffer.value for buffer in self.buffers] + list(settings)

    def release(self):
        """Gives the memory of every buffer and setting back; nothing may run with them after that."""
        # MindSpore holds the Parameters of a graph for good, even when the graph's cell is gone.
        for parameter in self.parameters():
            parameter.set_data(ms.Tensor(0, parameter.dtype), slice_shape=True)

    @property
    def nbytes(self):
        """Bytes that all of it takes; memory.cache_bytes tells them beforehand."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def first_residual(self):
        """The first gate's reference: under First-Block Cache the probe of the last computed step, (B, S, D)."""
        return self.gates[0].rules[0].reference.value

    @property
    def derivatives(self):
        """The first gate's differences of the span's residual, (K, B, S, D)."""
        return self.gates[0].residual.derivatives.value

    @property
    def filled(self):
        """How many of the first gate's differences are valid."""
        return self.gates[0].filled.value

    def stats(self, costs=None, traces=None):
        """The generation's trace so far, a CacheStats; reads the device.

        ``costs`` is a flops.StepCosts, for the share of operations that was skipped, and ``traces`` what another device
        has a part of, as ``traces`` gives it.
        """
        traces = traces or self.traces()
        skipped = None if costs is None else skipped_share(deciding(self.gates), traces, [costs] * len(traces))
        uncond = CacheStats(traces[1]) if len(traces) == 2 else None
        return CacheStats(traces[0], skipped, uncond)

    def traces(self):
        """Each branch's GateStats so far; reads the device."""
        steps, gates = map(int, self.step.value.asnumpy().reshape(self.branches)), deciding(self.gates)
        if not gates:
            return [(GateStats("none", (False,) * count, (None,) * count),) for count in steps]
        return [tuple(gate.stats(count, branch) for gate in gates) for branch, count in enumerate(steps)]
