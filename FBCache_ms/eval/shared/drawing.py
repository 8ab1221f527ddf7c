"""Draws many prompts under many settings into folders, and goes on where a killed run ended."""

import sys
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from zlib import crc32

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import branches_of, device_of, guidance_of
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import locked
from FBCache_ms.eval.shared.pictures import PictureFolder, check_numbers
from FBCache_ms.eval.shared.ranks import group_and_groups, is_follower, signs_of_life, wait_until_empty
from FBCache_ms.predict.flops import step_costs
from FBCache_ms.runtime.checkpoint import family_of, fingerprint, image_size, image_unit

UNCACHED_EVERY = 4
"""The uncached run is timed beside every so many-th picture that a rank draws under another setting."""

KEPT_PROMPTS = 64
"""How many prompts' embeddings are kept; those of FLUX.1-dev take 4 MB each."""


@dataclass(frozen=True)
class Setting:
    """How a prompt is drawn: a CacheConfig, the number of steps, compiled or operator by operator."""

    config: CacheConfig
    steps: int
    graph: bool = True

    @classmethod
    def named(cls, cache, steps, graph=True):
        """The Setting of a tag, a preset or a preset file."""
        return cls(CacheConfig.named(cache), steps, graph)

    @property
    def folder(self):
        """A name for its pictures' folder; a long tag ends in its checksum."""
        tag = str(self.config)
        short = tag if len(tag) <= 120 else f"{tag[:110]}-{crc32(tag.encode()):08x}"
        return f"{short}_steps{self.steps}" + ("" if self.graph else "_pynative")


def named_settings(tags, steps):
    """The table rows that a list of tags asks for, {name: Setting}, in the names of the field's tables."""
    names = {}
    for tag in tags:
        config = CacheConfig.named(tag)
        plain = config == CacheConfig(config.residual_diff_threshold)
        name = f"FBCache({config.residual_diff_threshold:g})" if plain else tag
        names[f"{name} + Graph Mode"] = Setting(config, steps)
    return {"Baseline (Graph Mode)": Setting.named(UNCACHED, steps), **names}


