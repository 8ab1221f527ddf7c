"""Our pictures and decisions against torch's, on the same weights and latents (tools/golden made the files)."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import CACHED, IMAGES, call_arguments

import mindspore as ms

from FBCache_ms import CacheConfig

FOLDER = Path(__file__).parent / "golden"


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
