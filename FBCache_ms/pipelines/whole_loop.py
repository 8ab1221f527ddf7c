"""What our pipelines have in common: mindone's, with the denoise loop as one cached graph."""

import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from inspect import Parameter, signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mindone.diffusers import DiffusionPipeline
from mindone.diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from mindone.diffusers.utils import logging
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

import mindspore as ms
from mindspore import nn, ops

from ..cache.gates import check_steps, step_tables
from ..cache.loop import DenoiseLoop
from ..config import CacheConfig
from ..models import foreign_transformer
from ..models.mindones import foreign_scheduler, replaced
from ..rules.schedules import progress_of
from ..runtime.bfloat16 import on_this_device, round_matrices
from ..runtime.checkpoint import absent_components, check_checkpoint, check_fit, is_hub_name
from ..runtime.device import Device, current_device, graph_mode, prepare_device
from ..runtime.kept_graphs import KeptGraphs, drop_graphs, drop_stale_graphs
from ..runtime.parallel import sharing_of, unshare, why_not_shared
from ..runtime.quantize import check_quantize, load_parts, quantize, quantized_as, refuse_fusing, round_layers
from .cached_transformer import (
    CachedTransformer,
    StandIn,
    adapters_scaled,
    check_config,
    check_structure,
    context_for,
    costs_of_step,
    for_steps,
    turn,
    warn_of_learnt,
)
from .call_inputs import check_call, check_shape
from .loop_inputs import LoopInputs

logger = logging.get_logger(__name__)

PIECE_SECONDS = 0.8
"""So long a watched loop runs before its progress bar moves."""

DEFAULT = object()
"""Stands for the pipeline's own cache_config, since None means no cache."""


def check_dtypes(dtypes):
    """Raises TypeError for what is no dtype, ValueError for one that the device cannot do; a dictionary has several."""
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if not isinstance(dtype, (ms.Type, type(None))):
            raise TypeError(f"mindspore_dtype must be a dtype like mindspore.bfloat16, not {dtype!r}")
        if dtype not in (None, ms.float32, ms.bfloat16) and ms.get_context("device_target") == "CPU":
            raise ValueError(f"mindspore_dtype {dtype} is not supported on CPU; float32 and bfloat16 are")


def check_device(device):
    """Raises TypeError unless this is a Device or None."""
    if not isinstance(device, (Device, type(None))):
        raise TypeError(f"device must be a Device, as choose_device returns it, not {device!r}")


