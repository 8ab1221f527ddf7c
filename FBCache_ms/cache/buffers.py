"""What a graph keeps on the device: buffers, differences, tallies, and the tables of the steps."""

import numpy as np

import mindspore as ms
from mindspore import Parameter, ops

from ..rules.arithmetic import finite_differences, last_values, running_sums, weighted_sum
from ..rules.forecasts import SUMS, VALUES
from ..rules.schedules import MAX_STEPS
from .gates import LIMITS, every_gate, numbers_width, plan, table_width, thresholds_width


@ms.jit_class
class Buffer:
    """A static tensor that the graph keeps on the device, one for each guidance branch."""

    def __init__(self, name, shape, initial, dtype, branch, branches):
        self.initial, self.shape, self.branch, self.branches = ms.Tensor(initial, dtype), shape, branch, branches
        self.one = ms.Tensor(1, ms.int32)
        self.rows = ms.Tensor(np.arange(branches).reshape((-1,) + (1,) * len(shape)), ms.int32)
        shape = shape if branches == 1 else (branches, *shape)
        self.value = Parameter(ms.Tensor(np.full(shape, initial), dtype), name=f"cache_{name}", requires_grad=False)

    def read(self):
        """The active branch's part."""
        if self.branches == 1:
            return self.value
        return ops.gather(self.value, self.branch, 0)

    def write(self, value):
        """Replaces the active branch's part."""
        value = value.astype(self.value.dtype)
        if self.branches > 1:
            value = ops.where(self.rows == self.branch, value.expand_dims(0), self.value)
        ops.assign(self.value, value)

    def count(self):
        """Adds one to the active branch's part, a whole number."""
        ops.assign_add(self.value, self.one if self.branches == 1 else (self.rows == self.branch).astype(ms.int32))

    def reset(self):
        """Puts the active branch's part back to where a generation starts."""
        self.write(ops.broadcast_to(self.initial, self.shape) if len(self.shape) > 0 else self.initial)


@ms.jit_class
class Differences:
    """A tensor's finite differences over the computed steps, (K, *shape), order 0 first, or what else is kept of it."""

    def __init__(self, derivatives, keeps):
        self.derivatives, self.sums, self.values = derivatives, keeps == SUMS, keeps == VALUES

    def update(self, value, filled, gaps):
        """Takes over the value at a computed step."""
        before = self.derivatives.read()
        if self.values:
            self.derivatives.write(last_values(value, before))
        elif self.sums:
            self.derivatives.write(running_sums(value, before, gaps))
        else:
            self.derivatives.write(finite_differences(value, before, filled, gaps))

    def forecast(self, weights):
        """What the tensor is expected to be, in float32."""
        return weighted_sum(weights, self.derivatives.read())

    def used(self, value):
        """Takes over what it was taken to be at a reused step."""
        if self.values:
            self.derivatives.write(last_values(value, self.derivatives.read()))


@ms.jit_class
class Tallies:
    """Reuses in all and in a row, and the sum of the compared differences, (3,); a gate and those within it share them.

    A generation begins with infinitely many reuses in a row, which are more than any limit: its first step computes.
    """

    initial = (0, np.inf, 0)

    def __init__(self, values):
        self.values = values
        self.reuse = ms.Tensor([1, 1, 0], ms.float32)
        self.kept = ms.Tensor([np.inf, 0, np.inf], ms.float32)
        self.summed = ms.Tensor([0, 0, 1], ms.float32)

    def count(self, reuse, computes, difference):
        """Counts a reuse, or the computed step that it is otherwise where ``computes`` says so; adds a difference."""
        values = self.values.read() + difference * self.summed
        otherwise = ops.minimum(values, self.kept) if computes else values
        self.values.write(ops.where(reuse, values + self.reuse, otherwise))


@ms.jit_class
class StepTables:
    """The step's number and every number of the configuration: inputs of the graph, not constants of it."""

    def __init__(self, config, step):
        self.step, self.every_step = step, ms.Tensor(np.arange(MAX_STEPS), ms.int32)
        number, self.width = max(len(every_gate(plan(config))), 1), numbers_width(config)
        self.table, self.orders = self.width - table_width(config), config.taylorseer_derivative + 1
        self.limited = LIMITS + thresholds_width(config)
        limits = ms.Tensor(np.zeros((number * MAX_STEPS, self.limited)), ms.float32)
        self.limits = Parameter(limits, "cache_limits", False)
        self.coordinates = Parameter(ms.Tensor(np.zeros(MAX_STEPS), ms.float32), "cache_coordinates", False)
        self.numbers = Parameter(ms.Tensor(np.zeros(number * self.width), ms.float32), "cache_numbers", False)

    def set(self, limits, coordinates, numbers):
        """Takes over what step_tables() gives, inside the graph or outside.

        By assign, not by set_data: a compiled graph with a branch in it goes on with the old memory after set_data
        (MindSpore 2.7.0, CPU).
        """
        ops.assign(self.limits, limits.reshape(-1, self.limited))
        ops.assign(self.coordinates, coordinates)
        ops.assign(self.numbers, numbers.reshape(-1))

    def first(self, gate):
        """Which row of the limits a gate's first step has."""
        return gate * MAX_STEPS

    def limit(self, gate):
        """What a gate's tallies must stay below at this step, and behind these its rules' scores."""
        step = self.step.read()
        return ops.gather(self.limits, step + self.first(gate) if gate > 0 else step, 0)

    def number(self, gate, place):
        """One of a gate's numbers."""
        return ops.gather(self.numbers, ms.Tensor(gate * self.width + place, ms.int32), 0)

    def row(self, gate):
        """This step's row of a gate's table, a scalar for each order."""
        first = gate * self.width + self.table + self.step.read() * self.orders
        return tuple([ops.gather(self.numbers, first + order, 0) for order in range(self.orders)])

    def x(self):
        """This step's coordinate."""
        return ops.gather(self.coordinates, self.step.read(), 0)
