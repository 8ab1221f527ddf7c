"""What apply_cache_on_pipe puts in the places of a pipeline's transformer and scheduler: a cached step, one graph."""

import copy
from contextlib import contextmanager
from functools import lru_cache, wraps
from inspect import signature
from pathlib import Path
from threading import RLock, get_ident
from weakref import ref

from mindone.diffusers.models.modeling_outputs import Transformer2DModelOutput
from mindone.diffusers.utils import logging, scale_lora_layers
from mindone.peft.tuners.tuners_utils import BaseTunerLayer

import mindspore as ms
from mindspore import nn

from ..cache.context import CacheContext
from ..cache.gates import deciding
from ..cache.stats import BRANCHES, CacheStats, skipped_share
from ..cache.step import cached_call
from ..config import CacheConfig
from ..models import family, foreign_transformer
from ..rules.schedules import progress_of
from ..runtime.checkpoint import TINY_FLUX
from ..runtime.device import current_device, graph_mode
from ..runtime.kept_graphs import KeptGraphs
from ..runtime.parallel import digest, sharing_of, unshare, why_not_shared

logger = logging.get_logger(__name__)

WHAT_ALL_TAKE = "hidden_states", "timestep", "return_dict"
"""Arguments that every family's construct has."""


class StandIn:
    """What takes an object's place: it gives and takes all attributes that are not its own as that object's."""

    def __init__(self, original, **own):
        self.__dict__.update(own, original=original)

    def __getattr__(self, name):
        return getattr(self.original, name)

    def __setattr__(self, name, value):
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.original, name, value)

    # A copy is one of what it stands for: the cache is one pipeline's.

    def __copy__(self):
        return copy.copy(self.original)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol):
        return self.original.__reduce_ex__(protocol)

    @property
    def __class__(self):
        # mindone asks so for a component's kind, where it loads adapters or saves.
        return type(self.original)


