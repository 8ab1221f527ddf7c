"""Distilled models: four steps, FLUX.1's block counts, no guidance embedding."""

import numpy as np
import pytest
from make import make

from FBCache_ms import CacheConfig, FluxPipeline
from FBCache_ms.eval.metrics import psnr

PROMPT = "a big red circle in the center, blue background"


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """The embedded checkpoint spread over 19 + 38 blocks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "schnell"
    make(folder)
    pipe = FluxPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, config):
    arguments = {"num_inference_steps": 4, "generator": np.random.default_rng(0), "output_type": "np"}
    return pipe(PROMPT, **arguments, cache_config=config)[0]


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
