"""Distilled models: four steps, FLUX.1's block counts, no guidance embedding."""

import numpy as np
import pytest
from make import make
from mindone.diffusers import FluxPipeline as MindoneFluxPipeline
from narrow import make_narrow

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.eval.shared.metrics import psnr

PROMPT = "a big red circle in the center, blue background"


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """The embedded checkpoint spread over 19 + 38 blocks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "schnell"
    make(folder)
    pipe = FluxPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return FluxPipeline.from_pretrained(str(make_narrow(tmp_path_factory.mktemp("few") / "narrow"))).components


def cached_loop(components, config):
    return apply_cache_on_pipe(FluxPipeline(**components), config), lambda pipe: pipe.cache_stats


def cached_step(components, config):
    pipe = apply_cache_on_pipe(MindoneFluxPipeline(**components), config)
    return pipe, lambda pipe: pipe.transformer.cache_stats


def draw_four(pipe):
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, height=64, width=64, num_inference_steps=4, max_sequence_length=32, output_type="latent")


def draw(pipe, config):
    arguments = {"num_inference_steps": 4, "generator": np.random.default_rng(0), "output_type": "np"}
    return pipe(PROMPT, **arguments, cache_config=config)[0]


@pytest.mark.slow
def test_first_and_last_blocks_may_be_most_of_them(schnell, pipe):
    config = CacheConfig.from_tag("F24B24_W2MC1_R0.8")
    uncached = draw(schnell, config.changed(warmup_steps=4))
    assert schnell.cache_stats.skipped == 0
    scheduler, pipe.scheduler = pipe.scheduler, schnell.scheduler
    np.testing.assert_allclose(uncached, draw(pipe, None), atol=1e-3)
    pipe.scheduler = scheduler
    cached = draw(schnell, config)
    assert schnell.cache_stats.computed_steps == [0, 1, 3]
    assert 1 / (1 - schnell.cache_stats.skipped) == pytest.approx(1.04, abs=0.01)
    assert 30 < psnr(uncached, cached) < 60
    assert schnell.graph_compilations == 1


@pytest.mark.parametrize(
    "tag, steps, alone",
    [
        ("F1B0_W0_R0.8", 4, True),
        ("F1B0_W0_R0.8", 5, False),
        ("F1B0_W1_R0.8", 4, False),
        ("F1B0_W0_R0.8,steps_computation_mask=1101", 4, False),
        ("F0B0_W0_R0.12,gate=static,schedule=fora", 4, False),
        ("F1B0_W0_R0", 4, False),
        ("F1B0_W0_R0,span=stacks,residual_diff_threshold_single=0.5", 4, True),
        ("F0B0_W0_R0.12,gate=teacache", 4, True),
        ("F0B0_W0_R0.12,gate=none", 4, False),
    ],
)
def test_few_steps_are_left_alone_unless_it_is_said_which_to_compute(tag, steps, alone):
    assert CacheConfig.from_tag(tag).leaves_alone(steps) is alone


@pytest.mark.parametrize("switch_on", [cached_loop, cached_step])
def test_four_steps_are_cached_only_if_asked_and_one_is_told(narrow, caplog, switch_on):
    config = CacheConfig(0.99)
    with caplog.at_level("WARNING"):
        pipe, stats = switch_on(narrow, config)
        draw_four(pipe)
    assert stats(pipe).computed_steps == [0, 1, 2, 3]
    assert "cache off: 4 steps are few; warmup_steps of 1 or more, or a schedule, put it on" in caplog.text
    caplog.clear()
    apply_cache_on_pipe(pipe, config.changed(warmup_steps=1))
    draw_four(pipe)
    assert stats(pipe).computed_steps == [0]
    assert "cache off" not in caplog.text