class CachedTransformer(StandIn):
    """A transformer whose calls go through the cache: for each shape a cached step that shares its weights.

    Args:
        transformer: mindone's, of a family that models/ has.
        config: the CacheConfig; another one may take its place between generations.
        pipe: the pipeline that it is in.
        most: how many shapes' graphs and buffers are kept.
    """

    def __init__(self, transformer, config, pipe, most):
        super().__init__(
            transformer,
            cache_settings=config,
            pipe=ref(pipe),
            steps=KeptGraphs(most),
            chosen={},
            active={},
            branch=None,
            calls=0,
            sigmas=None,
            thread=None,
            sharing=None,
        )

    @property
    def cache_stats(self):
        """The CacheStats of the last generation, None before the first.

        Guidance branches whose texts are of other lengths may each have a cached step of their own.
        """
        if not self.active:
            return None
        # A branch that was not called has no trace in the other's step either.
        last = next(reversed(self.active.values()))
        contexts = [self.active.get(branch, last).cache_context for branch in BRANCHES]
        devices = 1 if self.sharing is None else self.sharing.ranks.number
        shapes = [(context.shape[0], context.shape[1] * devices, context.text_len * devices) for context in contexts]
        costs = [costs_of_step(self.original, *shape) for shape in shapes]
        cond, uncond = (context.traces()[branch] for branch, context in enumerate(contexts))
        skipped = skipped_share(deciding(contexts[0].gates), (cond, uncond), costs)
        return CacheStats(cond, skipped, CacheStats(uncond) if uncond[0].reused else None)

    def cached_scheduler(self):
        """The pipeline's scheduler; one that has been put there since is told of this cache.

        Raises ValueError if there is no such pipeline any more.
        """
        pipe = self.pipe()
        if pipe is None:
            raise ValueError(
                "Invalid cache state: the pipeline that this transformer's cache was put into is gone; "
                "call apply_cache_on_pipe with the one that it is in now"
            )
        told = pipe.scheduler
        if type(told) is not CachedScheduler or told.cached is not self:
            plain = told.original if type(told) is CachedScheduler else told
            told = pipe.__dict__["scheduler"] = CachedScheduler(plain, self)
            self.begin_generation()
        return told

    def enable_parallelism(self, config):
        """Shares each call among several devices; see WholeLoop.enable_parallelism.

        Raises ValueError for cfg_parallel: the pipeline calls for one prompt behind the other.
        """
        self.disable_parallelism()
        if getattr(config, "cfg_parallel", False):
            raise ValueError("cfg_parallel needs a pipeline of FBCache_ms, whose loop has both prompts at once")
        self.sharing = sharing_of(self.original, config)

    def disable_parallelism(self):
        """Runs each call on one device again."""
        unshare(self.original)
        self.sharing = None

    def begin_generation(self, sigmas=None):
        """The scheduler's word that a new generation begins, with noise levels of the caller's own if any."""
        self.calls, self.chosen, self.sigmas, self.thread = 0, {}, sigmas, get_ident()

    def end_step(self):
        """The scheduler's word that a step is done."""
        self.calls = 0

    @contextmanager
    def cache_context(self, name):
        """mindone's name for a guidance branch, "cond" or "uncond"; where none is given, the order of calls tells."""
        self.branch = name
        try:
            yield
        finally:
            self.branch = None

    def __call__(self, hidden_states, *args, **kwargs):
        reason, not_shared = foreign_transformer(self.original), why_not_shared(self.original, self.sharing)
        if not_shared or self.sharing is not None and reason:
            raise ValueError(not_shared or f"{reason}: such a call cannot be shared by several devices")
        if reason:
            logger.warning(f"{reason}: this call runs without the cache")
            return self.original(hidden_states, *args, **kwargs)
        scheduler = self.cached_scheduler()
        if self.thread != get_ident():
            raise ValueError(
                "Invalid cache state: another thread has begun a generation with this pipeline; let threads take turns"
            )
        if self.calls == len(BRANCHES):
            raise ValueError(f"Invalid cache state: more than {len(BRANCHES)} calls of the transformer in one step")
        branch = self.branch or BRANCHES[self.calls]
        self.calls += 1
        latents, timestep, inputs, constants, return_dict = self.bind(hidden_states, *args, **kwargs)
        with turn(self), graph_mode(True):
            if not self.chosen:
                self.active = {}
            if self.sharing is not None:
                latents, inputs = self.shared(latents, timestep, inputs, begins=branch not in self.active)
            step = self.active[branch] = self.step_for(latents, inputs["encoder_hidden_states"].shape[1], scheduler)
            with step.cache_context(branch):
                output = step(latents, timestep, inputs, constants)
            self.steps.settle()
            if self.sharing is not None:
                output = self.sharing.whole(output)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def bind(self, *args, **kwargs):
        """A call's arguments, by the names that the transformer's construct has for them, as the cached step's."""
        file = family(self.original)
        call = signature(file.KIND.construct).bind(self.original, *args, **kwargs)
        call.apply_defaults()
        _, latents, timestep, return_dict = map(call.arguments.pop, ("self", *WHAT_ALL_TAKE))
        constants = {name: call.arguments.pop(name) for name in file.CONSTANTS}
        inputs = file.graph_inputs(self.original, call.arguments)
        inputs = graph_input({name: value for name, value in inputs.items() if value is not None})
        return graph_input(latents), graph_input(timestep), inputs, constants, return_dict

    def shared(self, latents, timestep, inputs, begins):
        """This rank's share of a call. Raises ValueError where a branch begins and ranks were given other things."""
        if begins:
            settings = str(self.cache_settings), timestep.float().asnumpy()
            self.sharing.agree_on_inputs([inputs], settings=settings, shapes=latents.shape, latents=digest(latents))
        return graph_input(self.sharing.latents(latents)), graph_input(self.sharing.inputs(inputs))

    def step_for(self, latents, text_len, scheduler):
        """The cached step for these shapes; the first call of a generation resets it."""
        batch_size, seq_len, _ = latents.shape
        key = (batch_size, seq_len, text_len, latents.dtype)
        step, layers, strengths = self.chosen.get(key, (None, (), ()))
        # All that a callback may change is not looked for in each step: that takes as long as a reused one.
        if step is not None and strengths == strengths_of(layers):
            return step
        begin, whole = scheduler.begin_index or 0, len(scheduler.timesteps)
        steps, sigmas = whole - begin, scheduler.sigmas.asnumpy()[begin:]
        settings, transformer = for_steps(self.cache_settings, steps), self.original
        check_structure(settings, transformer)
        warn_of_learnt(settings, transformer)

        def make():
            over_ranks = None if self.sharing is None else self.sharing.over_ranks(transformer)
            context = context_for(transformer, settings, latents, text_len, len(BRANCHES), steps, sigmas, over_ranks)
            step = CachedStep(transformer, context)
            current_device().prepare(step, transformer)
            return step

        trace = None if step is None else step.cache_context.trace()
        step = self.steps.get(transformer, (*key, settings.structure), make, in_use=len(self.chosen))
        step.cache_context.forget()
        step.cache_context.configure(settings, steps, sigmas, progress_of(self.sigmas, whole)[begin:])
        if trace is not None:
            step.cache_context.go_on(trace)
        layers = adapters_of(transformer)
        self.chosen[key] = step, layers, strengths_of(layers)
        return step


