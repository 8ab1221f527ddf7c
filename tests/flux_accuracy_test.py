"""Cached pictures are as good as uncached ones: over prompts, sizes, thresholds and orders.

    .venv/bin/pytest tests/flux_accuracy_test.py
    .venv/bin/pytest tests/flux_accuracy_test.py --ckpt path/to/FLUX.1-dev --clip path/to/clip-vit-large-patch14

With --accuracy_path FOLDER the pictures are kept, and what is there already is not drawn again.
"""

import json
import math
import subprocess
import sys

import generate_clip_score_datas
import pytest

from FBCache_ms.eval.shared.floors import FLOOR_ELSEWHERE, FLOORS, MOST_LOST_CLIP_SCORE, is_embedded
from FBCache_ms.runtime.checkpoint import TINY_FLUX


def embedded(config):
    return is_embedded(config.getoption("--ckpt") or TINY_FLUX)


@pytest.fixture(scope="module")
def figures(pytestconfig, tmp_path_factory):
    """{(threshold, order): the figures of each size}."""
    folder = pytestconfig.getoption("--accuracy_path") or str(tmp_path_factory.mktemp("accuracy"))
    options = ["--save_path", folder]
    for name in ("--ckpt", "--clip", "--prompts", "--limit"):
        if pytestconfig.getoption(name) is not None:
            options += [name, pytestconfig.getoption(name)]
    # A process of its own: this one has chosen the CPU already.
    subprocess.run([sys.executable, generate_clip_score_datas.__file__, *options], check=True)
    with open(f"{folder}/accuracy.json") as stream:
        rows = json.load(stream)
    figures = {key: [row for row in rows if (row["threshold"], row["order"]) == key] for key in FLOORS}
    assert {len(rows) for rows in figures.values()} == {2}, "every setting has two sizes"
    return figures


@pytest.fixture(scope="module")
def floors(pytestconfig):
    return FLOORS if embedded(pytestconfig) else dict.fromkeys(FLOORS, FLOOR_ELSEWHERE)


@pytest.mark.parametrize("threshold, order", FLOORS)
def test_the_pictures_are_near_the_uncached_ones(threshold, order, figures, floors):
    for row in figures[threshold, order]:
        floor = floors[threshold, order]
        psnr = math.inf if row["psnr"] is None else row["psnr"]
        assert psnr >= floor["psnr"] and row["ssim"] >= floor["ssim"], row["image_size"]


@pytest.mark.parametrize("threshold, order", FLOORS)
def test_the_clip_score_is_that_of_the_uncached_pictures(threshold, order, figures, pytestconfig):
    for row in figures[threshold, order][: 1 if embedded(pytestconfig) else None]:
        if row["clip_score"] is None:
            pytest.skip("no CLIP score without --clip, a CLIPModel in transformers layout")
        assert row["clip_score"] == pytest.approx(row["uncached_clip_score"], abs=MOST_LOST_CLIP_SCORE)


@pytest.mark.parametrize("order", [0, 1])
def test_a_larger_threshold_computes_less(order, figures):
    by_threshold = [rows for (_, each), rows in sorted(figures.items()) if each == order]
    for rows in zip(*by_threshold):
        computed = [row["computed_steps"] for row in rows]
        assert computed == sorted(computed, reverse=True) and computed[-1] < computed[0]
