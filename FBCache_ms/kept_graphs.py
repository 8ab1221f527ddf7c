"""Cells with their compiled graphs, kept for as long as they are right and wanted.

A compiled graph never looks again at what it was made from: layers, adapters and their scales are constants of it, and
after Parameter.set_data one that branches computes with neither the old weights nor the new ones (MindSpore 2.7.0 and
2.10.0, CPU).
"""

from collections import OrderedDict

from mindone.peft.tuners.tuners_utils import BaseTunerLayer

MOST = 16
"""How many are kept unless told otherwise."""


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
        parameters = list(transformer.get_parameters())
        key = (key, tuple(map(id, parameters)), constants(transformer))
        if key in self._cells and not self._cells[key].is_true():
            self._cells.pop(key).cell.release()
        if key not in self._cells:
            self._cells[key] = _Kept(make(), parameters)
        self._cells.move_to_end(key)
        for _ in range(len(self._cells) - max(self.most, in_use + 1)):
            _, oldest = self._cells.popitem(last=False)
            oldest.cell.release()
        return self._cells[key].cell

    def settle(self):
        """To be called when the cell that get() gave last has run: only then weights have their addresses."""
        next(reversed(self._cells.values())).settle()


class _Kept:
    """A cell and the Parameters that it was made with, so that no other takes the place of one of them and its id."""

    def __init__(self, cell, parameters):
        self.cell, self.parameters, self.addresses = cell, parameters, None

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
    parameters, (adapters, processors) = list(model.get_parameters()), constants(model)
    now = tuple(map(id, parameters)), adapters and (adapters, scale), processors
    before, _ = getattr(model, "made_of", (now, None))
    if before != now:
        for _, cell in model.cells_and_names():
            cell.compile_cache.clear()
    # With the Parameters, so that no other takes the place of one of them and its id.
    model.made_of = now, parameters


def addresses(parameters):
    """Where the Parameters' values are in memory."""
    return [parameter.data_ptr() for parameter in parameters]


def constants(model):
    """What a graph takes from a model's layers beside their Parameters: adapters, their scales, processors."""
    adapters = tuple(
        (name, tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, layer.merged)
        for name, layer in model.cells_and_names()
        if isinstance(layer, BaseTunerLayer)
    )
    processors = tuple(
        (name, type(processor), str(getattr(processor, "scale", None)))
        for name, processor in getattr(model, "attn_processors", {}).items()
    )
    return adapters, processors