class CachedScheduler(StandIn):
    """A pipeline's scheduler that tells the cache of generations and of steps."""

    def __init__(self, scheduler, cached):
        super().__init__(scheduler, cached=cached)

    @property
    def set_timesteps(self):
        """The scheduler's own method, whose signature mindone reads, and the cache's word of it."""
        method = self.original.set_timesteps

        @wraps(method)
        def told(*args, **kwargs):
            self.cached.begin_generation(signature(method).bind(*args, **kwargs).arguments.get("sigmas"))
            return method(*args, **kwargs)

        return told

    def step(self, *args, **kwargs):
        self.cached.end_step()
        return self.original.step(*args, **kwargs)


class CachedStep(nn.Cell):
    """One cached call of a transformer, with a CacheContext for one shape that is told of each new generation."""

    def __init__(self, transformer, cache_context):
        super().__init__(auto_prefix=False)
        cache_context.told = True
        self.transformer, self.model, self.cache_context = transformer, transformer.cached_model, cache_context
        for parameter in cache_context.parameters():
            self.insert_param_to_cell(parameter.name, parameter)

    def construct(self, latents, timestep, inputs, constants):
        """The velocity (B, S, C); see step.cached_call."""
        return cached_call(self.model, self.cache_context, latents, timestep, inputs, constants)

    def release(self):
        """Gives the cache's memory back."""
        self.cache_context.release()


def for_steps(config, steps):
    """The CacheConfig for a generation of so many steps: where they are few, switched off, with a warning."""
    if not config.leaves_alone(steps):
        return config
    logger.warning(f"cache off: {steps} steps are few; warmup_steps of 1 or more, or a schedule, put it on ({config})")
    return config.switched_off()


def check_config(config):
    """Raises TypeError unless this is a CacheConfig or None."""
    if config is not None and not isinstance(config, CacheConfig):
        raise TypeError(f"cache_config must be a CacheConfig or None, not {config!r}")


def check_structure(config, transformer):
    """Raises ValueError if a transformer does not have the blocks that a CacheConfig needs, or not as it needs them."""
    config.check_blocks(*transformer.cached_model.stacks)
    for rule in config.rules:
        why_not = getattr(family(transformer), "why_not_probed", None)
        reason = why_not and why_not(transformer, rule.looks_at)
        if reason:
            raise ValueError(f"gate {config.gate!r} looks at what modulates the first block: {reason}")
    if config.refreshes:
        why_not = getattr(family(transformer), "why_not_refreshed", None)
        reason = why_not(transformer) if why_not else f"{type(transformer).__name__} has no block that does"
        if reason:
            raise ValueError(f"gate {config.gate!r} keeps attention and runs MLPs of chosen tokens: {reason}")


