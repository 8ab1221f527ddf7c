"""What a configuration comes to at the end of the generation, for a few pictures and on all ranks."""

import json
from types import SimpleNamespace

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import json_bytes, write_file
from FBCache_ms.eval.shared.ranks import wait_until_empty


class ClosedLoop:
    """The final latents of some pictures, and how far they lie from the uncached ones.

    Args:
        painter: the drawing.Painter.
        prompts: list of texts; each is drawn from the noise that the Painter gives it.
        steps: N.
        batch: so many are drawn in one call, at most; those of a call have texts of one length.
    """

    def __init__(self, painter, prompts, steps, batch):
        self.pipe = painter.pipe
        given = [painter.arguments(index, prompt, steps) for index, prompt in enumerate(prompts)]
        parts = []
        for each in given:
            if not parts or len(parts[-1]) == batch or shapes(parts[-1][0]) != shapes(each):
                parts.append([])
            parts[-1].append(each)
        noise = [self._noise(part, painter.image_size) for part in parts]
        self.calls = [self._call(part, each, painter.image_size) for part, each in zip(parts, noise)]
        path = []

        def keep(pipe, step, timestep, tensors):
            path.append(to_numpy(tensors["latents"]))
            return {}

        self.uncached = self.latents(CacheConfig.named(UNCACHED), callback_on_step_end=keep)
        # (N + 1, B, S, C): before, between and behind the steps.
        self.path = np.array(
            [np.concatenate(list(map(to_numpy, noise))), *(np.concatenate(path[step::steps]) for step in range(steps))]
        )

    def _noise(self, part, image_size):
        """The latents (B, S, C) that some pictures begin with."""
        channels, dtype = self.pipe.transformer.config.in_channels // 4, part[0]["prompt_embeds"].dtype
        generators = [one["generator"] for one in part]
        noise = self.pipe.prepare_latents(len(part), channels, *image_size, dtype, generators)
        return noise[0] if isinstance(noise, tuple) else noise

    def _call(self, part, noise, image_size):
        """The arguments with which these pictures are drawn at once."""
        from mindspore import ops

        embeds = {name: ops.cat([one[name] for one in part]) for name in shapes(part[0])}
        wanted = self.pipe.latents_shape(SimpleNamespace(pictures=len(part), height=image_size[0], width=image_size[1]))
        if len(wanted) == 4:
            # FLUX.2 is given a grid.
            batch, channels, *grid = wanted
            noise = noise.reshape(batch, *grid, channels).permute(0, 3, 1, 2)
        return {**part[0], **embeds, "latents": noise, "generator": None, "output_type": "latent"}

    @property
    def sigmas(self):
        """The noise levels, (N + 1,)."""
        return self.pipe.scheduler.sigmas.asnumpy()

    def latents(self, config, **more):
        """The final latents (B, S, C) under a CacheConfig."""
        return np.concatenate([to_numpy(self.pipe(**call, **more, cache_config=config)[0]) for call in self.calls])

    def products(self, config):
        """The inner products of what a static span adds at each step of a CacheConfig that computes all, (N, N)."""
        products = 0
        for call in self.calls:
            added = []

            def keep(pipe, step, timestep, tensors):
                added.append(last_residuals(pipe.cache_context).ravel())
                return {}

            self.pipe(**call, callback_on_step_end=keep, cache_config=config)
            products = products + np.array(added) @ np.array(added).T
        return products

    def errors(self, latents):
        """The mean squared error of each picture's latents, (B,); infinite where the forecast ran away."""
        errors = np.square(latents - self.uncached, dtype=np.float64).mean((1, 2))
        return np.where(np.isfinite(errors), errors, np.inf)

    def error(self, latents):
        """The geometric mean of ``errors``: its logarithm is the mean PSNR, but for its sign and unit."""
        return float(np.exp(np.log(self.errors(latents)).mean()))


def last_residuals(context):
    """What the span of a CacheContext added at the last computed step, of each guidance branch, (branches, B, S, D)."""
    return to_numpy(context.derivatives).reshape(context.branches, -1, *context.shape)[:, 0]


class Ledger:
    """What has been found, kept in a folder: a run that was killed goes on, and ranks find the same.

    Every rank goes the same way. What one number depends on is drawn by all, each its share, and the first rank writes
    the number down; the others read it.

    Args:
        folder: of what is found under the same settings.
        ranks: this process's rank and how many there are.
    """

    def __init__(self, folder, ranks):
        self.folder, (self.rank, self.world) = folder, ranks
        folder.mkdir(parents=True, exist_ok=True)

    def found(self, name, make):
        """A value of that name, of JSON: as it was found before, or else made by the first rank."""
        file = self.folder / f"{name}.json"
        if self.rank == 0 and not file.is_file():
            value = make()
            write_file(file, lambda stream: stream.write(json_bytes(value)))
        wait_until_empty(lambda: [file] if not file.is_file() else [])
        return json.loads(file.read_text(encoding="utf-8"))

    def drawn(self, name, draw, configs, make):
        """The value that ``make`` finds in what ``draw`` gives, a list of an array for each of the configurations."""
        files = [self.folder / f"{name}_{index}.npy" for index in range(len(configs))]
        if not (self.folder / f"{name}.json").is_file():
            for index in range(self.rank, len(files), self.world):
                if not files[index].is_file():
                    array = draw(configs[index])
                    write_file(files[index], lambda stream: np.save(stream, array))

        def from_all():
            wait_until_empty(lambda: [file for file in files if not file.is_file()])
            return make([np.load(file) for file in files])

        value = self.found(name, from_all)
        if self.rank == 0:
            for file in files:
                file.unlink(missing_ok=True)
        return value


def shapes(arguments):
    """The shapes of a call's tensors, by name."""
    return {name: value.shape for name, value in arguments.items() if hasattr(value, "asnumpy")}


def to_numpy(tensor):
    """A tensor as a NumPy array of float32."""
    return tensor.float().asnumpy()