class Painter:
    """Draws the prompts of a run: prompt number i has noise of its own, the same under every setting.

    Args:
        args: a program's arguments, with what add_drawing_options gives. The model is loaded once it is needed.

    Raises ValueError for a device or a dtype that cannot be.
    """

    def __init__(self, args):
        import mindone

        import mindspore as ms

        self.args = args
        self.device = device_of(args)
        self.image_size = list(args.image_size or 2 * [image_size(args.ckpt)])
        self.common = {
            "checkpoint": args.ckpt.resolve().name,
            "weights": fingerprint(args.ckpt),
            "seed": args.seed,
            "image_size": self.image_size,
            "guidance_scale": args.guidance_scale,
            "device": self.device.name,
            "dtype": self.device.dtype,
            "jit_level": self.device.jit_level,
            "lazy_inline": self.device.lazy_inline,
            "mindspore": ms.__version__,
            "mindone": mindone.__version__,
            "FBCache_ms": version("FBCache_ms"),
            "quantize": args.quantize and args.quantize.to_dict(),
        }
        if branches_of(args) == 2:
            self.common.update(negative_prompt=args.negative_prompt, true_cfg_scale=args.true_cfg_scale)
        self._pipe, self._warm = None, set()
        self._embeds = lru_cache(KEPT_PROMPTS)(lambda prompt: self.pipe.embeddings(prompt))

    def resized(self, image_size):
        """A Painter of pictures of another height and width, with the same model in memory."""
        self.pipe
        other = copy(self)
        other.image_size, other.common = image_size, {**self.common, "image_size": image_size}
        other._warm = set()
        return other

    def folder(self, path, setting):
        """The PictureFolder of a setting, in a folder of its own within ``path``."""
        own = {"config": str(setting.config), "steps": setting.steps, "graph": setting.graph}
        return PictureFolder(path / setting.folder, {**self.common, **own})

    @property
    def pipe(self):
        """The pipeline."""
        if self._pipe is None:
            from FBCache_ms.runtime.imports import quick_imports

            with quick_imports():
                from mindone.diffusers.utils import logging

                import FBCache_ms

                kind = getattr(FBCache_ms, family_of(self.args.ckpt).PIPELINE)
            logging.disable_progress_bar()
            self._pipe = kind.from_pretrained(
                str(self.args.ckpt), device=self.device, quantize_config=self.args.quantize
            )
            self._pipe.set_progress_bar_config(disable=True)
            reason = self._pipe.why_not_cached()
            if reason:
                raise ValueError(f"checkpoint {self.args.ckpt} cannot run with the cache: {reason}")
            if self.is_shared:
                from FBCache_ms.runtime.parallel import ContextParallelConfig

                self._pipe.enable_parallelism(
                    ContextParallelConfig(self.args.context_parallel, self.args.context_parallel_scheme)
                )
        return self._pipe

    @property
    def is_shared(self):
        """Whether several processes draw each picture together."""
        return getattr(self.args, "context_parallel", 1) > 1

    def follow(self):
        """Draws what the process that stands for this one draws, until that is done."""
        while True:
            told = self.pipe.sharing.tell()
            if told is None:
                return
            self.image_size = told["image_size"]
            self._draw(told["index"], told["prompt"], Setting.named(told["cache"], told["steps"], told["graph"]))

    def dismiss(self):
        """Lets those go that follow; nothing is drawn from then on."""
        if self.is_shared:
            self.pipe.sharing.dismiss()

    @property
    def image_tokens(self):
        """How many tokens a picture is to the transformer."""
        unit = image_unit(self.args.ckpt)
        return self.image_size[0] // unit * (self.image_size[1] // unit)

    def _operations(self, text_tokens):
        config, branches = self.pipe.transformer.config, branches_of(self.args)
        return step_costs(config, branches, self.image_tokens, text_tokens).total

    def arguments(self, index, prompt, steps):
        """What any pipeline with these modules is to be called with to draw prompt number ``index``."""
        import numpy as np

        negative = self._embeds(self.args.negative_prompt) if branches_of(self.args) == 2 else {}
        return {
            **self._embeds(prompt),
            **{f"negative_{name}": value for name, value in negative.items()},
            **guidance_of(self.args),
            "height": self.image_size[0],
            "width": self.image_size[1],
            "num_inference_steps": steps,
            "generator": np.random.default_rng((self.args.seed, index)),
            "output_type": "np",
        }

    def draw(self, index, prompt, setting):
        """A picture (H, W, 3) of uint8, the facts about it and the seconds it took, warm.

        A graph's first drawing in this process is done twice, and "compile" tells the first one's compilation.
        """
        graph = setting.config.structure, setting.graph
        if graph in self._warm:
            return self._draw(index, prompt, setting)
        self._warm.add(graph)
        compilation = self._draw(index, prompt, setting)[2].get("compile", 0.0)
        picture, facts, seconds = self._draw(index, prompt, setting)
        return picture, facts, {**seconds, "compile": compilation}

    def _draw(self, index, prompt, setting):
        import numpy as np

        pipe = self.pipe
        if self.is_shared and not is_follower(self.args.context_parallel):
            drawn = {"index": index, "prompt": prompt, "image_size": self.image_size}
            pipe.sharing.tell({**drawn, "cache": str(setting.config), "steps": setting.steps, "graph": setting.graph})
        arguments = self.arguments(index, prompt, setting.steps)
        pipe.use_graph_mode = setting.graph
        reset_peak(self.device.name)
        picture = pipe(**arguments, cache_config=setting.config)[0][0]
        check_numbers(pipe, setting.config, f"the picture of prompt {index}")
        stats = pipe.cache_stats
        facts = {
            "reused": [bool(reused) for reused in stats.reused],
            "residual_diffs": stats.residual_diffs,
            "skipped": stats.skipped,
            "tflops": self._operations(arguments["prompt_embeds"].shape[1])
            * setting.steps
            * (1 - stats.skipped)
            / 1e12,
            "cache_bytes": pipe.cache_bytes,
        }
        seconds = {name: pipe.seconds[name] for name in ("compile", "denoise", "total")}
        return (picture * 255).round().astype(np.uint8), facts, {**seconds, "peak_bytes": peak_bytes(self.device.name)}


