"""What a generation's denoise loop is called with."""

from inspect import signature

import numpy as np

import mindspore as ms
from mindspore import ops

from ..models import family
from ..rules.schedules import MAX_STEPS
from .cached_transformer import graph_input


class LoopInputs:
    """What a generation's denoise loop is called with, but for the latents and the steps.

    Args:
        transformer: mindone's.
        branches: for each guidance branch the arguments of the transformer's construct, by name.
        true_cfg_scale: a number.
        scheduler: whose noise levels the loop takes.
        numbers: what gates.step_tables makes of the CacheConfig.
        sharing: the Sharing of pictures with other devices, or None.

    Raises ValueError if the branches' embeddings are not of one shape, or as the family's graph_inputs does, or for one
    branch where ``sharing`` wants two.
    """

    def __init__(self, transformer, branches, true_cfg_scale, scheduler, numbers, sharing=None):
        self.sharing = sharing
        self.transformer, self.file, self.given = transformer, family(transformer), branches
        self.pair = None if sharing is None else sharing.pair
        if self.pair is not None and len(branches) == 1:
            raise ValueError(
                "cfg_parallel shares a prompt and a negative prompt among devices: give a negative_prompt and a "
                "true_cfg_scale above 1"
            )
        self.branches = 1 if self.pair else len(branches)
        self._constants = ms.Tensor(true_cfg_scale, ms.float32), padded(scheduler.timesteps.asnumpy(), MAX_STEPS)
        self._numbers = tuple(map(ms.Tensor, numbers))
        self._inputs = self._gathered()
        self.text_len = self._inputs["encoder_hidden_states"].shape[-2]
        self.whole_text = self.text_len * (1 if sharing is None else sharing.ranks.number)
        self.follow(scheduler)

    @property
    def embeds(self):
        """The positive prompt's embeddings (B, T, E), which a callback may replace."""
        return self.given[0]["encoder_hidden_states"]

    @embeds.setter
    def embeds(self, embeds):
        if embeds is not self.embeds:
            self.given[0] = {**self.given[0], "encoder_hidden_states": embeds}
            self._inputs = self._gathered()

    def follow(self, scheduler):
        """Takes over the scheduler's noise levels as they are now."""
        self._sigmas = padded(scheduler.sigmas.asnumpy(), MAX_STEPS + 1)

    def _gathered(self):
        """The model's inputs by name, those that each branch has of its own stacked."""
        common = dict.fromkeys(signature(self.file.KIND.construct).parameters)
        common["longest"] = max(given["encoder_hidden_states"].shape[1] for given in self.given)
        branches = [self.file.graph_inputs(self.transformer, {**common, **given}) for given in self.given]
        shapes = [each["encoder_hidden_states"].shape for each in branches]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"negative_prompt's embeddings are {shapes[1]}, the prompt's {shapes[0]}; they have to be of one shape"
            )
        if self.pair is not None:
            branches = [branches[self.pair.rank]]
        inputs = {name: value for name, value in branches[0].items() if value is not None}
        for name in set(self.file.BY_BRANCH) & set(inputs):
            inputs[name] = by_branch([each[name] for each in branches])
        return graph_input(inputs if self.sharing is None else self.sharing.inputs(inputs))

    def whole(self, latents):
        """The latents with the tokens behind them that no step moves."""
        still = self.given[0].get("still")
        return latents if still is None else ops.concat((latents, still), 1)

    def own(self, latents):
        """What of these this process has."""
        latents = self.whole(latents)
        return latents if self.sharing is None else self.sharing.latents(latents)

    def all_of(self, own):
        """All of them again."""
        return own if self.sharing is None else self.sharing.whole(own)

    def __call__(self, latents, start, stop):
        """The loop's arguments for the steps from start to stop - 1."""
        bounds = ms.Tensor(start, ms.int32), ms.Tensor(stop, ms.int32)
        return (graph_input(self.own(latents)), self._inputs, *self._constants, self._sigmas, *bounds, *self._numbers)


def by_branch(values):
    """Tensors, or tuples or dictionaries of them, one for each branch, stacked on a leading axis."""
    if isinstance(values[0], dict):
        return {name: by_branch([value[name] for value in values]) for name in values[0]}
    return ops.stack(values) if isinstance(values[0], ms.Tensor) else tuple(map(ops.stack, zip(*values)))


def padded(values, length):
    """A float32 vector, filled with zeros up to ``length``."""
    return ms.Tensor(np.pad(values, (0, length - len(values))), ms.float32)
