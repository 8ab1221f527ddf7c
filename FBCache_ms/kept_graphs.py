"""Cells with their compiled graphs, kept for as long as they are right and wanted.

A compiled graph never looks again at what it was made from: layers, their methods, hooks and attributes, adapters and
their scales are constants of it, and after Parameter.set_data one that branches computes with neither the old weights
nor the new ones (MindSpore 2.7.0 and 2.10.0, CPU).
"""

from collections import OrderedDict
from itertools import islice

from mindone.peft.tuners.tuners_utils import BaseTunerLayer

from mindspore import nn

from .models.mindones import HOOKS

MOST = 16
"""How many are kept unless told otherwise."""

VALUES = {type(None), bool, int, float, str}

MINDSPORES = dict.fromkeys([*vars(nn.Cell()), "made_of"])
"""Attributes of a cell that say nothing of what it computes, but for those that made_of names, in their order."""


class KeptGraphs:
    """The most recently used cells that run a transformer, by what they were made for.

    A cell is found again only under the layers and scales that it was made with, and with its weights where they were
    in memory when it last ran. One that has to go is told so by its release().
    """

    def __init__(self, most=MOST):
        self.most, self._cells = most, OrderedDict()

    def __len__(self):
        return len(self._cells)

    def __iter__(self):
        return (kept.cell for kept in self._cells.values())

    def get(self, transformer, key, make, in_use=0):
        """The cell for this transformer as it is and this key; make() makes one.

        The oldest has to go for a new one, but for the last ``in_use``.
        """
        state, objects = made_of(transformer)
        key = key, state
        if key in self._cells and not self._cells[key].is_true():
            self._cells.pop(key).cell.release()
        if key not in self._cells:
            self._cells[key] = _Kept(make(), list(transformer.get_parameters()), objects)
        self._cells.move_to_end(key)
        for _ in range(len(self._cells) - max(self.most, in_use + 1)):
            _, oldest = self._cells.popitem(last=False)
            oldest.cell.release()
        return self._cells[key].cell

    def settle(self):
        """To be called when the cell that get() gave last has run: only then weights have their addresses."""
        next(reversed(self._cells.values())).settle()


class _Kept:
    """A cell and what it was made with, so that no other object takes the place of one of these and its id."""

    def __init__(self, cell, parameters, objects):
        self.cell, self.parameters, self.objects, self.addresses = cell, parameters, objects, None

    def is_true(self):
        """Whether all weights are where they were when it ran; one that has not run is not to be trusted."""
        return self.addresses is not None and self.addresses == addresses(self.parameters)

    def settle(self):
        self.addresses = self.addresses or addresses(self.parameters)


def drop_stale_graphs(model, scale=None):
    """Lets a model that MindSpore compiles by itself do so anew, if its layers or adapters are not as they were.

    MindSpore finds a cell's graph again by the cell and its inputs alone. ``scale`` is what its adapters will be given;
    no model, None, has no graphs.
    """
    if model is None:
        return
    state, objects = made_of(model)
    adapted = any(isinstance(layer, BaseTunerLayer) for layer in objects)
    now = state, scale if adapted else None
    before, _ = getattr(model, "made_of", (now, None))
    if before != now:
        for _, cell in model.cells_and_names():
            cell.compile_cache.clear()
    model.made_of = now, objects


def addresses(parameters):
    """Where the Parameters' values are in memory."""
    return [parameter.data_ptr() for parameter in parameters]


def made_of(model):
    """What a graph takes from a model as constants, to be compared, and all objects that are compared by their id.

    The latter have to be kept as long as the former.
    """
    state, objects, kinds, layers = [], [], {}, [model]

    def frozen(value):
        if type(value) in VALUES:
            return value
        if isinstance(value, (list, tuple)):
            return tuple([frozen(each) for each in value])
        if isinstance(value, dict):
            return tuple([(name, frozen(each)) for name, each in value.items()])
        objects.append(value)
        return id(value)

    while layers:
        layer = layers.pop()
        own, kinds[type(layer)] = vars(layer), None
        objects.append(layer)
        state += [id(layer), type(layer)]
        for name, value in islice(own.items(), len(MINDSPORES) - 1, None):
            if name not in MINDSPORES:
                state += [name, value if type(value) in VALUES else frozen(value)]
        if isinstance(layer, nn.Cell):
            state += [layer.training, layer.mixed_precision_type, *layer._cells]
            state += [frozen(own[hooks]) for hooks in HOOKS if own[hooks]]
            state += [frozen(parameter) for parameter in layer._params.values()]
            layers += layer._cells.values()
            if "processor" in own:
                layers.append(layer.processor)
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in nn.Cell.__mro__)
    state += [frozen(each) for base in bases for each in vars(base).values()]
    return tuple(state), objects
