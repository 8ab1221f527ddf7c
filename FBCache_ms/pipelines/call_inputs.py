"""What a call of the pipeline is given, checked before anything runs."""

import operator
from inspect import signature
from numbers import Real

import numpy as np

import mindspore as ms

from ..rules.schedules import MAX_STEPS

IMAGE_PROMPTS = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
)
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
GENERATORS = np.random.Generator, np.random.RandomState


def check_call(pipe, given):
    """Raises ValueError, naming the input, for a call that cannot be drawn.

    Args:
        pipe: the pipeline, a WholeLoop.
        given: mindone's arguments by name. What is left out is filled in: height, width, the number of steps, and
            ``pictures``, how many are drawn.
    """
    check_parts(pipe, given)
    steps = given.num_inference_steps if given.sigmas is None else len(levels(given.sigmas))
    given.num_inference_steps = whole("num_inference_steps", steps, 1, MAX_STEPS)
    for name in ("height", "width"):
        size = getattr(given, name) or pipe.default_sample_size * pipe.vae_scale_factor
        setattr(given, name, whole(name, size))
    for name in ("guidance_scale", "true_cfg_scale"):
        asked = signature(pipe.MINDONES.__call__).parameters.get(name)
        if asked is not None and (asked.default is not None or getattr(given, name) is not None):
            finite(name, getattr(given, name))
    images = 1 if given.num_images_per_prompt is None else given.num_images_per_prompt
    given.num_images_per_prompt = whole("num_images_per_prompt", images, 1)
    if given.max_sequence_length is not None:
        whole("max_sequence_length", given.max_sequence_length, 1)
    if given.callback_on_step_end is not None and not callable(given.callback_on_step_end):
        raise ValueError(f"callback_on_step_end must be a function, not {given.callback_on_step_end!r}")
    given.callback_on_step_end_tensor_inputs = list(given.callback_on_step_end_tensor_inputs or ())
    kwargs = getattr(given, pipe.KWARGS)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{pipe.KWARGS} must be a dictionary, not {type(kwargs).__name__}")
    if kwargs and kwargs.get("scale") is not None:
        finite(f'{pipe.KWARGS}["scale"]', kwargs["scale"])
    if isinstance(given.prompt, list) and not given.prompt:
        raise ValueError("prompt is an empty list; give one prompt or more")
    unit = pipe.vae_scale_factor * 2
    for name in ("height", "width"):
        size = getattr(given, name)
        if size < 1 or size % unit:
            raise ValueError(f"{name} must be a positive multiple of {unit}, not {size}")
    names = list(signature(pipe.MINDONES.check_inputs).parameters)[1:]
    pipe.check_inputs(**{name: getattr(given, name) for name in names})
    check_prompts(pipe, given)
    check_noise(pipe, given)


def check_parts(pipe, given):
    """Raises ValueError for a call that needs a part which the pipeline does not have."""
    for name in ("transformer", "scheduler"):
        if getattr(pipe, name) is None:
            raise ValueError(f"{name} is None; a call needs one")
    if ms.get_context("device_target") == "CPU" and pipe.transformer.dtype != ms.float32:
        raise ValueError(
            f"transformer is in {pipe.transformer.dtype} throughout, which is not supported on CPU; "
            "from_pretrained(..., mindspore_dtype=mindspore.bfloat16) makes its blocks' matrices so"
        )
    if pipe.vae is None and given.output_type != "latent":
        raise ValueError(f"vae is None, so output_type must be 'latent', not {given.output_type!r}")
    if pipe.vae is None and getattr(given, "image", None) is not None:
        raise ValueError("vae is None, so image cannot be read")
    texts = [name for name in ("prompt", "negative_prompt") if getattr(given, name, None) is not None]
    for name in pipe.READERS:
        if texts and getattr(pipe, name) is None:
            raise ValueError(f"{name} is None, so {texts[0]} cannot be read; give {texts[0]}_embeds")
    images = [name for name in IMAGE_PROMPTS if getattr(given, name, None) is not None]
    if images and getattr(pipe.transformer, "encoder_hid_proj", None) is None:
        raise ValueError(f"{images[0]} is given, but no IP adapter is loaded; see load_ip_adapter")


