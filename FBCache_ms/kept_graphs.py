"""Cells with their compiled graphs, kept for as long as they are right and wanted."""

from collections import OrderedDict

from mindone.peft.tuners.tuners_utils import BaseTunerLayer

MOST = 16
"""How many are kept unless told otherwise."""


class KeptGraphs:
    """The most recently used cells that run a transformer, by what they were made for.

    A compiled graph never looks again at what it was made from: layers, adapters and their scales are constants of it,
    and after Parameter.set_data it computes with neither the old weights nor the new ones (MindSpore 2.7.0 and 2.10.0,
    CPU). So a cell is found again only under the layers and scales that it was made with, and none where weights have
    moved in memory.

    A cell that has to go is told so by its release().
    """

    def __init__(self, most=MOST):
        self.most, self._cells, self._addresses = most, OrderedDict(), []

    def __len__(self):
        return len(self._cells)

    def __iter__(self):
        return (cell for cell, _ in self._cells.values())

    def get(self, transformer, key, make, in_use=0):
        """The cell for this transformer as it is and this key; make() makes one.

        The oldest has to go for a new one, but for the last ``in_use``.
        """
        parameters = list(transformer.get_parameters())
        key = (key, tuple(map(id, parameters)), constants(transformer))
        if any(parameter.data_ptr() != address for parameter, address in self._addresses):
            self._drop(len(self._cells))
        self._addresses = []
        if key not in self._cells:
            # With its Parameters, so that no other takes the place of one of them and its id.
            self._cells[key] = make(), parameters
        self._cells.move_to_end(key)
        self._drop(len(self._cells) - max(self.most, in_use + 1))
        return self._cells[key][0]

    def _drop(self, count):
        """Lets so many cells go, the oldest first."""
        for _ in range(count):
            _, (cell, _) = self._cells.popitem(last=False)
            cell.release()

    def settle(self):
        """To be called when a cell has run: only then weights have their addresses."""
        if not self._addresses:
            _, parameters = next(reversed(self._cells.values()))
            self._addresses = [(parameter, parameter.data_ptr()) for parameter in parameters]


def constants(transformer):
    """What a graph takes from a transformer's layers beside their Parameters: adapters, their scales, processors."""
    adapters = tuple(
        (name, tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, layer.merged)
        for name, layer in transformer.cells_and_names()
        if isinstance(layer, BaseTunerLayer)
    )
    processors = tuple(
        (name, type(processor), str(getattr(processor, "scale", None)))
        for name, processor in transformer.attn_processors.items()
    )
    return adapters, processors