class WholeLoop:
    """A pipeline with First-Block Cache and TaylorSeer, its denoise loop one compiled graph.

    ``cache_config`` is the CacheConfig of calls that bring none of their own, or None for no cache; with
    ``use_graph_mode``, calls compile, whatever mode the process is in, and without it they run operator by operator.
    ``device`` is the Device that says how they compile; ``graph_compilations`` counts the denoise graphs that have been
    compiled so far, ``graphs_from_cache`` those of them that came from the compile cache. After a call, ``cache_stats``
    is its CacheStats, ``finite`` whether all that it drew are numbers, and ``seconds`` its times: "encode" (the
    prompts), "compile" (the loop), "denoise", "per_step", "decode" and "total"; encode and decode have their models'
    compilation in them, the first time.

    A family's pipeline is a class of this one and of mindone's, which it names as

    - FILE: the family's, in models/; MINDONES, OUTPUT: mindone's pipeline, and what that returns;
    - ENCODERS: its components that may have adapters beside the transformer; READERS: those that read prompts;
    - KWARGS: the argument that goes on to attention;
    - COMPILES_PARTS: whether encoders and autoencoder compile, too;

    and it has the methods that raise NotImplementedError here. latents_shape and shift are FLUX.1's and Qwen-Image's;
    another family has its own.
    """

    COMPILES_PARTS = False

    def embeds_shapes(self):
        """By which arguments, without "negative_", a call may bring embeddings, and their axes behind the prompts'."""
        raise NotImplementedError

    def check_kwargs(self, kwargs):
        """Raises ValueError for what goes on to attention and cannot be cached."""
        raise NotImplementedError

    def latents_shape(self, given):
        """The shape of the latents that a call may bring: four neighbours' channels are a token's."""
        unit = self.vae_scale_factor * 2
        tokens = given.height // unit * (given.width // unit)
        return given.pictures, tokens, self.transformer.config.in_channels // 4 * 4

    def begin(self, given):
        """Sets what mindone's properties tell of a call."""
        raise NotImplementedError

    def encode(self, given, kind):
        """What the transformer gets of the prompts, or of the "negative_" ones: its construct's arguments by name."""
        raise NotImplementedError

    def noise(self, given, dtype):
        """The latents (B, S, C) that a generation begins with, and the transformer's other arguments.

        Among these may be ``still``, (B, R, C), tokens behind the latents' that no step moves.
        """
        raise NotImplementedError

    def shift(self, given, tokens):
        """mu of the scheduler's shift."""
        return calculate_shift(tokens, **shift_settings(self.scheduler))

    def picture(self, given, latents):
        """What the autoencoder makes of the latents (B, S, C), a tensor (B, 3, H, W)."""
        raise NotImplementedError

    @property
    def text_length(self):
        """What a prompt is padded or cut to where a call does not say."""
        return signature(self.MINDONES.__call__).parameters["max_sequence_length"].default

    @property
    def text_lengths(self):
        """What prompts are padded to: each of these lengths has a graph of its own."""
        return (self.text_length,)

    def embeddings(self, prompt):
        """A prompt's embeddings, {the argument of a call that takes them: tensor}, made operator by operator."""
        with graph_mode(False):
            found = self.encode_prompt(prompt, max_sequence_length=self.text_length)
        return dict(zip(self.embeds_shapes(), found))

    def _set_up(self):
        """What __init__ sets beside mindone's."""
        self.cache_config = CacheConfig()
        self.use_graph_mode = True
        self.device = current_device()
        self.graph_compilations = self.graphs_from_cache = 0
        self.cache_stats = self.finite = None
        self.seconds = {}
        self._loops = KeptGraphs()
        self.sharing = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        cache_config=DEFAULT,
        use_graph_mode=True,
        device=None,
        quantize_config=None,
        mindspore_dtype=None,
        **kwargs,
    ):
        """Loads a pipeline as mindone's from_pretrained does, with the three settings that the class names.

        With a ``quantize_config``, a QuantizeConfig, the weights of a folder's transformer are rounded one by one as
        they are read; those of other components, and of a model from a hub, once they are loaded.

        A text is a folder's path, unless it is a hub's owner/model and there is no folder of either name. A component
        that is handed over, or is None, needs no files. A device, as choose_device returns it, also says the dtype,
        unless there is a mindspore_dtype. On a CPU bfloat16 is that of the blocks' matrices alone.

        Raises:
            OSError: the folder or a file of it is missing or damaged, or the hub has none or cannot be reached.
            TypeError: cache_config is neither a CacheConfig nor None, quantize_config no QuantizeConfig, or device no
                Device.
            ValueError: a component's weights do not fit its config, or cannot be quantised so, or the device cannot do
                the dtype.
        """
        prepare_device()
        check_config(None if cache_config is DEFAULT else cache_config)
        check_device(device)
        if mindspore_dtype is None and device is not None:
            mindspore_dtype = device.mindspore_dtype
        check_dtypes(mindspore_dtype)
        check_quantize(quantize_config, mindspore_dtype)
        mindspore_dtype, rounded = on_this_device(mindspore_dtype)
        if mindspore_dtype is not None:
            kwargs["mindspore_dtype"] = mindspore_dtype
        name, tensors, given = pretrained_model_name_or_path, {}, set(kwargs)
        if not is_hub_name(name):
            name = str(Path(name).expanduser())
            tensors = check_checkpoint(name, kwargs, kwargs.get("variant"), cls.FILE.KIND.__name__)
            # Those that the pipeline was saved without; mindone wants to be told.
            kwargs = {**dict.fromkeys(absent_components(name)), **kwargs}
            variant = kwargs.get("variant")
            kwargs.update(load_parts(name, tensors, quantize_config, mindspore_dtype, variant))
        try:
            pipe = super().from_pretrained(name, **kwargs)
        except Exception as error:  # mindone and tokenizers raise whatever they stumble over
            kind = OSError if isinstance(error, OSError) else ValueError
            reason = " ".join(str(error).split())
            if is_hub_name(name):
                reason = f"there is no such folder, and from a hub: {' '.join(str(error.__cause__ or error).split())}"
            raise kind(f"checkpoint {name} cannot be loaded: {reason}") from error
        for component in set(tensors) - set(kwargs):
            check_fit(component, getattr(pipe, component), tensors[component])
        if quantize_config is not None and is_hub_name(name):
            quantize(pipe, quantize_config)
        elif quantize_config is not None:
            for component in set(quantize_config.components_to_quantize) - set(kwargs):
                round_layers(getattr(pipe, component), quantize_config)
        if rounded and "transformer" not in given:
            round_matrices(pipe.transformer)
        return pipe._with_settings(cache_config, use_graph_mode, device)

    @classmethod
    def from_pipe(cls, pipeline, *, cache_config=DEFAULT, use_graph_mode=None, device=None, **kwargs):
        """A pipeline with another one's components, shared, as mindone's from_pipe makes it; from any of its family.

        Its settings are the other one's where that has them, unless they are given here. Other than in mindone's,
        dtypes stay unless there is a mindspore_dtype: the other pipeline has the same components.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None, device no Device, or an argument is unknown.
            ValueError: the other pipeline lacks a component, or the device cannot do the dtype.
        """
        check_config(None if cache_config is DEFAULT else cache_config)
        check_device(device)
        check_dtypes(kwargs.setdefault("mindspore_dtype", None))
        components = pipeline.components
        original = {name: part.original for name, part in components.items() if isinstance(part, StandIn)}
        pipe = super().from_pipe(pipeline, **{**original, **kwargs})
        if isinstance(pipeline, WholeLoop):
            pipe._with_settings(pipeline.cache_config, pipeline.use_graph_mode, pipeline.device)
        elif isinstance(components["transformer"], CachedTransformer):
            pipe.cache_config = components["transformer"].cache_settings
        return pipe._with_settings(cache_config, use_graph_mode, device)

    @classmethod
    def _get_signature_types(cls):
        """The components' types, which mindone reads from its own __init__."""
        return cls.MINDONES._get_signature_types()

    def _with_settings(self, cache_config=DEFAULT, use_graph_mode=None, device=None):
        if cache_config is not DEFAULT:
            self.cache_config = cache_config
        if use_graph_mode is not None:
            self.use_graph_mode = use_graph_mode
        if device is not None:
            self.device = device
        return self

    def to(self, dtype):
        """mindone's: another dtype for every part, with graphs that are compiled anew."""
        self._loops.clear()
        for part in self.components.values():
            if isinstance(part, nn.Cell):
                drop_graphs(part)
        dtype, rounded = on_this_device(dtype)
        super().to(dtype)
        if rounded and self.transformer is not None:
            round_matrices(self.transformer)
        return self

    def fuse_lora(self, *args, **kwargs):
        """mindone's. Raises ValueError for a component with int8 weights."""
        call = signature(super().fuse_lora).bind(*args, **kwargs)
        call.apply_defaults()
        if set(call.arguments["components"]) & set(quantized_as(self)):
            refuse_fusing()
        return super().fuse_lora(*args, **kwargs)

    @property
    def cache_context(self):
        """The last call's CacheContext, within a call its own; None before the first call."""
        return self._loops.last.cache if self._loops else None

    @property
    def cache_bytes(self):
        """Bytes that the last call's CacheContext takes, 0 before the first call."""
        return self.cache_context.nbytes if self._loops else 0

    def _call(self, args, kwargs, cache_config):
        """Draws what a call asks for."""
        call = signature(self.MINDONES.__call__).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = SimpleNamespace(**call.arguments)
        config = self.cache_config if cache_config is DEFAULT else cache_config
        check_config(config)
        with turn(self):
            begin = time.perf_counter()
            result = self._draw(given, config)
            self.seconds["total"] = time.perf_counter() - begin
        return result

    def _draw(self, given, config):
        """Checks a call and draws it, cached where that can be."""
        check_call(self, given)
        reason, not_shared = self.why_not_cached(), why_not_shared(self.transformer, self.sharing)
        if not_shared or self.sharing is not None and reason:
            raise ValueError(not_shared or f"{reason}: such a call cannot be shared by several devices")
        # The scale of adapters is set here and not in mindone's methods, so that it is taken back whatever happens.
        kwargs = dict(getattr(given, self.KWARGS) or {})
        scale = kwargs.pop("scale", None)
        setattr(given, self.KWARGS, kwargs)
        if reason is None:
            self.check_kwargs(kwargs)
        if config is None:
            # The pipeline's own order, so that switching the cache off compiles nothing.
            config = (self.cache_config or CacheConfig()).switched_off()
        elif reason is None:
            check_structure(config, self.transformer)
            check_steps(config, given.num_inference_steps)
            warn_of_learnt(config, self.transformer)
            config = for_steps(config, given.num_inference_steps)
        adapted = self.transformer, *(getattr(self, name) for name in self.ENCODERS)
        with graph_mode(self.use_graph_mode), adapters_scaled(scale, *adapted):
            drop_stale_graphs(self.vae)
            drop_stale_graphs(getattr(self, "image_encoder", None))
            if reason is None:
                return self._draw_cached(given, config)
            logger.warning(f"{reason}: this call runs without the cache, step by step")
            drop_stale_graphs(self.transformer)
            self.cache_stats, self.finite, self.seconds = None, None, {}
            # mindone's FLUX.2 takes an empty dictionary for a full one.
            setattr(given, self.KWARGS, kwargs or None)
            names = signature(self.MINDONES.__call__).parameters
            with self._parts_mode():
                return super().__call__(**{name: getattr(given, name) for name in names if name != "self"})

    def _parts_mode(self):
        """The mode that encoders and autoencoder run in."""
        return graph_mode(self.use_graph_mode and self.COMPILES_PARTS)

    def _draw_cached(self, given, config):
        """What mindone's __call__ does, by mindone's own parts, but for the denoise loop, which is one graph."""
        begin = time.perf_counter()
        self.begin(given)
        self._current_timestep, self._interrupt, self.finite = None, False, None
        with self._parts_mode():
            prompts = [self.encode(given, "")]
            if getattr(given, "true_cfg_scale", 1) > 1 and has_negative_prompt(self, given):
                prompts.append(self.encode(given, "negative_"))
            latents, others = self.noise(given, prompts[0]["encoder_hidden_states"].dtype)
            if given.latents is not None:
                # A graph may read a part of another tensor as something else (MindSpore 2.7.0, CPU).
                latents = ops.deepcopy(latents)
        progress = self._set_timesteps(given, latents.shape[1])
        inputs = LoopInputs(
            self.transformer,
            [{**others, **prompt} for prompt in prompts],
            true_cfg_scale=getattr(given, "true_cfg_scale", 1),
            scheduler=self.scheduler,
            numbers=step_tables(config, self._num_timesteps, self.scheduler.sigmas.asnumpy(), progress),
            sharing=self.sharing,
        )
        if self.sharing is not None:
            latents = self._shared_beginning(given, config, latents, inputs)
        encoded = time.perf_counter()
        latents = self._denoise(given, config, latents, inputs)
        denoised = time.perf_counter()
        self._current_timestep = None
        with self._parts_mode():
            picture = latents if given.output_type == "latent" else self.picture(given, latents)
            # Of NaN the image processor may make black.
            self.finite = bool(np.isfinite(picture.float().asnumpy()).all())
            if given.output_type != "latent":
                if not self.finite:
                    logger.warning(f"what was drawn is not a number ({config}): another dtype may help")
                picture = self.image_processor.postprocess(picture, output_type=given.output_type)
        self.seconds.update(encode=encoded - begin, decode=time.perf_counter() - denoised)
        return self.OUTPUT(images=picture) if given.return_dict else (picture,)

    def enable_parallelism(self, config):
        """Shares each picture among several devices, as a ContextParallelConfig says.

        To be called by every process that msrun has started, behind choose_device. ``disable_parallelism`` ends it.

        Raises:
            TypeError: config is no ContextParallelConfig.
            ValueError: the processes, the attention processors or the model do not allow it.
        """
        guided = "true_cfg_scale" in signature(self.MINDONES.__call__).parameters
        if getattr(config, "cfg_parallel", False) and not guided:
            raise ValueError(f"cfg_parallel needs a negative prompt, and {type(self).__name__} takes none")
        self.disable_parallelism()
        self.sharing = sharing_of(self.transformer, config)

    def disable_parallelism(self):
        """Draws each picture on one device again."""
        unshare(self.transformer)
        self.sharing = None

    def _shared_beginning(self, given, config, latents, inputs):
        """The first rank's latents; raises ValueError where the ranks were given different things."""
        self.sharing.agree_on_inputs(
            inputs.given,
            versions=(ms.__version__, version("FBCache_ms")),
            shapes=(latents.shape, inputs.text_len, inputs.branches, str(latents.dtype)),
            settings=(
                str(config),
                given.num_inference_steps,
                float(inputs._constants[0].asnumpy()),
                self.scheduler.sigmas.asnumpy(),
            ),
        )
        return self.sharing.firsts(latents)

    def encode_prompt(self, *args, lora_scale=None, **kwargs):
        """mindone's, with graphs that are true to the encoders' layers and adapters, and that the device keeps."""
        encoders = {name: getattr(self, name) for name in self.ENCODERS}
        kept = dict(encoders)
        if self.use_graph_mode and self.COMPILES_PARTS and self.device.compile_cache is not None:
            kept = {name: each and KeptEncoder(each, device=self.device) for name, each in encoders.items()}
        with adapters_scaled(lora_scale, *encoders.values()):
            for encoder in encoders.values():
                drop_stale_graphs(encoder)
            self.__dict__.update(kept)
            try:
                return super().encode_prompt(*args, **kwargs)
            finally:
                self.__dict__.update(encoders)

    def _set_timesteps(self, given, tokens):
        """Sets the scheduler as mindone does; returns the progress that schedules.step_actions takes."""
        scheduler, settings, steps = self.scheduler, self.scheduler.config, given.num_inference_steps
        sigmas = np.linspace(1, 1 / steps, steps) if given.sigmas is None else given.sigmas
        if settings.get("use_flow_sigmas"):
            sigmas = None
        retrieve_timesteps(scheduler, steps, sigmas=sigmas, mu=self.shift(given, tokens))
        scheduler.set_begin_index(0)
        self._num_timesteps = len(scheduler.timesteps)
        return progress_of(sigmas, steps)

    def _denoise(self, given, config, latents, inputs):
        """The latents after all steps; sets ``cache_stats``, and in ``seconds`` what compiling and denoising took.

        The loop runs in one piece. Where a person watches it runs in pieces of about PIECE_SECONDS, and step by step
        for a callback: the same graph, and the same bits.
        """
        callback, steps = given.callback_on_step_end, self._num_timesteps
        timesteps, scheduler = self.scheduler.timesteps.asnumpy(), self.scheduler
        begin = time.perf_counter()
        loop = self._loop_for(config, latents, inputs)
        compiled = time.perf_counter()
        watched, step = callback is not None or is_watched(self), 0
        with self.progress_bar(total=steps) if watched else nullcontext() as bar:
            while step < steps and not self._interrupted():
                self._current_timestep = ms.Tensor(timesteps[step])
                left = steps - step
                piece = 1 if callback else loop.piece_of(left, PIECE_SECONDS) if watched else left
                stop = step + (piece if self.sharing is None else self.sharing.first_number(piece))
                latents = loop.run(inputs, latents, step, stop, wait=callback is None)
                # What scheduler.step would have counted.
                scheduler._step_index = stop
                if callback is not None:
                    loop, latents = self._call_back(given, config, step, loop, latents, inputs)
                if watched:
                    for _ in range(step, stop):
                        bar.update()
                step = stop
        latents.asnumpy()
        self._loops.settle()
        done = time.perf_counter()
        tokens = inputs.whole(latents).shape[1], inputs.whole_text
        traces = loop.cache.traces()
        if inputs.pair is not None:
            traces = self.sharing.both_traces(*traces)
        self.cache_stats = loop.cache.stats(costs_of_step(self.transformer, latents.shape[0], *tokens), traces)
        ran = max(len(self.cache_stats.reused), 1)
        self.seconds = {"compile": compiled - begin, "denoise": done - compiled, "per_step": (done - compiled) / ran}
        return latents

    def _interrupted(self):
        """Whether the caller wants no more steps; of ranks that share a picture, any one's caller."""
        return self.interrupt if self.sharing is None else self.sharing.any(self.interrupt)

    def _call_back(self, given, config, step, loop, latents, inputs):
        """Hands a finished step to callback_on_step_end; returns the loop and the latents that the next one takes.

        Raises ValueError, naming it, for what the callback has put in place of something that the loop needs.
        """
        tensors, scheduler = {"latents": latents, "prompt_embeds": inputs.embeds}, self.scheduler
        chosen = {name: tensors[name] for name in given.callback_on_step_end_tensor_inputs}
        returned = given.callback_on_step_end(self, step, self._current_timestep, chosen)
        if not isinstance(returned, dict):
            raise ValueError(f"callback_on_step_end must return a dictionary, not {type(returned).__name__}")
        for name, before in tensors.items():
            after = returned.get(name, before)
            check_shape(f"callback_on_step_end's {name}", after, before.shape)
            tensors[name] = after if after is before else ops.deepcopy(after.to(before.dtype))
        if self.sharing is not None:
            self.sharing.agree(callback=[each.float().asnumpy().tobytes() for each in tensors.values()])
        reason = self.why_not_cached()
        if reason or self.scheduler is not scheduler:
            raise ValueError(f"callback_on_step_end changed the pipeline: {reason or 'it has another scheduler'}")
        inputs.embeds = tensors["prompt_embeds"]
        inputs.follow(scheduler)
        # Adapters or weights may be others now, and a compiled graph would not see that.
        self._loops.settle()
        other = self._loop_for(config, latents, inputs, in_use=1)
        if other is not loop:
            other.cache.go_on(loop.cache.trace())
        return other, tensors["latents"]

    def why_not_cached(self):
        """What keeps calls from the cached loop, in words; None if nothing does."""
        return foreign_scheduler(self.scheduler) or foreign_transformer(self.transformer)

    def _loop_for(self, config, latents, inputs, in_use=0):
        """The denoise loop for these latents, inputs and structure, compiled; see KeptGraphs for ``in_use``."""
        transformer, branches, steps = self.transformer, inputs.branches, self._num_timesteps
        whole = inputs.own(latents)

        def make():
            sigmas = self.scheduler.sigmas.asnumpy()
            over_ranks = None if self.sharing is None else self.sharing.over_ranks(transformer)
            context = context_for(transformer, config, whole, inputs.text_len, branches, steps, sigmas, over_ranks)
            loop = DenoiseLoop(transformer.cached_model, context, inputs.pair)
            self.device.prepare(loop, transformer)
            return loop

        pair = None if inputs.pair is None else (inputs.pair.rank, inputs.pair.group)
        structure = (*config.structure, pair)
        key = (*whole.shape[:2], inputs.text_len, branches, latents.dtype, structure)
        loop = self._loops.get(transformer, key, make, in_use)
        if self.use_graph_mode:
            compiled_before = len(loop.compile_cache)
            arguments = inputs(latents, 0, steps)
            self.graphs_from_cache += self.device.compile(loop, arguments, transformer, structure)
            if len(loop.compile_cache) > compiled_before:
                self.graph_compilations += 1
                # A graph's first launch allocates its memory: that belongs to the compilation, not to the first image.
                loop.run(inputs, latents, 0, 1)
                self._loops.settle()
        return loop


