"""FluxPipeline: mindone's, with the denoise loop as one cached graph."""

import sys
import time
from contextlib import contextmanager, nullcontext
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
from mindone.diffusers import FlowMatchEulerDiscreteScheduler
from mindone.diffusers import FluxPipeline as MindoneFluxPipeline
from mindone.diffusers import FluxTransformer2DModel
from mindone.diffusers.utils import logging
from tqdm.auto import tqdm

import mindspore as ms
from mindspore import ops

from .cached_transformer import (
    CachedTransformer,
    StandIn,
    ToldScheduler,
    attention_inputs,
    context_for,
    for_steps,
    graph_input,
    graph_mode,
    refuse_stg,
)
from .checkpoint import absent_components, check_checkpoint, check_fit, is_hub_name
from .config import CacheConfig
from .device import current_device, prepare_device
from .flops import step_costs
from .gates import knobs
from .kept_graphs import MOST, KeptGraphs, drop_stale_graphs
from .models.denoise_loop import FluxDenoiseLoop
from .schedules import MAX_STEPS, row

logger = logging.get_logger(__name__)

_SIGNATURE = signature(MindoneFluxPipeline.__call__)
_DEFAULT_TEXT_LENGTH = _SIGNATURE.parameters["max_sequence_length"].default

DEFAULT = object()
"""Stands for the pipeline's own cache_config, since None means no cache."""


def check_config(config):
    """Raises TypeError unless this is a CacheConfig or None."""
    if config is not None and not isinstance(config, CacheConfig):
        raise TypeError(f"cache_config must be a CacheConfig or None, not {config!r}")


def check_dtypes(dtypes):
    """Raises TypeError for what is no dtype, ValueError for one that the device cannot do; a dictionary has several."""
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if not isinstance(dtype, (ms.Type, type(None))):
            raise TypeError(f"mindspore_dtype must be a dtype like mindspore.bfloat16, not {dtype!r}")
        if dtype not in (None, ms.float32) and ms.get_context("device_target") == "CPU":
            raise ValueError(f"mindspore_dtype {dtype} is not supported on CPU; only float32 is")