def check_prompts(pipe, given):
    """Raises ValueError for prompts or embeddings that are not as many as they have to be; counts the pictures."""
    prompts = 1 if isinstance(given.prompt, str) else len(given.prompt or ()) or rows("prompt_embeds", given)
    given.pictures = prompts * given.num_images_per_prompt
    for name in PROMPTS:
        texts = getattr(given, name, None)
        if not isinstance(texts, (str, list, type(None))) or any(not isinstance(text, str) for text in texts or ()):
            raise ValueError(f"{name} must be a text or a list of texts, not {texts!r}")
        if isinstance(texts, list) and len(texts) not in (1, prompts):
            allowed = "one" if prompts == 1 else f"one, or {prompts} as in prompt"
            raise ValueError(f"{name} lists {len(texts)} prompts; give {allowed}")
    for kind in ("", "negative_"):
        length = None
        for name, shape in pipe.embeds_shapes().items():
            if getattr(given, kind + name, None) is not None:
                number = rows(kind + name, given)
                if number not in (1, prompts, given.pictures):
                    allowed = " or ".join(map(str, sorted({1, prompts, given.pictures})))
                    raise ValueError(f"{kind}{name} are for {number} prompts; allowed are {allowed}")
                wanted = (number, *(length if axis is None else axis for axis in shape))
                check_shape(kind + name, getattr(given, kind + name), wanted, name.endswith("mask"))
                # Those of any length are of the same, the first one's.
                length = getattr(given, kind + name).shape[1] if None in shape else length


def check_noise(pipe, given):
    """Raises ValueError for latents or generators that are not those of the pictures."""
    if given.latents is not None:
        check_shape("latents", given.latents, pipe.latents_shape(given))
    generators = given.generator if isinstance(given.generator, list) else [given.generator]
    if any(not isinstance(each, (*GENERATORS, type(None))) for each in generators):
        raise ValueError(f"generator must be a numpy.random.Generator, or a list of them, not {given.generator!r}")
    if len(generators) not in (1, given.pictures):
        raise ValueError(f"generator lists {len(generators)} for {given.pictures} pictures")


def rows(name, given):
    """How many prompts an input's embeddings are for. Raises ValueError unless it is a tensor."""
    value = getattr(given, name)
    if not isinstance(value, ms.Tensor) or value.ndim < 2:
        raise ValueError(f"{name} must be a mindspore Tensor with an axis for the prompts, not {described(value)}")
    return value.shape[0]


def check_shape(name, value, shape, mask=False):
    """Raises ValueError unless this is a tensor of floating-point numbers of that shape; None stands for any length.

    A mask may be of any numbers.
    """
    right = isinstance(value, ms.Tensor) and (mask or value.is_floating_point()) and value.ndim == len(shape)
    if not right or any(want is not None and have != want for have, want in zip(value.shape, shape)):
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        kind = "mindspore Tensor" if mask else "floating-point mindspore Tensor"
        raise ValueError(f"{name} must be a {kind} of {wanted}, not {described(value)}")


def described(value):
    """A value's type, and its shape and dtype if it has them, in words."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return type(value).__name__
    return f"a {type(value).__name__} of {' x '.join(map(str, value.shape))}, {value.dtype}"


def levels(sigmas):
    """The noise levels that a call brings, (N,). Raises ValueError unless they are 1 to 1000 finite numbers."""
    try:
        values = np.asarray(sigmas, dtype=np.float32)
    except (TypeError, ValueError):
        values = None
    if values is None or values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"sigmas must be a list of finite numbers, not {sigmas!r}")
    if not 1 <= len(values) <= MAX_STEPS:
        raise ValueError(f"sigmas must be 1 to {MAX_STEPS} numbers, not {len(values)}")
    return values


def whole(name, value, low=None, high=None):
    """The value as an int. Raises ValueError unless it is a whole number in [low, high]."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    outside = number is not None and (low is not None and number < low or high is not None and number > high)
    if number is None or outside:
        allowed = "" if low is None else f" from {low} on" if high is None else f" in [{low}, {high}]"
        raise ValueError(f"{name} must be a whole number{allowed}, not {value!r}")
    return number


def finite(name, value):
    """Raises ValueError unless this is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