def warn_of_learnt(config, transformer):
    """Warns, once for each, of a schedule learnt on, or of numbers fitted to, another model than this one."""
    kinds = [kind.__name__ for kind in type(transformer).__mro__]
    if config.learnt_from and not is_embedded(transformer):
        _warn(f"{config.learnt_from} was learnt on the embedded checkpoint; fbcache learn makes one for another")
    for name, kind in config.fitted_defaults.items():
        if kind not in kinds:
            _warn(f"{name} are those that were fitted to a {kind}; this is a {kinds[0]}")


@lru_cache(maxsize=None)
def _warn(line):
    logger.warning(line)


def is_embedded(transformer):
    """Whether a transformer was loaded from the embedded checkpoint, as its config tells."""
    folder = Path(transformer.config.get("_name_or_path") or "").resolve()
    return TINY_FLUX.resolve() in (folder, folder.parent)


def context_for(transformer, config, latents, text_len, branches, steps, sigmas, over_ranks=None):
    """The CacheContext of a generation that begins with these latents, (B, S, C)."""
    batch_size, seq_len, _ = latents.shape
    return CacheContext(
        batch_size,
        seq_len,
        transformer.inner_dim,
        branches=branches,
        mindspore_dtype=latents.dtype,
        config=config,
        text_len=text_len,
        steps=steps,
        sigmas=sigmas,
        channels=transformer.proj_out.weight.shape[0],
        over_ranks=over_ranks,
        stacks=transformer.cached_model.stacks,
    )


def graph_input(value):
    """A value of a call as a graph has to be given it: tensors whole and as inputs, not constants, wherever they are.

    What a graph uses in its branches alone it reads as if it were no view (MindSpore 2.7.0 and 2.10.0, CPU).
    """
    if isinstance(value, ms.Tensor):
        return value.contiguous()
    if isinstance(value, (list, tuple)) and any(isinstance(each, ms.Tensor) for each in value):
        return ms.mutable(tuple(map(graph_input, value)))
    if isinstance(value, dict) and value:
        return ms.mutable({name: graph_input(each) for name, each in value.items()})
    return value


def costs_of_step(transformer, batch, image_tokens, text_tokens):
    """The StepCosts of one call of a transformer at these shapes."""
    return family(transformer).COSTS.step_costs(transformer.config, batch, image_tokens, text_tokens)


def adapters_of(model):
    """The layers of a model that adapters have taken the place of."""
    return [layer for _, layer in model.cells_and_names() if isinstance(layer, BaseTunerLayer)]


def strengths_of(layers):
    """Which of their adapters act, and how strongly."""
    return [(list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters) for layer in layers]


_TURN, _DRAWING = RLock(), []


@contextmanager
def turn(drawing):
    """Lets one thread draw at a time: MindSpore's mode and compiler and a graph's buffers are there once.

    Raises ValueError if what draws is drawing already, further up in the same thread.
    """
    with _TURN:
        if any(each is drawing for each in _DRAWING):
            raise ValueError(f"this {type(drawing).__name__} is drawing; a callback cannot call it")
        _DRAWING.append(drawing)
        try:
            yield
        finally:
            _DRAWING.pop()


@contextmanager
def adapters_scaled(scale, *models):
    """Multiplies the active adapters' strengths by ``scale`` for a while; None leaves them and a None model is none.

    A strength that somebody sets meanwhile stays.
    """
    models = [model for model in models if model is not None and scale is not None]
    layers = [layer for model in models for layer in adapters_of(model)]
    before = [dict(layer.scaling) for layer in layers]
    for model in models:
        scale_lora_layers(model, scale)
    scaled = [dict(layer.scaling) for layer in layers]
    try:
        yield
    finally:
        for layer, old, new in zip(layers, before, scaled):
            layer.scaling.update({name: old[name] for name in old if layer.scaling.get(name) == new[name]})
