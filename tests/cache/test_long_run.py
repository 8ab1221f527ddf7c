"""Many generations in one process; benchmarks/long_run.py makes it 500."""

import psutil
import pytest
from long_run import growth, rows_of, run
from narrow import make_narrow

import mindspore as ms

from FBCache_ms import CacheConfig
from FBCache_ms.models.base import Model
from FBCache_ms.models.transformer_flux_withFBCache import FluxModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    before = ms.get_context("mode")
    yield make_narrow(tmp_path_factory.mktemp("long_run") / "narrow")
    ms.set_context(mode=before)


LAUNCHES = 60
LEFT = 10e6
"""Bytes that may be left by so many. MindSpore keeps some 80 kB a launch; a kilobyte a weight would be 14 MB more."""


@pytest.mark.parametrize("hands_over", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_launches_of_a_loop_leave_no_memory(pipe, monkeypatch, hands_over):
    embeds, config = pipe.embeddings("a big red circle in the center, blue background"), CacheConfig(0.3)
    if hands_over:
        monkeypatch.setattr(FluxModel, "hands_over_blocks", Model.hands_over_blocks)
        # Another structure, and so a graph of its own.
        config = config.changed(taylorseer_derivative=1)

    def draw():
        pipe(**embeds, num_inference_steps=8, output_type="latent", cache_config=config)

    for _ in range(10):
        draw()
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(LAUNCHES):
        draw()
    assert process.memory_info().rss - before < LEFT


@pytest.mark.slow
def test_a_known_shape_is_not_compiled_again_and_answers_stay_the_same(checkpoint):
    record = run(checkpoint, generations=40, different=8, kept_shapes=16)
    assert record["compilations"] == record["graphs"] == record["alive"] > 4
    assert record["repeated"] > 20 and record["wrong"] == 0
    assert len(record["resident_MB"]) == 40 and min(record["resident_MB"]) > 100
    (row,) = rows_of(record)
    assert row["Shapes and Settings of Graphs"] == record["graphs"]
    assert row["Growth (MB per 100)"] == f"{growth(record):.2f}"


@pytest.mark.release
def test_graphs_beyond_the_bound_are_freed_and_answers_stay_the_same(checkpoint):
    record = run(checkpoint, generations=12, different=6, kept_shapes=1, seed=1)
    assert record["alive"] == 2 < record["graphs"] < record["compilations"]
    assert record["repeated"] > 2 and record["wrong"] == 0
