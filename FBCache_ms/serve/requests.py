"""What a client may ask for: JSON, its fields, and what they come to."""

import json
import math
import secrets
from dataclasses import dataclass
from typing import Literal, Optional, Tuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..cache.gates import check_steps
from ..config import PRESETS, CacheConfig
from ..rules.options import did_you_mean
from .drawing import Drawing
from .errors import ApiError
from .settings import MOST_PICTURES, MOST_SEED, OUTPUT_FORMATS, PROMPT_CHARACTERS

MOST_GUIDANCE = 100.0
UNCACHED = "none"
"""What ``cache`` says for a picture without the cache."""

OURS = "fbcache"
"""The name of what a request asks for, and an answer has, beside OpenAI's fields."""

NUMBERS = ("threshold", "start", "end", "max_consecutive_cache_hits")
"""Fields of ``fbcache`` that are no part of a graph."""


class Fields(BaseModel):
    """Fields of JSON: none but those that are named, and each of its own kind."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class FBCacheFields(Fields):
    """What is reported beside the pictures, and what is another number than in ``cache``."""

    progress: bool = Field(False, description="with stream: an event of our own, fbcache.step, for each step")
    stats: bool = Field(False, description="which steps were computed, and what that saved")
    compare: bool = Field(False, description="also the uncached picture, and how near the cached one is to it")
    threshold: Optional[float] = Field(None, ge=0, description="in place of the threshold of cache")
    start: Optional[float] = Field(None, ge=0, le=1, description="share of the steps before which none is reused")
    end: Optional[float] = Field(None, ge=0, le=1, description="share of the steps behind which none is reused")
    max_consecutive_cache_hits: Optional[int] = Field(None, ge=-1, description="reuses in a row; -1: no limit")


class ImageFields(Fields):
    """The body of POST /v1/images/generations, and of POST /v1/jobs."""

    prompt: str = Field(min_length=1, max_length=PROMPT_CHARACTERS, description="what to show")
    model: Optional[str] = Field(None, max_length=200, description="the served model's name, where it is given")
    n: int = Field(1, ge=1, le=MOST_PICTURES, description="how many pictures; number i has the seed plus i")
    size: str = Field("auto", max_length=20, description="WIDTHxHEIGHT, one that is served; auto: the first of them")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal[OUTPUT_FORMATS] = "png"
    seed: Optional[int] = Field(None, ge=0, le=MOST_SEED, description="of the noise; a random one is reported")
    num_inference_steps: Optional[int] = Field(None, ge=1, description="steps of the denoise loop")
    guidance_scale: Optional[float] = Field(None, ge=0, le=MOST_GUIDANCE, description="of the guidance embedding")
    negative_prompt: Optional[str] = Field(None, max_length=PROMPT_CHARACTERS, description="what not to show")
    true_cfg_scale: Optional[float] = Field(None, ge=0, le=MOST_GUIDANCE, description="of the negative prompt")
    cache: Optional[str] = Field(None, max_length=500, description=f"a preset, a tag, or {UNCACHED}")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(0, ge=0, le=3, description="with stream: so many previews of each picture")
    fbcache: FBCacheFields = Field(default_factory=FBCacheFields)


@dataclass(frozen=True)
class Order:
    """What a request comes to: a Drawing for each picture, with ``compare`` followed by its uncached twin.

    ``batch`` is what pictures that are drawn together have in common; None for those that are drawn one by one.
    """

    fields: ImageFields
    drawings: Tuple[Drawing, ...]
    batch: Optional[tuple] = None


def parse(body):
    """The JSON object in these bytes. Raises ApiError for anything else, and for numbers and texts that JSON lacks."""

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is no number of JSON")
        return value

    def refuse(text):
        raise ValueError(f"{text} is no number of JSON")

    def once(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError("a field is there twice")
            found[name] = value
        return found

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse, parse_float=number, object_pairs_hook=once)
        # Half of a surrogate pair is in no text.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeError:
        raise ApiError(400, "the body must be UTF-8, and every text in it whole characters") from None
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    # OpenAI's null stands for a field that is left out.
    return {name: value for name, value in found.items() if value is not None}


def checked(found):
    """The ImageFields of a JSON object. Raises ApiError, naming the first field that is off."""
    try:
        return ImageFields.model_validate(found)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            known = FBCacheFields if len(error["loc"]) > 1 else ImageFields
            hint = did_you_mean(str(error["loc"][-1]), known.model_fields)
            raise ApiError(400, f"{name[:100]} is no field here{hint}", name[:100], "unknown_field") from None
        said = error["msg"][0].lower() + error["msg"][1:]
        raise ApiError(400, f"{name}: {said}", name or None, "invalid_value") from None


def ordered(fields, settings, streams):
    """The Order of these ImageFields, whose client may listen to events if it ``streams``.

    Raises ApiError for what is not served, with what is.
    """
    if fields.model not in (None, settings.name):
        raise ApiError(404, f"there is no such model; {settings.name} is served", "model", "model_not_found")
    width, height = size_of(fields.size, settings)
    steps = settings.steps if fields.num_inference_steps is None else fields.num_inference_steps
    if steps > settings.max_steps:
        raise ApiError(400, f"num_inference_steps must be {settings.max_steps} or fewer", "num_inference_steps")
    for name in ("partial_images", "fbcache.progress"):
        asked = fields.partial_images if name == "partial_images" else fields.fbcache.progress
        if asked and not streams:
            raise ApiError(400, f"{name} needs stream", name)
    config = config_of(fields, steps, settings)
    scales = scales_of(fields, settings)
    first = secrets.randbelow(2**32) if fields.seed is None else fields.seed
    if first + fields.n - 1 > MOST_SEED:
        raise ApiError(400, f"seed plus n must be {MOST_SEED} or less", "seed")
    tags = [str(config), str(config.switched_off())] if fields.fbcache.compare else [str(config)]
    watched = fields.fbcache.progress or fields.partial_images > 0
    size = width, height, steps
    drawings = [
        Drawing(fields.prompt, fields.negative_prompt, *size, scales, seed, tag, watched)
        for seed in range(first, first + fields.n)
        for tag in tags
    ]
    # The same seed gives the same bytes, and those of a batch differ by rounding; a gate decides for a whole batch.
    together = fields.seed is None and not config.rules and not watched and not fields.fbcache.compare
    scales = tuple(sorted(scales.items()))
    batch = (*size, scales, tags[0], fields.negative_prompt is None) if together else None
    return Order(fields, tuple(drawings), batch)


def size_text(size):
    """A (width, height) as clients write it."""
    return f"{size[0]}x{size[1]}"


def size_of(text, settings):
    """The (width, height) of a request's size. Raises ApiError for one that is not compiled."""
    served = {size_text(size): size for size in settings.sizes}
    if text != "auto" and text not in served:
        raise ApiError(400, f"size must be one of {', '.join(served)}, which are compiled, or auto", "size")
    return settings.sizes[0] if text == "auto" else served[text]


