"""Pictures, decisions and latents of other families against torch's, on the same weights, which tools/golden made."""

import json
from pathlib import Path

import further
import numpy as np
import pytest
from cases import FLUX2_CACHED, FLUX2_IMAGES, QWENIMAGE_CACHED, QWENIMAGE_IMAGES, call_arguments
from make_models import make

import mindspore as ms

import FBCache_ms
from FBCache_ms import CacheConfig

FOLDER = Path(__file__).parents[1] / "golden"
FAMILIES = {
    "qwenimage": ("QwenImagePipeline", QWENIMAGE_IMAGES, QWENIMAGE_CACHED),
    "flux2": ("Flux2Pipeline", FLUX2_IMAGES, FLUX2_CACHED),
}
IMAGES = [(family, index) for family, (_, images, _) in FAMILIES.items() for index in range(len(images))]
CACHED = [(family, index) for family, (_, _, cached) in FAMILIES.items() for index in range(len(cached))]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Gives a family's pipeline, made once."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            make(folder, family)
            made[family] = getattr(FBCache_ms, FAMILIES[family][0]).from_pretrained(folder)
            made[family].set_progress_bar_config(disable=True)
        return made[family]

    return of


def golden(family):
    """A family's file, after a check that it was made for these cases."""
    arrays = np.load(FOLDER / f"{family}.npz")
    _, images, cached = FAMILIES[family]
    assert json.loads(str(arrays["about"]))["cases"] == [*images, *cached], "run tools/golden again"
    return arrays


@pytest.mark.parametrize("family, index", further.after([(family, 0) for family in FAMILIES], IMAGES))
def test_uncached_pictures_are_those_of_diffusers(pipeline, family, index):
    expected = golden(family)[f"images_{index}"]
    arguments = call_arguments(FAMILIES[family][1][index], ms.Tensor, family)
    images = pipeline(family)(**arguments, cache_config=None)[0]
    assert images.shape == expected.shape
    assert np.abs(images - expected).max() < 1e-3


@pytest.mark.parametrize(
    "family, index",
    further.after([(family, index) for family in FAMILIES for index in (0, 3)], CACHED),
    ids=[f"{f}-{FAMILIES[f][2][i]['config']}-{i}" for f, i in CACHED],
)
def test_decisions_differences_and_latents_are_those_of_cache_dit(pipeline, family, index):
    """In both branches, and by each gate; TaylorSeer after a warm-up of n + 3: it forms no difference before."""
    _, images, cached = FAMILIES[family]
    arrays, place, pipe = golden(family), index + len(images), pipeline(family)
    config = CacheConfig.from_tag(cached[index]["config"])
    latents = pipe(**call_arguments(cached[index], ms.Tensor, family), cache_config=config)[0].asnumpy()
    branches = [each for each in (pipe.cache_stats, pipe.cache_stats.uncond) if each is not None]
    gates = [gate for branch in branches for gate in branch.gates]
    assert len(gates) == len(arrays[f"reused_{place}"])
    for gate, reused, theirs in zip(gates, arrays[f"reused_{place}"], arrays[f"diffs_{place}"]):
        assert list(gate.reused) == reused.tolist()
        compared = theirs > 0
        ours = np.array(gate.residual_diffs, float)
        assert not np.isnan(ours[compared]).any()
        np.testing.assert_allclose(ours[compared], theirs[compared], rtol=2e-3)
    assert np.abs(latents - arrays[f"latents_{place}"]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_golden_decisions_differ_between_settings(family):
    arrays, first = golden(family), len(FAMILIES[family][1])
    counts = {arrays[f"reused_{first + index}"].sum() for index in range(len(FAMILIES[family][2]))}
    assert len(counts) >= 6
