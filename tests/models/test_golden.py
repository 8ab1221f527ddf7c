"""Our pictures and decisions against torch's, on the same weights and latents (tools/golden made the files)."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import CACHED, DBCACHE, IMAGES, LEAK, PUBLISHED, TAYLORSEER, call_arguments
from replay import Streams, replay

import mindspore as ms

from FBCache_ms import CacheConfig

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name, cases):
    """The arrays of a golden file, after a check that it was made for these cases."""
    arrays = np.load(FOLDER / name)
    assert json.loads(str(arrays["about"]))["cases"] == cases, "run tools/golden again"
    return arrays


def cache_config(case, order):
    return CacheConfig(case["residual_diff_threshold"], order, case.get("warmup_steps", 0))


@pytest.mark.parametrize("index", range(len(IMAGES)))
def test_uncached_pictures_are_those_of_diffusers(pipe, index):
    expected = golden("images.npz", IMAGES)[f"images_{index}"]
    images = pipe(**call_arguments(IMAGES[index], ms.Tensor), cache_config=None)[0]
    assert images.shape == expected.shape
    assert np.abs(images - expected).max() < 1e-3


@pytest.mark.parametrize("index", range(len(CACHED)))
def test_decisions_and_pictures_are_those_of_para_attention(pipe, index):
    """With TaylorSeer after a warm-up of n + 2: ParaAttention forms no difference before its third step."""
    case, arrays = CACHED[index], golden("para_attention.npz", CACHED)
    config = cache_config(case, case.get("taylorseer_derivative", 0))
    images = pipe(**call_arguments(case, ms.Tensor), cache_config=config)[0]
    assert list(pipe.cache_stats.reused) == arrays[f"reused_{index}"].tolist()
    assert np.abs(images - arrays[f"images_{index}"]).max() < 1e-3


def test_the_golden_decisions_differ_between_thresholds():
    arrays = golden("para_attention.npz", CACHED)
    assert len({arrays[f"reused_{index}"].sum() for index in range(5)}) >= 4


@pytest.mark.parametrize("index", range(len(DBCACHE)), ids=[case["config"] for case in DBCACHE])
def test_decisions_differences_and_pictures_are_those_of_cache_dit(pipe, index):
    """Its run lengths are ours in 1.5.3. TaylorSeer after a warm-up of n + 3: it forms no difference before."""
    case, arrays = DBCACHE[index], golden("cache_dit.npz", [*DBCACHE, LEAK])
    config = CacheConfig.from_tag(case["config"])
    images = pipe(**call_arguments(case, ms.Tensor), cache_config=config)[0]
    assert list(pipe.cache_stats.reused) == arrays[f"reused_{index}"].tolist()
    ours, theirs = np.array(pipe.cache_stats.residual_diffs, float), arrays[f"diffs_{index}"]
    # cache-dit writes -1 where the threshold of 1 lets everything pass, and compares at no step that we do not.
    compared = theirs > 0
    assert not np.isnan(ours[compared]).any()
    np.testing.assert_allclose(ours[compared], theirs[compared], rtol=2e-3)
    assert np.abs(images - arrays[f"images_{index}"]).max() < 1e-3


def test_cache_dits_leak_is_not_ours(pipe):
    """Under a transformer's own cache, its second picture's first step reuses what is left of the first picture."""
    reused = golden("cache_dit.npz", [*DBCACHE, LEAK])[f"reused_{len(DBCACHE)}"]
    assert reused.all()
    for _ in range(2):
        pipe(**call_arguments(LEAK, ms.Tensor), cache_config=CacheConfig.from_tag(LEAK["config"]))
        assert pipe.cache_stats.computed_steps == [0]


EXACT = [index for index, case in enumerate(PUBLISHED) if case["code"] != "DiCache"]


@pytest.mark.parametrize("index", EXACT, ids=[PUBLISHED[index]["config"] for index in EXACT])
def test_decisions_and_pictures_are_those_of_the_published_code(pipe, index):
    case, arrays = PUBLISHED[index], golden("published.npz", PUBLISHED)
    images = pipe(**call_arguments(case, ms.Tensor), cache_config=CacheConfig.from_tag(case["config"]))[0]
    assert list(pipe.cache_stats.reused) == arrays[f"reused_{index}"].tolist()
    assert np.abs(images - arrays[f"images_{index}"]).max() < 1e-3


DICACHE = [index for index, case in enumerate(PUBLISHED) if case["code"] == "DiCache"]


@pytest.mark.usefixtures("strict_graph_mode")
@pytest.mark.parametrize("index", DICACHE)
def test_dicache_decides_as_published_from_the_same_changes(index):
    """Its pictures differ: it adds the residual of all blocks to the embedded latents, we that of the skipped ones to
    what the first block gives."""
    case, arrays = PUBLISHED[index], golden("published.npz", PUBLISHED)
    reused, changes = arrays[f"reused_{index}"], arrays[f"changes_{index}"]
    streams = Streams(0, 24, 0)
    steps = len(reused) - 4
    streams.latents[:], streams.image[:, 0] = 0, np.cumprod(1 + changes[:24]).reshape(-1, 1, 1, 1)
    config = CacheConfig.from_tag(case["config"]).changed(end=1.0)
    assert list(replay(config, streams)[1].reused) == reused[:steps].tolist()


@pytest.mark.usefixtures("strict_graph_mode")
@pytest.mark.parametrize("index", range(len(TAYLORSEER)))
def test_schedule_and_forecast_are_those_of_taylorseers_published_code(index):
    """It forms no second difference before its third computed step, so order 2 is compared from the next one on."""
    case, arrays = TAYLORSEER[index], golden("taylorseer.npz", TAYLORSEER)
    computed, values, outputs = (arrays[f"{name}_{index}"] for name in ("computed", "values", "outputs"))
    config = CacheConfig(
        taylorseer_derivative=case["order"],
        gate="static",
        schedule="taylorseer",
        schedule_interval=case["interval"],
    )
    streams = Streams(0, 24, 0)
    streams.latents[:], streams.image[:] = 0, 0
    streams.image[:, 0] = values[:24].reshape(-1, 1, 1, 1)
    ours, stats = replay(config, streams)
    assert stats.computed_steps == np.flatnonzero(computed[:24]).tolist()
    begin = 3 if case["order"] == 1 else 2 + case["interval"]
    np.testing.assert_allclose(ours[begin:, 0, 0, 0], outputs[begin:24], rtol=1e-4, atol=1e-4)