@contextmanager
def session(args):
    """A Painter, this process's rank and how many there are, while no other run is let into --save_path.

    A process that another one stands for draws with that one, and ends here.
    """
    shared = getattr(args, "context_parallel", 1)
    ranks = group_and_groups(shared)
    if is_follower(shared):
        Painter(args).follow()
        sys.exit(0)
    with locked(args.save_path, ranks[0]), signs_of_life(args.save_path, ranks):
        painter = Painter(args)
        yield painter, ranks
        painter.dismiss()


def draw_and_finish(args, prompts, settings, finish, name="pictures", **how):
    """Draws the prompts under the settings, with all ranks, and on the first one calls ``finish(painter, folders)``.

    The pictures lie in the folder ``name`` of --save_path; ``how`` is what draw_missing takes.
    """
    with session(args) as (painter, ranks):
        folders = {setting: painter.folder(args.save_path / name, setting) for setting in settings}
        draw_missing(painter, folders, prompts, ranks, **how)
        # MindSpore's CPU gives a collective up whose ranks do not meet within a minute.
        painter.dismiss()
        if ranks[0] == 0:
            wait_for_all(folders, len(prompts))
            finish(painter, folders)


def share(ranks, prompts):
    """The numbers of the prompts that this process draws, of a rank and how many there are."""
    return range(ranks[0], len(prompts), ranks[1])


def draw_missing(painter, folders, prompts, ranks=(0, 1), in_turn=False, uncached_beside=True, bar=None):
    """Draws this rank's share of what is missing, a picture a prompt and folder.

    Args:
        painter: the Painter.
        folders: {Setting: its PictureFolder}.
        prompts: list of texts.
        ranks: this process's rank and how many there are; prompt i is drawn by rank i % world.
        in_turn: it is time that matters: every setting for one prompt before the next one.
        uncached_beside: otherwise, whether the uncached run is timed beside every so many-th picture.
        bar: a tqdm that counts these pictures among others; otherwise they have one of their own.

    Raises OSError if a folder holds pictures of other prompts or cannot be written.
    """
    from tqdm import tqdm

    rank, world = ranks
    own = share(ranks, prompts)
    missing = {setting: set(folder.missing(prompts)) for setting, folder in folders.items()}
    work = [(setting, index) for setting in folders for index in own if index in missing[setting]]
    if in_turn:
        work.sort(key=lambda pair: pair[1])
    done = len(folders) * len(own) - len(work)
    name = "pictures" if world == 1 else f"pictures of rank {rank}"
    if bar is None:
        work = tqdm(work, desc=name, initial=done, total=done + len(work), disable=not work)
    else:
        # Both, so that what lies there already does not count as fast.
        bar.initial, bar.n = bar.initial + done, bar.n + done
    for setting, index in work:
        picture, facts, seconds = painter.draw(index, prompts[index], setting)
        uncached = Setting.named(UNCACHED, painter.args.num_inference_steps)
        timed_beside = uncached_beside and not in_turn and setting != uncached
        if timed_beside and index // world % UNCACHED_EVERY == 0:
            seconds["uncached"] = painter.draw(index, prompts[index], uncached)[2]["denoise"]
        folders[setting].add(index, prompts[index], picture, facts, seconds, rank)
        if bar is not None:
            bar.update()


def wait_for_all(folders, number):
    """Waits for the pictures of the other ranks. Raises OSError if a rank is gone."""
    left = [folder.file(index) for folder in folders.values() for index in range(number)]

    def missing():
        left[:] = [picture for picture in left if not picture.is_file()]
        return left

    wait_until_empty(missing)


def reset_peak(device):
    """Begins to watch the peak of memory anew."""
    import mindspore as ms

    if device == "Ascend":
        ms.hal.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        pass  # Where the kernel does not offer it, the peak is that of the process's whole life.


def peak_bytes(device):
    """The peak of memory since reset_peak: of the NPU, or resident of this process on a CPU."""
    import resource

    import mindspore as ms

    if device == "Ascend":
        return ms.hal.max_memory_allocated()
    try:
        with open("/proc/self/status") as stream:
            lines = dict(line.split(":", 1) for line in stream)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
