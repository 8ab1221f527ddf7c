"""The cache on and off each of mindone's Flux pipelines."""

import further
import mindone.diffusers
import numpy as np
import pytest
from make_family import make
from narrow import make_narrow

import mindspore as ms

from FBCache_ms import CacheConfig, apply_cache_on_pipe, remove_cache_from_pipe
from FBCache_ms.eval.family import OTHER, PIPELINES, break_off, draw, load, measure, uncached
from FBCache_ms.eval.shared.metrics import psnr

OFF, ON = CacheConfig(0.0), CacheConfig(0.4)
STEPS = {"num_inference_steps": 10}


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Gives a pipeline by its name; those of one layout share all their components, and all share the encoders."""
    folder, made, shared = tmp_path_factory.mktemp("family"), {}, {}
    narrow = make_narrow(folder / "narrow", 1, 1)

    def pipeline(name):
        layout = PIPELINES[name].layout
        if layout not in made:
            first = load(name, make(folder / layout, layout, narrow), **shared)
            optional = ("image_encoder", "feature_extractor")
            made[layout] = {part: each for part, each in first.components.items() if part not in optional}
            shared.update({part: first.components[part] for part in ("vae", "text_encoder", "text_encoder_2")})
        kind = getattr(mindone.diffusers, name)
        pipe = kind(**made[layout])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


def test_every_pipeline_with_a_flux_transformer_is_here():
    names = [name for name in dir(mindone.diffusers) if name.startswith("Flux") and name.endswith("Pipeline")]
    others = {"FluxPriorReduxPipeline", "Flux2Pipeline", "FluxModularPipeline"}
    assert set(names) - others == set(PIPELINES)


@pytest.mark.parametrize("name", further.after(4, PIPELINES))
def test_off_it_is_mindones_on_it_is_near_removed_it_is_gone(family, name):
    pipe = family(name)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    plain = uncached(pipe, **STEPS)
    apply_cache_on_pipe(pipe, OFF)
    np.testing.assert_allclose(draw(pipe, **STEPS), plain, atol=1e-4)
    assert not any(pipe.transformer.cache_stats.reused)

    apply_cache_on_pipe(pipe, ON)
    cached = draw(pipe, **STEPS)
    assert pipe.transformer.cache_stats.cached_steps
    assert 20 < psnr(plain, cached) < 60
    draw(pipe, OTHER, seed=1, **STEPS, callback_on_step_end=break_off)
    np.testing.assert_array_equal(draw(pipe, **STEPS), cached)
    assert len(pipe.transformer.steps) == 1

    remove_cache_from_pipe(pipe)
    assert pipe.transformer is transformer and pipe.scheduler is scheduler
    np.testing.assert_array_equal(uncached(pipe, **STEPS), plain)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["F1B0_W0_R0.6,span=stacks,residual_diff_threshold_single=0.6", "teacache"])
def test_the_table_holds_every_gate_against_a_run_that_reuses_nothing(cache, tmp_path):
    folder = make(tmp_path / "dev", "dev", make_narrow(tmp_path / "narrow", 3, 2))
    row = measure("FluxPipeline", folder, CacheConfig.named(cache), 6, 1, {})
    assert row["Cache off, Largest Difference"] < 1e-4 and not row["Reused"].startswith("0")
    assert row["After Others"] == row["Removed"] == "the same bits"


@pytest.mark.slow
def test_an_xlabs_controlnets_residuals_are_taken_in_turn(tmp_path):
    folder = make(tmp_path / "xlabs", "controlnet_xlabs", make_narrow(tmp_path / "narrow", 3, 1))
    pipe = load("FluxControlNetPipeline", folder)
    plain = uncached(pipe, **STEPS)
    assert np.abs(uncached(pipe, **STEPS, controlnet_conditioning_scale=0.0) - plain).max() > 0.01
    apply_cache_on_pipe(pipe, OFF)
    np.testing.assert_allclose(draw(pipe, **STEPS), plain, atol=1e-4)
    apply_cache_on_pipe(pipe, ON)
    assert 20 < psnr(plain, draw(pipe, **STEPS)) < 60
    assert pipe.transformer.cache_stats.cached_steps


class AuthorsEasyCache:
    """In a transformer's place, EasyCache as its authors have it, in float64: arXiv 2507.02860."""

    def __init__(self, transformer, threshold, warmup, steps):
        self.transformer, self.threshold, self.warmup, self.steps = transformer, threshold, warmup, steps
        self.computed, self.reused, self.previous, self.error = [], [], None, 0.0

    def __getattr__(self, name):
        return getattr(self.transformer, name)

    def __call__(self, hidden_states, **inputs):
        step, channels = len(self.reused), self.transformer.proj_out.weight.shape[0]
        latents, hit = hidden_states.asnumpy()[..., :channels].astype(float), False
        if len(self.computed) > 1 and self.warmup <= step < self.steps - 1:
            (older, v_older), (last, v_last) = self.computed[-2:]
            slope = np.abs(v_last - v_older).mean() / np.abs(last - older).mean()
            self.error += slope * np.abs(latents - self.previous).mean() / np.abs(v_last).mean()
            hit = self.error < self.threshold
        self.reused.append(hit)
        self.previous = latents
        if hit:
            return (ms.Tensor(latents + (v_last - last), ms.float32),)
        velocity = self.transformer(hidden_states, **inputs)
        self.computed.append((latents, velocity[0].asnumpy().astype(float)))
        self.error = 0.0
        return velocity


@pytest.mark.parametrize("threshold", further.after(1, [0.2, 0.4]))
@pytest.mark.parametrize("name", ["FluxPipeline", "FluxControlPipeline", "FluxFillPipeline", "FluxKontextPipeline"])
def test_easycache_is_its_authors(family, name, threshold):
    """Control and Fill feed the transformer more channels than the velocity has."""
    pipe, steps = family(name), 20
    transformer = pipe.transformer
    authors = AuthorsEasyCache(transformer, threshold, 3, steps)
    pipe.__dict__["transformer"] = authors
    expected = draw(pipe, num_inference_steps=steps, output_type="latent")
    pipe.__dict__["transformer"] = transformer
    apply_cache_on_pipe(pipe, CacheConfig(gate="easycache", easycache_threshold=threshold, warmup_steps=3))
    got = draw(pipe, num_inference_steps=steps, output_type="latent")
    assert list(pipe.transformer.cache_stats.reused) == authors.reused
    assert 0 < sum(authors.reused) < steps - 4
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)
    remove_cache_from_pipe(pipe)