class KeptEncoder(StandIn):
    """A text encoder whose graph the compile cache keeps."""

    def __call__(self, *args, **kwargs):
        encoder = self.original
        call = signature(encoder.construct).bind(*args, **kwargs)
        # A call that names its inputs would be another graph than the one that is compiled.
        call.apply_defaults()
        self.device.compile(encoder, call.args, encoder)
        return encoder(*call.args)


def is_watched(pipe):
    """Whether a person sees the progress bar: one of the user's own, else as set_progress_bar_config says; unless told,
    where stderr is a terminal or the process a notebook."""
    if replaced(pipe, DiffusionPipeline, ("progress_bar",)):
        return True
    disable = getattr(pipe, "_progress_bar_config", {}).get("disable")
    return sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook) if disable is None else not disable


def has_negative_prompt(pipe, given):
    """Whether a call brings a negative prompt, as text or as embeddings."""
    embeds = [getattr(given, f"negative_{name}") for name in pipe.embeds_shapes()]
    return given.negative_prompt is not None or all(each is not None for each in embeds)


def spread(tensor, number):
    """A tensor's rows, each as often as needed for ``number`` of them."""
    rows = tensor.shape[0]
    return tensor if rows == number else ops.gather(tensor, ms.Tensor(np.arange(number) * rows // number), 0)


def shift_settings(scheduler):
    """A scheduler's settings of its shift, as mindone's calculate_shift names them; those that it has."""
    names = {
        "base_seq_len": "base_image_seq_len",
        "max_seq_len": "max_image_seq_len",
        "base_shift": "base_shift",
        "max_shift": "max_shift",
    }
    return {name: scheduler.config[key] for name, key in names.items() if key in scheduler.config}


def with_cache_config(mindones):
    """The signature of a pipeline's __call__ that takes a cache_config beside what mindone's takes."""
    call = signature(mindones.__call__)
    own = Parameter("cache_config", Parameter.KEYWORD_ONLY, default=DEFAULT)
    return call.replace(parameters=[*call.parameters.values(), own])
