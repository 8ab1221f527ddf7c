"""Cells with their compiled graphs, kept for as long as they are right and wanted.

A compiled graph never looks again at what it was made from: layers, their methods, hooks and attributes, adapters and
their scales are constants of it, and after Parameter.set_data one that branches computes with neither the old weights
nor the new ones (MindSpore 2.7.0 and 2.10.0, CPU).
"""

from collections import OrderedDict
from weakref import WeakKeyDictionary

from mindspore import nn

from ..models.mindones import HOOKS

KEPT_GRAPHS = 16
"""How many are kept unless told otherwise."""

VALUES = {type(None), bool, int, float, str}
"""Types of attributes that are compared by value, and not by which object they are."""

OF_COMPILATION = {
    "__compile_cell_hook__",
    "__parse_method__",
    "_func_graph_flags",
    "current_phase",
    "sequence_modified",
}
"""Attributes that MindSpore gives a cell where it compiles it."""

OF_EVERY_CELL = frozenset(vars(nn.Cell())) | OF_COMPILATION | {"init_tensor"}
"""Attributes that say nothing of what a cell computes, but for those that constants_of names; nn.Embedding keeps what
its weight started from."""

_MADE_OF = WeakKeyDictionary()
"""What a model was made of when drop_stale_graphs saw it last."""


class KeptGraphs:
    """The most recently used cells that run a transformer, by what they were made for.

    A cell is found again only under the layers and scales that it was made with, and with its weights where they were
    in memory when it last ran. One that has to go is told so by its release().
    """

    def __init__(self, most=KEPT_GRAPHS):
        self.most, self._cells, self._stale = most, OrderedDict(), []

    def __deepcopy__(self, memo):
        """A copy of what they run finds none of its graphs here."""
        return KeptGraphs(self.most)

    def __len__(self):
        return len(self._cells)

    def __iter__(self):
        return (kept.cell for kept in self._cells.values())

    def get(self, transformer, key, make, in_use=0):
        """The cell for this transformer as it is and this key; make() makes one.

        The oldest has to go for a new one, but for the last ``in_use``. One whose weights have moved goes with the next
        call, since what it knows of its generation may still be wanted.
        """
        while self._stale:
            self._stale.pop().cell.release()
        state, objects = made_of(transformer)
        key = key, state
        if key in self._cells and not self._cells[key].is_true():
            self._stale.append(self._cells.pop(key))
        if key not in self._cells:
            idle = set(map(id, transformer.cached_model.idle() if hasattr(transformer, "cached_model") else ()))
            weights = [weight for weight in transformer.get_parameters() if id(weight) not in idle]
            self._cells[key] = _Kept(make(), weights, objects)
        self._cells.move_to_end(key)
        for _ in range(len(self._cells) - max(self.most, in_use + 1)):
            _, oldest = self._cells.popitem(last=False)
            oldest.cell.release()
        return self._cells[key].cell

    @property
    def last(self):
        """The cell that get() gave last, None before."""
        return next(reversed(self._cells.values())).cell if self._cells else None

    def clear(self):
        """Lets all of them go."""
        for kept in (*self._cells.values(), *self._stale):
            kept.cell.release()
        self._cells.clear()
        self._stale.clear()

    def settle(self):
        """To be called when the cell that get() gave last has run: only then weights have their addresses."""
        next(reversed(self._cells.values())).settle()


class _Kept:
    """A cell and what it was made with, so that no other object takes the place of one of these and its id."""

    def __init__(self, cell, parameters, objects):
        self.cell, self.parameters, self.objects, self.addresses = cell, parameters, objects, None

    def is_true(self):
        """Whether all weights are where they were when it ran; one that has not run is not to be trusted."""
        # One by one: MindSpore prints an error for each that is nowhere.
        addresses = zip(self.parameters, self.addresses or ())
        return self.addresses is not None and all(parameter.data_ptr() == there for parameter, there in addresses)

    def settle(self):
        self.addresses = self.addresses or [parameter.data_ptr() for parameter in self.parameters]


def drop_stale_graphs(model):
    """Lets a model that MindSpore compiles by itself do so anew, if its layers, adapters or weights are others.

    MindSpore finds a cell's graph again by the cell and its inputs alone. It sees weights that set_data replaces, but
    not those that set_dtype does. No model, None, has no graphs.
    """
    if model is None:
        return
    now, objects = made_of(model)
    before, _ = _MADE_OF.get(model, (now, None))
    if before != now or any(is_nowhere(cell) for _, cell in model.cells_and_names() if cell.compile_cache):
        drop_graphs(model)
    # A model that is kept for its own sake would never go.
    _MADE_OF[model] = now, [each for each in objects if each is not model]


def is_nowhere(cell):
    """Whether the first weight of a cell that has run is not in the device's memory any more."""
    return any(parameter.data_ptr() == 0 for parameter in list(cell.get_parameters())[:1])


def drop_graphs(model):
    """Lets a model, and each of its layers that is compiled by itself, compile anew."""
    for _, cell in model.cells_and_names():
        cell.compile_cache.clear()


def made_of(model):
    """What a graph takes from a model as constants, to be compared, and all objects that are compared by their id.

    The latter have to be kept as long as the former.
    """
    objects = []

    def told(value):
        """A value, or the id of an object, or those of a collection's entries."""
        if type(value) in VALUES:
            return value
        if isinstance(value, (list, tuple)):
            return tuple([told(each) for each in value])
        if isinstance(value, dict):
            return tuple([(name, told(each)) for name, each in value.items()])
        objects.append(value)
        return id(value)

    state, kinds = constants_of(model, told)
    # Methods may be replaced in a class, too.
    state += [told(each) for base in bases_of(kinds) for each in vars(base).values()]
    return tuple(state), objects


def constants_of(model, told):
    """What a graph takes from a model's layers as constants, each as told() has it, and the layers' classes."""
    state, kinds, layers = [], {}, [model]
    while layers:
        layer = layers.pop()
        own, kinds[type(layer)] = getattr(layer, "__dict__", {}), None
        state += told(layer), type(layer)
        for name in sorted(own.keys() - OF_EVERY_CELL):
            state += name, told(own[name])
        if isinstance(layer, nn.Cell):
            state += (layer.training, layer.mixed_precision_type, *layer._cells)
            state += [told(own[hooks]) for hooks in HOOKS if own[hooks]]
            state += [told(parameter) for parameter in layer._params.values()]
            layers += layer._cells.values()
        if "processor" in own:
            layers.append(layer.processor)
    return state, list(kinds)


def bases_of(kinds):
    """Classes and what they inherit from, but for what every cell does."""
    return dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in nn.Cell.__mro__)