def config_of(fields, steps, settings):
    """The CacheConfig of a request's ``cache`` and ``fbcache``. Raises ApiError for one that needs another graph."""
    text, default = fields.cache, next(iter(settings.presets.values()))
    try:
        if text in (None, UNCACHED):
            config = default
        elif text in settings.presets:
            config = settings.presets[text]
        # Not CacheConfig.named, which opens files.
        elif text in PRESETS:
            config = CacheConfig.preset(text)
        else:
            config = CacheConfig.from_tag(text)
        config.check_blocks(*settings.blocks)
        if text != UNCACHED:
            check_steps(config, steps)
    except (TypeError, ValueError) as error:
        raise ApiError(400, f"cache: {error}", "cache") from None
    config = changed(config, fields)
    if config.structure not in settings.structures:
        served = ", ".join(settings.served_presets)
        raise ApiError(400, f"cache: this would compile; {served} and tags of their structure are compiled", "cache")
    # As the pipeline does it, which warns.
    return config.switched_off() if text == UNCACHED or config.leaves_alone(steps) else config


def changed(config, fields):
    """A CacheConfig with the numbers of a request's ``fbcache``. Raises ApiError for one that has no effect."""
    numbers = {name: getattr(fields.fbcache, name) for name in NUMBERS if getattr(fields.fbcache, name) is not None}
    if not numbers:
        return config
    first = f"{OURS}.{next(iter(numbers))}"
    if fields.cache == UNCACHED:
        raise ApiError(400, f"{first} has no effect with cache {UNCACHED!r}", first)
    if "threshold" in numbers:
        if not config.rules:
            raise ApiError(400, f"{OURS}.threshold has no effect: {config} compares with none", f"{OURS}.threshold")
        numbers[config.rules[0].threshold] = numbers.pop("threshold")
    try:
        return config.changed(**numbers)
    except ValueError as error:
        raise ApiError(400, f"{first}: {error}", first) from None


def scales_of(fields, settings):
    """{name: number} of the guidance scales. Raises ApiError for one that this model does not take."""
    scales = {name: default for name, default in settings.guidance.items() if name != "true_cfg_scale"}
    if fields.guidance_scale is not None:
        if "guidance_scale" not in scales:
            raise ApiError(400, "guidance_scale is not for this model", "guidance_scale")
        scales["guidance_scale"] = fields.guidance_scale
    if fields.negative_prompt is None and fields.true_cfg_scale is None:
        return {**scales, "true_cfg_scale": 1.0} if "true_cfg_scale" in settings.guidance else scales
    name = "negative_prompt" if fields.negative_prompt is not None else "true_cfg_scale"
    if not settings.negative_prompts:
        raise ApiError(400, f"{name} is not served here", name)
    if fields.negative_prompt is None:
        raise ApiError(400, "true_cfg_scale needs a negative_prompt", "true_cfg_scale")
    scale = settings.guidance["true_cfg_scale"] if fields.true_cfg_scale is None else fields.true_cfg_scale
    if scale <= 1:
        raise ApiError(400, "negative_prompt needs a true_cfg_scale above 1", "true_cfg_scale")
    return {**scales, "true_cfg_scale": scale}
