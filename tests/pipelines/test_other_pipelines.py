"""The cache on and off each of mindone's Qwen-Image and FLUX.2 pipelines."""

from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

import further
import mindone.diffusers
import numpy as np
import pytest
from mindone.diffusers import FlowMatchEulerDiscreteScheduler, QwenImageControlNetModel
from mindone.diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from PIL import Image
from small_models import (
    SIZES,
    TEXT_WIDTH,
    flux2_transformer,
    flux2_vae,
    mindones_own,
    qwen_transformer,
    qwen_vae,
    randomized,
    tensor,
)

import mindspore as ms

from FBCache_ms import CacheConfig, apply_cache_on_pipe, remove_cache_from_pipe

SIDE, STEPS = 64, 4
OFF, ON = CacheConfig(0.0), CacheConfig(1.0, warmup_steps=1, max_consecutive_cache_hits=1)


def picture(seed, mode="RGB"):
    """Coloured noise, or a mask, white where the picture is to change."""
    if mode == "L":
        return Image.fromarray(np.kron([[0, 255], [255, 255]], np.ones((SIDE // 2, SIDE // 2))).astype(np.uint8))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


@dataclass(frozen=True)
class Case:
    """What a pipeline is called with beside the prompt, the parts that it has beside the common ones, and prompts."""

    more: Dict[str, Any] = field(default_factory=dict)
    parts: Tuple[str, ...] = ()
    prompts: int = 1


IMAGE, MASK, STRENGTH = {"image": picture(0)}, {"mask_image": picture(0, "L")}, {"strength": 0.7}
SIZE = {"height": SIDE, "width": SIDE}
CASES = {
    "QwenImagePipeline": Case(SIZE),
    "QwenImageImg2ImgPipeline": Case({**SIZE, **IMAGE, **STRENGTH}),
    "QwenImageInpaintPipeline": Case({**SIZE, **IMAGE, **MASK, **STRENGTH}),
    "QwenImageEditPipeline": Case({**SIZE, **IMAGE}, ("processor",)),
    "QwenImageEditPlusPipeline": Case({**SIZE, "image": [picture(0), picture(1)]}, ("processor",)),
    "QwenImageEditInpaintPipeline": Case({**IMAGE, **MASK, **STRENGTH}, ("processor",)),
    "QwenImageControlNetPipeline": Case({**SIZE, "control_image": picture(0)}, ("controlnet",), 2),
    "QwenImageControlNetInpaintPipeline": Case(
        {**SIZE, "control_image": picture(0), "control_mask": picture(0, "L")}, ("inpainting",)
    ),
    "Flux2Pipeline": Case({"height": 16, "width": 16}),
}
"""mindone 0.5.0's pipelines with such a transformer."""


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Edit pipelines otherwise bring every picture to a megapixel."""
    patch = pytest.MonkeyPatch()
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        patch.setattr(module, "calculate_dimensions", lambda area, ratio: (SIDE, SIDE, None))
    patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (SIDE, SIDE))
    yield
    patch.undo()


class Encoded(tuple):
    """What an autoencoder gives, as mindone's ControlNet inpainting expects it and mindone's autoencoder gives none."""

    @property
    def latent_dist(self):
        return self

    def sample(self):
        return self[0][:, : self[0].shape[1] // 2]


def controlnet(**more):
    return randomized(QwenImageControlNetModel(num_layers=1, axes_dims_rope=(8, 12, 12), **SIZES, **more))


@pytest.fixture(scope="module", autouse=True)
def pynative_mode():
    """mindone's autoencoder of Qwen-Image does not compile."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The components of all pipelines."""
    vae = qwen_vae(tmp_path_factory.mktemp("vae"))
    # mindone's image-to-image and inpainting pipelines do not hand their generator to it.
    vae.diag_gauss_dist.deterministic = True
    encode = vae.encode
    vae.encode = lambda pictures, **more: Encoded(encode(pictures, **more))
    qwen = {"vae": vae, "transformer": qwen_transformer(2)}
    flux2 = {"vae": flux2_vae(), "transformer": flux2_transformer(1, 2)}
    others = {"processor": None, "controlnet": controlnet(), "inpainting": controlnet(extra_condition_channels=4)}
    return qwen, flux2, others


def pipeline(name, parts):
    """A pipeline of mindone's by its name."""
    qwen, flux2, others = parts
    common = {"text_encoder": None, "tokenizer": None, **(flux2 if name.startswith("Flux2") else qwen)}
    own = {"controlnet" if part == "inpainting" else part: others[part] for part in CASES[name].parts}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = getattr(mindone.diffusers, name)(scheduler=scheduler, **common, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(seed, batch, length, kind=""):
    """A prompt's embeddings and their mask, as Qwen-Image's pipelines take them."""
    text, mask = tensor(seed, batch, length, TEXT_WIDTH), ms.Tensor(np.ones((batch, length)), ms.int64)
    return {f"{kind}prompt_embeds": text, f"{kind}prompt_embeds_mask": mask}


def draw(pipe, seed=0, **settings):
    """Latents."""
    case = CASES[type(pipe).__name__]
    prompt = embeds(seed, case.prompts, 7)
    if type(pipe).__name__.startswith("Flux2"):
        del prompt["prompt_embeds_mask"]
    settings = {"num_inference_steps": STEPS, "output_type": "latent", **case.more, **settings}
    return pipe(**{**prompt, **settings}, generator=np.random.default_rng(seed))[0].asnumpy()


def test_every_pipeline_with_such_a_transformer_is_here():
    names = [name for name in dir(mindone.diffusers) if name.startswith(("QwenImage", "Flux2"))]
    assert {name for name in names if name.endswith("Pipeline") and "Modular" not in name} == set(CASES)


def break_off(pipe, step, timestep, tensors):
    """Interrupts the generation after its third step."""
    pipe._interrupt = step == 2
    return {}


@pytest.mark.parametrize("name", further.after(1, CASES))
def test_off_it_is_mindones_on_it_is_near_removed_it_is_gone(parts, name):
    pipe = pipeline(name, parts)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    with mindones_own(transformer):
        plain = draw(pipe)
    apply_cache_on_pipe(pipe, OFF)
    np.testing.assert_allclose(draw(pipe), plain, atol=1e-4)
    assert not any(pipe.transformer.cache_stats.reused) and len(pipe.transformer.steps) == 1

    apply_cache_on_pipe(pipe, ON)
    cached = draw(pipe)
    stats = pipe.transformer.cache_stats
    assert stats.cached_steps == list(range(1, len(stats.reused), 2)) and stats.uncond is None
    assert 1e-4 < np.abs(cached - plain).mean() / np.abs(plain).mean() < 0.5
    draw(pipe, seed=1, callback_on_step_end=break_off)
    np.testing.assert_array_equal(draw(pipe), cached)
    assert len(pipe.transformer.steps) == 1

    remove_cache_from_pipe(pipe)
    assert pipe.transformer is transformer and pipe.scheduler is scheduler
    with mindones_own(transformer):
        np.testing.assert_array_equal(draw(pipe), plain)


@pytest.mark.parametrize("length, steps", [(30, 1), (70, 2)])
def test_guidance_branches_of_other_lengths_are_both_told_of(parts, length, steps):
    """Texts of one bucket share a cached step; each branch has its own decisions in either case."""
    pipe = apply_cache_on_pipe(pipeline("QwenImagePipeline", parts), ON)
    whole = {**embeds(1, 1, length), **embeds(2, 1, 4, "negative_"), "true_cfg_scale": 2.0}
    draw(pipe, **whole)
    stats = pipe.transformer.cache_stats
    assert stats.cached_steps == stats.uncond.cached_steps == [1, 3] and 0.1 < stats.skipped < 0.5
    assert stats.residual_diffs != stats.uncond.residual_diffs and len(pipe.transformer.steps) == steps
    draw(pipe, **embeds(1, 1, length))
    assert pipe.transformer.cache_stats.uncond is None