class FluxPipeline(MindoneFluxPipeline):
    """mindone's FluxPipeline with First-Block Cache and TaylorSeer, its denoise loop one compiled graph.

    ``cache_config`` is the CacheConfig of calls that bring none of their own, or None for no cache; with
    ``use_graph_mode``, calls compile, whatever mode the process is in, and without it they run operator by operator.
    ``device`` is the Device that says how they compile; ``graph_compilations`` counts the denoise graphs that have been
    compiled so far, ``graphs_from_cache`` those of them that came from the compile cache. After a call, ``cache_stats``
    is its CacheStats and ``seconds`` its times: "encode" (the prompts), "compile" (the loop), "denoise", "per_step",
    "decode" and "total"; encode and decode have their models' compilation in them, the first time.
    """

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
        image_encoder=None,
        feature_extractor=None,
    ):
        prepare_device()
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        if vae is not None:
            self.default_sample_size = vae.config.sample_size // self.vae_scale_factor
        self.cache_config = CacheConfig()
        self.use_graph_mode = True
        self.device = current_device()
        self.graph_compilations = self.graphs_from_cache = 0
        self.cache_stats = None
        self.seconds = {}
        self._loops, self._loop = KeptGraphs(), None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        cache_config=DEFAULT,
        use_graph_mode=True,
        device=None,
        mindspore_dtype=None,
        **kwargs,
    ):
        """Loads a pipeline as mindone's from_pretrained does, with the three settings that the class names.

        A text is a folder's path, unless it is a hub's owner/model and there is no folder of either name. A component
        that is handed over, or is None, needs no files. A device, as choose_device returns it, also says the dtype,
        unless there is a mindspore_dtype.

        Raises:
            OSError: the folder or a file of it is missing or damaged, or the hub has none or cannot be reached.
            TypeError: cache_config is neither a CacheConfig nor None.
            ValueError: a component's weights do not fit its config, or the device cannot do the dtype.
        """
        prepare_device()
        check_config(None if cache_config is DEFAULT else cache_config)
        if mindspore_dtype is None and device is not None:
            mindspore_dtype = device.mindspore_dtype
        check_dtypes(mindspore_dtype)
        if mindspore_dtype is not None:
            kwargs["mindspore_dtype"] = mindspore_dtype
        name, tensors = pretrained_model_name_or_path, {}
        if not is_hub_name(name):
            name = str(Path(name).expanduser())
            tensors = check_checkpoint(name, kwargs, kwargs.get("variant"))
            # Those that the pipeline was saved without; mindone wants to be told.
            kwargs = {**dict.fromkeys(absent_components(name)), **kwargs}
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
        return pipe._with_settings(cache_config, use_graph_mode, device)

    @classmethod
    def from_pipe(cls, pipeline, *, cache_config=DEFAULT, use_graph_mode=None, device=None, **kwargs):
        """A pipeline with another one's components, shared, as mindone's from_pipe makes it; from any Flux pipeline.

        Its settings are the other one's where that has them, unless they are given here. Other than in mindone's,
        dtypes stay unless there is a mindspore_dtype: the other pipeline has the same components.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None, or an argument is unknown.
            ValueError: the other pipeline lacks a component, or the device cannot do the dtype.
        """
        check_config(None if cache_config is DEFAULT else cache_config)
        check_dtypes(kwargs.setdefault("mindspore_dtype", None))
        components = pipeline.components
        stood_for = {name: part.stood_for for name, part in components.items() if isinstance(part, StandIn)}
        pipe = super().from_pipe(pipeline, **{**stood_for, **kwargs})
        if isinstance(pipeline, FluxPipeline):
            pipe._with_settings(pipeline.cache_config, pipeline.use_graph_mode, pipeline.device)
        elif isinstance(components["transformer"], CachedTransformer):
            pipe.cache_config = components["transformer"].cache_settings
        return pipe._with_settings(cache_config, use_graph_mode, device)

    @classmethod
    def _get_signature_types(cls):
        """The components' types, which mindone reads from its own __init__."""
        return MindoneFluxPipeline._get_signature_types()

    def _with_settings(self, cache_config=DEFAULT, use_graph_mode=None, device=None):
        if cache_config is not DEFAULT:
            self.cache_config = cache_config
        if use_graph_mode is not None:
            self.use_graph_mode = use_graph_mode
        if device is not None:
            self.device = device
        return self

    @property
    def cache_context(self):
        """The last call's CacheContext, within a call its own; None before the first call."""
        return self._loop.cache if self._loop else None

    @property
    def cache_bytes(self):
        """Bytes that the last call's CacheContext takes, 0 before the first call."""
        return self._loop.cache.nbytes if self._loop else 0

    def check_inputs(self, prompt, prompt_2, height, width, *args, **kwargs):
        """mindone's checks, and: ValueError for an empty prompt list and for sizes that it would round."""
        if isinstance(prompt, list) and not prompt:
            raise ValueError("prompt is an empty list; give one prompt or more")
        negative = kwargs.get("negative_prompt")
        if isinstance(negative, list) and isinstance(prompt, list) and len(negative) not in (1, len(prompt)):
            raise ValueError(f"negative_prompt lists {len(negative)} prompts; give one, or {len(prompt)} as in prompt")
        unit = self.vae_scale_factor * 2
        for name, size in {"height": height, "width": width}.items():
            if size < 1 or size % unit:
                raise ValueError(f"{name} must be a positive multiple of {unit}, not {size}")
        super().check_inputs(prompt, prompt_2, height, width, *args, **kwargs)

    def __call__(self, *args, cache_config=DEFAULT, **kwargs):
        """Draws; takes and returns what mindone's __call__ does, and for this call alone a cache_config.

        Prompts are padded to what the T5 tokenizer names as its length, at most mindone's 512, unless
        max_sequence_length says otherwise.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None.
            ValueError: mindone's checks, an empty prompt list, a size that mindone would round, steps beyond [1, 1000].
        """
        call = _SIGNATURE.bind(self, *args, **kwargs)
        call.apply_defaults()
        arguments = dict(call.arguments)
        del arguments["self"]
        steps = arguments["num_inference_steps"] if arguments["sigmas"] is None else len(arguments["sigmas"])
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"num_inference_steps must be in [1, {MAX_STEPS}], not {steps}")
        if arguments["max_sequence_length"] == _DEFAULT_TEXT_LENGTH and self.tokenizer_2 is not None:
            arguments["max_sequence_length"] = min(_DEFAULT_TEXT_LENGTH, self.tokenizer_2.model_max_length)
        config = self.cache_config if cache_config is DEFAULT else cache_config
        check_config(config)
        if config is None:
            # The pipeline's own order, so that switching the cache off compiles nothing.
            config = (self.cache_config or CacheConfig()).switched_off()
        else:
            refuse_stg(arguments["joint_attention_kwargs"])
        layers = self.transformer.config
        config.check_blocks(layers.num_layers, layers.num_single_layers)
        row(config, steps, 1.0)
        config = for_steps(config, steps)
        begin = time.perf_counter()
        drop_stale_graphs(self.vae)
        drop_stale_graphs(self.image_encoder)
        with graph_mode(self.use_graph_mode):
            reason = self.why_not_cached()
            if reason:
                logger.warning(f"{reason}: this call runs without the cache, step by step")
                self.cache_stats, self.seconds = None, {}
                result = super().__call__(**arguments)
            else:
                with _WholeLoop(self, config, arguments).in_place():
                    result = super().__call__(**arguments)
                self.seconds["decode"] = time.perf_counter() - begin - self.seconds.pop("until_decode")
        self.seconds["total"] = time.perf_counter() - begin
        return result

    __call__.__signature__ = _SIGNATURE.replace(
        parameters=[
            *_SIGNATURE.parameters.values(),
            Parameter("cache_config", Parameter.KEYWORD_ONLY, default=DEFAULT),
        ]
    )

    def encode_prompt(self, *args, **kwargs):
        """mindone's, with graphs that are true to the encoders' layers and adapters."""
        if kwargs.get("prompt_embeds") is None:
            for encoder in (self.text_encoder, self.text_encoder_2):
                drop_stale_graphs(encoder, kwargs.get("lora_scale"))
        return super().encode_prompt(*args, **kwargs)

    @staticmethod
    def _prepare_latent_image_ids(batch_size, height, width, dtype):
        """mindone's (height * width, 3): zero, row and column of each token. Without assigning to parts of a tensor,
        which takes MindSpore ten milliseconds."""
        return ms.Tensor(np.indices((1, height, width)).reshape(3, -1).T, dtype)

    def why_not_cached(self):
        """What keeps calls from the cached loop, in words; None if nothing does."""
        config = self.scheduler.config
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) or config.stochastic_sampling:
            return f"scheduler {type(self.scheduler).__name__} is no deterministic FlowMatchEulerDiscreteScheduler"
        return None

    def _loop_for(self, transformer, config, latents, text_len, branches, steps, sigmas):
        """The denoise loop for a shape and a structure."""

        def make():
            context = context_for(transformer, config, latents, text_len, branches, steps, sigmas)
            loop = FluxDenoiseLoop(transformer, context)
            self.device.prepare(loop, transformer)
            return loop

        key = (*latents.shape[:2], text_len, branches, latents.dtype, config.structure)
        return self._loops.get(transformer, key, make)


