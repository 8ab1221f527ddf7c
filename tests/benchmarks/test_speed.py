"""The arithmetic of benchmarks/overhead.py, sweep_time.py and growth.py."""

import json
import subprocess
from types import SimpleNamespace

import cpu_stand_ins
import long_run
import numpy as np
import overhead
import pytest
import speed
from growth import QUANTITIES, TERMS, VALUES, Point, fit_row, measure, power, shares, terms
from mindone.diffusers import FluxTransformer2DModel
from narrow import make_narrow
from overhead import FIRST, FULL, ORDERS
from sweep_time import configs, record, rows_of

import mindspore as ms

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.machine import machine


def measured(reused_step=0.2):
    """Two runs of ten steps: a step without a cache takes 1 and 1.1 s, the first block 0.1 and 0.2 s."""
    figures = {FULL: ([10.0, 11.0], 10), FIRST: ([1.0, 2.0], 10)}
    for order in ORDERS:
        figures[order, None] = [10.5, 11.5], 10
        figures[order, 1] = [1.05 + 9 * reused_step, 1.15 + 9 * reused_step], 1
        figures[order, 0.1] = [8.8, 9.8], 8
    return figures


def test_a_generations_limit_is_what_its_steps_must_take():
    first, *others = overhead.generations("embedded", 10, measured())
    assert [figures["order"] for figures in (first, *others)] == list(ORDERS)
    assert first["limits"] == pytest.approx([8 * 1.0 + 2 * 0.1, 8 * 1.1 + 2 * 0.2])
    assert first["ratios"] == pytest.approx([8.8 / 8.2, 9.8 / 9.2])
    assert overhead.generation_row(first)["Computed"] == "8 of 10"


def test_the_excess_is_divided_between_computed_and_reused_steps():
    first = overhead.parts("embedded", 10, measured(reused_step=0.2))[0]
    assert first["computed"] == pytest.approx([1.05, 1.15]) and first["reused"] == pytest.approx([0.2, 0.2])
    row = overhead.part_row(first)
    assert row["Ratio"].startswith("1.048") and row["Its Ratio"] == "1.500 (1.000 to 2.000)"


@pytest.mark.parametrize("structures", [1, 2, 4])
def test_a_sweep_has_50_settings_of_so_many_structures(structures):
    chosen = configs(50, structures)
    assert len(set(chosen)) == 50 and len({config.structure for config in chosen}) == structures
    assert all(isinstance(config, CacheConfig) for config in chosen)


def test_a_sweeps_parts_add_up_to_its_time():
    calls = [{"compile": 2.0, "denoise": 3.0, "decode": 0.5, "total": 6.0}, {"denoise": 1.0, "decode": 0.5}]
    sweep = record(10.0, calls, 0.25, [3.0, 1.0])
    assert sum(sweep[name] for name in ("compile", "text", "denoise", "decode", "rest")) == sweep["wall"] == 10
    assert sweep["ratio"] == 2.5 and sweep["rest"] == 2.75
    first, others = rows_of("a way", [sweep, sweep, sweep])
    assert first["Ratio"] == others["Ratio"] == "2.500 (2.500 to 2.500)" and others["Sweep"] == "median of 2"


def test_a_power_is_found_again():
    n = np.array([64, 256, 1024, 4096])
    assert power(n, 3 * n**1.5) == pytest.approx((1.5, 1))
    exponent, r2 = power(n, 5 + 0.001 * n**2)
    assert 0.5 < exponent < 2 and 0.5 < r2 < 1
    assert power(n, np.full(4, 7.0)) == pytest.approx((0, 1))


def test_terms_are_found_again_and_none_is_below_0():
    n = np.array([64, 256, 1024, 4096])
    assert terms(n, 3 + 0.02 * n + 0.0001 * n**2, 2) == pytest.approx([3, 0.02, 0.0001])
    assert terms(n, 10 - 0.001 * n, 1).min() == 0
    assert shares(n, 4096 + n, 1) == pytest.approx([0.5, 0.5])


def test_every_quantity_has_names_for_its_terms():
    assert set(TERMS) == set(VALUES) == set(vars(Point()))
    assert all(set(names) == set(QUANTITIES) for names in TERMS.values())
    points = [(order, {"computed": [1.0, 2.0, 3.0], "cache_bytes": 1000 * (order + 2)}) for order in VALUES["order"]]
    assert fit_row("order", "computed", points)["At the Largest"] == "100% blocks"
    row = fit_row("order", "cache_bytes", points)
    assert row["Varies"] == "order + 1" and row["At the Largest"].startswith("20% reference") and "80%" in str(row)


def test_a_point_is_measured(strict_graph_mode):
    figures = measure(Point(tokens=16, blocks=3, order=1, batch=2), 2)
    assert set(figures) == set(QUANTITIES) and len(figures["computed"]) == len(figures["reused"]) == 2
    assert min(figures["computed"]) > 0 and figures["peak_bytes"] > figures["cache_bytes"] > 4 * 2 * 16 * 64 * 3
    assert ms.get_context("mode") == ms.GRAPH_MODE


@pytest.mark.release
@pytest.mark.parametrize("installed", ["plain"], indirect=True)
def test_candidates_for_stand_ins_draw_the_same(installed, strict_graph_mode, tmp_path):
    folder = make_narrow(tmp_path / "narrow") / "transformer"
    transformer, arguments = FluxTransformer2DModel.from_pretrained(str(folder)), cpu_stand_ins.inputs(2)
    loops = cpu_stand_ins.compiled(transformer, arguments, cpu_stand_ins.CANDIDATES)
    rows = cpu_stand_ins.table_of(*cpu_stand_ins.measure(loops, arguments, 1))
    assert [row["Candidate"] for row in rows] == [cpu_stand_ins.IN_USE, *cpu_stand_ins.CANDIDATES]
    assert max(float(row["Largest Difference"]) for row in rows) < 1e-4


def test_the_machine_has_a_name():
    assert machine()["cores"] >= 1 and machine()["processor"] and machine()["mindspore"] == ms.__version__


def test_a_benchmark_that_fails_leaves_no_earlier_table(tmp_path, monkeypatch):
    for name in ("overhead", "growth"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"of": "last month"}))
        (tmp_path / f"{name}.md").write_text("last month's")
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    assert speed.main(["--only", "growth", "--save_path", str(tmp_path)]) == 1
    assert set(json.loads((tmp_path / "speed.json").read_text())) == {"overhead"}


@pytest.mark.parametrize("memory, slope", [([5.0, 6.0, 7.0], 100), ([5.0], np.nan), ([], np.nan)])
def test_a_long_run_that_ends_with_a_new_graph_has_no_slope(memory, slope):
    record = {"resident_MB": [9.0, *memory], "last_new": 0}
    assert long_run.growth(record) == pytest.approx(slope, nan_ok=True)