class _WholeLoop:
    """What mindone's __call__ finds in the place of its transformer: one call of it denoises from start to end.

    mindone's own loop then makes a single turn, since the scheduler it finds has one timestep, and hands on what
    this returns.
    """

    def __init__(self, pipe, config, arguments):
        self.pipe = pipe
        self.cache_config = config
        self.transformer = pipe.transformer
        self.scheduler = pipe.scheduler
        self.true_cfg_scale = arguments.pop("true_cfg_scale")
        self.callback = arguments.pop("callback_on_step_end")
        # mindone takes it out before it denoises.
        self.lora_scale = (arguments["joint_attention_kwargs"] or {}).get("scale")
        self.arguments = arguments
        self.image_embeds = []

    def __getattr__(self, name):
        return getattr(self.transformer, name)

    @contextmanager
    def in_place(self):
        """Stands in for the pipeline's transformer, scheduler and progress bar while the context lasts."""
        pipe = self.pipe
        mine = {
            "transformer": self,
            "scheduler": _OneTurn(self.scheduler),
            "progress_bar": lambda total: tqdm(total=total, disable=True),
            "prepare_ip_adapter_image_embeds": self.prepare_ip_adapter_image_embeds,
        }
        theirs = {"transformer": self.transformer, "scheduler": self.scheduler}
        if pipe.use_graph_mode and pipe.device.compile_cache is not None:
            for name, kind in _KEPT.items():
                theirs[name] = component = getattr(pipe, name)
                mine[name] = None if component is None else kind(component, device=pipe.device)
        self.begin = time.perf_counter()
        pipe.__dict__.update(mine)
        try:
            yield
        finally:
            pipe.__dict__.update(theirs)
            del pipe.__dict__["progress_bar"], pipe.__dict__["prepare_ip_adapter_image_embeds"]

    def prepare_ip_adapter_image_embeds(self, *args, **kwargs):
        """mindone's, which it calls for the image prompts and then for the negative ones."""
        embeds = type(self.pipe).prepare_ip_adapter_image_embeds(self.pipe, *args, **kwargs)
        self.image_embeds.append(embeds)
        return embeds

    def cache_context(self, name):
        return nullcontext()

    def __call__(
        self,
        hidden_states,
        timestep,
        guidance,
        pooled_projections,
        encoder_hidden_states,
        txt_ids,
        img_ids,
        joint_attention_kwargs=None,
        **kwargs,
    ):
        """The latents after all steps, in the place of a velocity."""
        pipe, scheduler, config = self.pipe, self.scheduler, self.cache_config
        latents, prompt_embeds, pooled = hidden_states, encoder_hidden_states, pooled_projections
        negative, negative_pooled = self.negative_embeds(prompt_embeds, pooled)
        pipe._num_timesteps = steps = len(scheduler.timesteps)
        branches, text_len, sigmas = 1 if negative is None else 2, prompt_embeds.shape[1], scheduler.sigmas.asnumpy()
        loop = pipe._loop_for(self.transformer, config, latents, text_len, branches, steps, sigmas)
        pipe._loop = loop

        constants = (
            txt_ids,
            img_ids,
            guidance,
            ms.Tensor(self.true_cfg_scale, ms.float32),
            padded(scheduler.timesteps, MAX_STEPS),
            padded(scheduler.sigmas, MAX_STEPS + 1),
        )
        unshifted = self.arguments["sigmas"]
        progress = None if unshifted is None else 1 - np.asarray(unshifted)
        numbers = tuple(map(ms.Tensor, knobs(config, steps, sigmas, progress)))
        attention = self.attention_inputs(joint_attention_kwargs, branches)
        pooled = ops.stack([pooled] if negative is None else [pooled, negative_pooled])

        def piece(latents, prompt_embeds, start, stop):
            embeds = ops.stack([prompt_embeds] if negative is None else [prompt_embeds, negative])
            bounds = ms.Tensor(start, ms.int32), ms.Tensor(stop, ms.int32)
            inputs = latents, embeds, pooled, *constants, *bounds, *numbers
            return tuple(map(graph_input, (*inputs, attention)))

        compile_begin, compiled_before = time.perf_counter(), len(loop.compile_cache)
        if pipe.use_graph_mode:
            inputs = piece(latents, prompt_embeds, 0, steps)
            pipe.graphs_from_cache += pipe.device.compile(loop, inputs, self.transformer, config.structure)
        if len(loop.compile_cache) > compiled_before:
            pipe.graph_compilations += 1
            # A graph's first launch allocates its memory: that belongs to the compilation, not to the first image.
            loop(*piece(latents, prompt_embeds, 0, 1)).asnumpy()
            pipe._loops.settle()
        denoise_begin = time.perf_counter()
        if self.callback is None and not watched(pipe):
            latents = loop(*piece(latents, prompt_embeds, 0, steps))
        else:
            with type(pipe).progress_bar(pipe, total=steps) as bar:
                for step in range(steps):
                    if pipe.interrupt:
                        break
                    pipe._current_timestep = scheduler.timesteps[step]
                    latents = loop(*piece(latents, prompt_embeds, step, step + 1))
                    latents, prompt_embeds = self.call_back(step, latents, prompt_embeds)
                    bar.update()
        latents.asnumpy()
        pipe._loops.settle()
        end = time.perf_counter()
        batch_size, seq_len, _ = latents.shape
        costs = step_costs(self.transformer.config, batch_size, seq_len, text_len)
        pipe.cache_stats = loop.cache.stats(costs)
        done = len(pipe.cache_stats.reused)
        pipe.seconds = {
            "encode": compile_begin - self.begin,
            "compile": denoise_begin - compile_begin,
            "denoise": end - denoise_begin,
            "per_step": (end - denoise_begin) / max(done, 1),
            "until_decode": end - self.begin,
        }
        return (latents,)

    def negative_embeds(self, prompt_embeds, pooled):
        """True CFG's negative prompt, encoded and as many as there are latents; (None, None) without true CFG."""
        given = self.arguments
        embeds, pooled_embeds = given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]
        has_negative = given["negative_prompt"] is not None or (embeds is not None and pooled_embeds is not None)
        if self.true_cfg_scale <= 1 or not has_negative:
            return None, None
        embeds, pooled_embeds, _ = self.pipe.encode_prompt(
            prompt=given["negative_prompt"],
            prompt_2=given["negative_prompt_2"],
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled_embeds,
            num_images_per_prompt=given["num_images_per_prompt"],
            max_sequence_length=given["max_sequence_length"],
            lora_scale=self.lora_scale,
        )
        repeats = prompt_embeds.shape[0] // embeds.shape[0]
        embeds, pooled_embeds = embeds.tile((repeats, 1, 1)), pooled_embeds.tile((repeats, 1))
        if embeds.shape != prompt_embeds.shape:
            raise ValueError(f"negative_prompt's embeddings are {embeds.shape}, the prompt's {prompt_embeds.shape}")
        return embeds, pooled_embeds

    def attention_inputs(self, attention_kwargs, branches):
        """What attention gets beside the streams, stacked by branch; image prompts have negative ones."""
        given = [dict(attention_kwargs or {}) for _ in range(branches)]
        for each, embeds in zip(given, self.image_embeds):
            each["ip_adapter_image_embeds"] = embeds
        given = [attention_inputs(self.transformer, each) for each in given]
        return given[0] and {name: by_branch([each[name] for each in given]) for name in given[0]}

    def call_back(self, step, latents, prompt_embeds):
        """Hands a finished step to the user's callback_on_step_end, who may replace latents and prompt_embeds."""
        if self.callback is None:
            return latents, prompt_embeds
        tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
        chosen = {name: tensors[name] for name in self.arguments["callback_on_step_end_tensor_inputs"]}
        attributes = self.pipe.__dict__
        one_turn, attributes["scheduler"] = attributes["scheduler"], self.scheduler
        try:
            tensors.update(self.callback(self.pipe, step, self.scheduler.timesteps[step], chosen))
        finally:
            attributes["scheduler"] = one_turn
        return tensors["latents"], tensors["prompt_embeds"]


class _KeptEncoder(StandIn):
    """A text encoder whose graph the compile cache keeps."""

    def __call__(self, *args, **kwargs):
        encoder = self.stood_for
        call = signature(encoder.construct).bind(*args, **kwargs)
        # A call that names its inputs would be another graph than the one that is compiled.
        call.apply_defaults()
        self.device.compile(encoder, call.args, encoder)
        return encoder(*call.args)


class _KeptAutoencoder(StandIn):
    """An autoencoder whose decoder's graph the compile cache keeps."""

    def decode(self, latents, **options):
        vae = self.stood_for
        if not (vae.use_tiling or vae.use_slicing):
            self.device.compile(vae.decoder, (latents,), vae)
        return vae.decode(latents, **options)


_KEPT = {"text_encoder": _KeptEncoder, "text_encoder_2": _KeptEncoder, "vae": _KeptAutoencoder}


class _OneTurn:
    """A scheduler that shows mindone's loop the first timestep alone and takes what it is given for the result."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    @property
    def timesteps(self):
        # Through NumPy: indexing a tensor takes MindSpore ten milliseconds.
        return [ms.Tensor(self.scheduler.timesteps.asnumpy()[0])]

    def step(self, model_output, *args, **kwargs):
        return (model_output,)


def apply_cache_on_pipe(pipe, config=None, kept_shapes=MOST):
    """Puts the cache into any mindone Flux pipeline (ControlNet, Fill, Kontext, ...), step by step, and returns it.

    Each call of the transformer is one compiled graph, the same for every prompt, seed and step count at one shape;
    ``pipe.transformer.cache_stats`` tells what the last generation did. Pipelines with true CFG may name the branch
    as mindone's FluxPipeline does, or call for the positive prompt first. Our own FluxPipeline just takes the config:
    its loop has the cache already.

    Args:
        pipe: a pipeline whose ``transformer`` is mindone's FluxTransformer2DModel.
        config: a CacheConfig; None for the default. Applying again replaces it, and compiles only what is another
            structure.
        kept_shapes: for how many shapes (batch, size, text length, dtype) graph and buffers are kept, 1 or more; the
            one that was not used for longest goes first.

    Raises TypeError for another config, ValueError for a pipeline of another model or no kept shape.
    """
    check_config(config)
    config = config or CacheConfig()
    if kept_shapes < 1:
        raise ValueError(f"kept_shapes must be 1 or more, not {kept_shapes}")
    if isinstance(pipe, FluxPipeline):
        pipe.cache_config, pipe._loops.most = config, kept_shapes
        return pipe
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, FluxTransformer2DModel):
        name = type(pipe if transformer is None else transformer).__name__
        raise ValueError(f"Unsupported model {name}; the cache is for mindone's FluxTransformer2DModel")
    config.check_blocks(transformer.config.num_layers, transformer.config.num_single_layers)
    if type(transformer) is CachedTransformer:
        if transformer.pipe() is pipe:
            transformer.cache_settings, transformer.steps.most = config, kept_shapes
            transformer.begin_generation()
            return pipe
        # Another pipeline's, among whose components this one's were.
        transformer = transformer.stood_for
    prepare_device()
    # Past DiffusionPipeline.__setattr__, which would write the stand-ins' classes into model_index.json.
    pipe.__dict__["transformer"] = CachedTransformer(transformer, config, pipe, kept_shapes)
    pipe.transformer.told_scheduler()
    return pipe


def remove_cache_from_pipe(pipe):
    """Takes the cache out of a pipeline again, which is then what it was; one that has none stays as it is."""
    if isinstance(pipe, FluxPipeline):
        pipe.cache_config = None
    for name, kind in {"transformer": CachedTransformer, "scheduler": ToldScheduler}.items():
        if type(getattr(pipe, name, None)) is kind:
            pipe.__dict__[name] = getattr(pipe, name).stood_for


def watched(pipe):
    """Whether a person sees the progress bar: unless told by set_progress_bar_config, if stderr is a terminal."""
    disable = getattr(pipe, "_progress_bar_config", {}).get("disable")
    return sys.stderr.isatty() if disable is None else not disable


def by_branch(values):
    """Tensors, or tuples of them, one for each branch, stacked on a leading axis."""
    return ops.stack(values) if isinstance(values[0], ms.Tensor) else tuple(map(ops.stack, zip(*values)))


def padded(values, length):
    """A float32 vector, filled with zeros up to ``length``."""
    values = values.asnumpy()
    return ms.Tensor(np.pad(values, (0, length - len(values))), ms.float32)
