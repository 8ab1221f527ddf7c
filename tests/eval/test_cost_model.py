import csv
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from FBCache_ms.config import PRESETS, CacheConfig
from FBCache_ms.eval import cost_model
from FBCache_ms.eval.shared.published import (
    ATLAS,
    L20,
    LONGEST_TURN,
    PLAIN,
    SHAPES,
    best,
    fits,
    neighbours,
    predict,
    predict_rows,
    with_fusion,
)
from FBCache_ms.predict.roofline import PER_STEP, PYNATIVE, WHOLE_LOOP
from FBCache_ms.runtime.checkpoint import TINY_FLUX

FIT = best(ATLAS)


def run_program(folder, *options):
    return cost_model.main(["--save_path", str(folder), *options])


def test_one_device_gives_the_published_times_of_the_atlas_within_2_per_cent():
    predicted = predict_rows(ATLAS, FIT, FIT.device, PER_STEP)
    assert predicted == pytest.approx((12.7, 7.68, 6.35), rel=0.02)
    assert predicted == pytest.approx(FIT.predicted)
    assert FIT.error == pytest.approx(max(abs(a / b - 1) for a, b in zip(predicted, (12.7, 7.68, 6.35))))
    assert predict(FIT.device, PYNATIVE, PLAIN, 28) == pytest.approx(17.5)


def test_one_device_gives_paraattentions_times_within_2_per_cent():
    fit = best(L20)
    assert fit.predicted == pytest.approx((26.36, 21.83, 17.01, 16.0, 13.78), rel=0.02)
    assert list(fit.reused) == sorted(fit.reused)


def test_the_published_times_imply_a_dozen_reuses_and_three_more_and_nothing_far_from_it():
    assert FIT.reused == (12, 15)
    near = {fit.reused: fit for fit in neighbours(ATLAS, FIT)}
    assert len(near) == 9 and near[12, 15].error == FIT.error
    assert all(fit.error > 2 * FIT.error for reused, fit in near.items() if reused != (12, 15))
    fitting = [fit.reused for fit in fits(ATLAS) if fit.error < 0.05 and fit.device.turn_seconds <= LONGEST_TURN]
    assert set(fitting) <= {(first, second) for first in range(10, 14) for second in range(13, 17)}


@pytest.mark.parametrize("published", [ATLAS, L20])
def test_a_fitted_device_is_a_possible_one(published):
    fit = best(published)
    assert 0 < fit.device.efficiency <= 1 and 0 <= fit.device.turn_seconds <= LONGEST_TURN
    assert fit.error == min(each.error for each in fits(published) if each.device.turn_seconds <= LONGEST_TURN)


def test_times_made_by_the_model_give_back_their_device_and_decisions():
    device = replace(ATLAS.device, efficiency=0.6, turn_seconds=0.03)
    steps, (low, high) = 20, ATLAS.configs
    made = replace(
        ATLAS,
        steps=steps,
        uncached=predict(device, PER_STEP, PLAIN, steps),
        cached=(
            (0.08, predict(device, PER_STEP, low, steps, (13,))),
            (0.12, predict(device, PER_STEP, high, steps, (6,))),
        ),
        pynative=None,
    )
    fit = best(made)
    assert fit.reused == (7, 14)
    assert (fit.device.efficiency, fit.device.turn_seconds) == pytest.approx((0.6, 0.03))


def test_pynatives_time_comes_of_launching_or_of_fusion_with_the_same_decisions():
    fused = with_fusion(ATLAS)
    assert fused.reused == FIT.reused and 0 < fused.device.fused < 1 and fused.device.dispatch_seconds == 0
    assert predict(fused.device, PYNATIVE, PLAIN, 28) == pytest.approx(17.5, rel=1e-3)
    assert fused.predicted == pytest.approx((12.7, 7.68, 6.35), rel=0.05)


def test_each_change_gains_what_it_should():
    rows = cost_model.changes(ATLAS, FIT, with_fusion(ATLAS))
    published, loop, hoisted, lean, ours, turns, _ = rows.values()
    assert all(
        low < high for before, after in zip((published, loop), (loop, hoisted)) for high, low in zip(before, after)
    )
    assert all(gain == pytest.approx(27 * FIT.device.turn_seconds) for gain in map(float.__sub__, published, loop))
    assert all(gain == pytest.approx(27 * FIT.device.turn_seconds) for gain in map(float.__sub__, turns, ours))
    assert lean[0] == hoisted[0] and lean[1] < hoisted[1] and lean[2] < hoisted[2]
    assert ours[0] == lean[0] and ours[1] > lean[1]
    assert all(mine < theirs for mine, theirs in zip(ours, published))


def make_run(tag, steps, computed, shapes=SHAPES):
    return cost_model.Run(shapes, 16, CacheConfig.named(tag), steps, computed)


def test_growth_in_every_direction():
    rows = cost_model.growth(FIT.device, FIT.device, make_run("F1B0_W0_T1O2_R0.12", 28, (14,)))
    for kind in ("image size", "steps", "batch"):
        column = [row["predicted_cached"] for row in rows if row["grows"] == kind]
        assert len(column) > 3 and column == sorted(column) and column[-1] > 5 * column[0]
    reused = [row["predicted_reused_step"] for row in rows if row["grows"] == "order"]
    assert reused == sorted(set(reused)) and len(reused) == 4
    assert [row["computed_steps"] for row in rows if row["grows"] == "steps"] == ["2", "7", "14", "25"]
    here = [row for row in rows if (row["grows"], row["value"]) == ("image size", 1024)][0]
    expected = predict(FIT.device, WHOLE_LOOP, CacheConfig.named(here["config"]), 28, (14,))
    assert here["predicted_cached"] == expected < here["predicted_uncached"]


def test_growth_keeps_to_the_orders_and_steps_that_a_configuration_has():
    dicache = cost_model.growth(FIT.device, FIT.device, make_run("dicache", 28, (9,)))
    assert [row["value"] for row in dicache if row["grows"] == "order"] == [1]
    own = "F0B0_W0_R0.12,gate=static,steps_computation_mask=1101"
    masked = cost_model.growth(FIT.device, FIT.device, make_run(own, 4, (3,)))
    assert [row["steps"] for row in masked if row["grows"] == "steps"] == [4]


@pytest.mark.parametrize(
    "tag, steps, given, expected",
    [
        ("taylorseer", 28, None, (8,)),
        ("fora", 50, None, (17,)),
        (str(PLAIN), 28, None, ()),
        ("F1B0_W0_R0", 28, None, (28,)),
        ("F1B0_W4_R0.12", 28, [4], (4,)),
        ("double_gate", 28, [14, 16], (14, 16)),
    ],
)
def test_the_steps_that_are_computed(tag, steps, given, expected):
    assert cost_model.computed_steps(CacheConfig.named(tag), steps, given) == expected


def test_the_program_writes_its_tables_and_chart_and_says_predicted_in_all(tmp_path, capsys):
    into = tmp_path / "page.md"
    assert run_program(tmp_path / "out", "--into", str(into)) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "cost_model.md").read_text() == text
    assert into.read_text().split("\n\n", 2)[2] == text
    lines = text.splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("| --- ")]
    assert len(heads) == 5
    for head in heads:
        assert "Predicted" in lines[head - 1] and "redicted" in lines[head - 3]
    data = json.loads((tmp_path / "out" / "cost_model.json").read_text())
    assert list(data) == ["predicted"] and data["predicted"]["fits"][0]["reused"] == [12, 15]
    with open(tmp_path / "out" / "cost_model.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(data["predicted"]["growth"])
    assert float(rows[0]["predicted_cached"]) == data["predicted"]["growth"][0]["predicted_cached"]
    page = (tmp_path / "out" / "cost_model.html").read_text()
    assert "Predicted, not measured" in page and "<script src=" not in page


def test_the_program_needs_no_mindspore(tmp_path):
    """It would take seconds to load."""
    command = "import sys; from FBCache_ms.eval import cost_model; cost_model.main(sys.argv[1:])"
    command += "; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", command, "--save_path", str(tmp_path)], check=True, capture_output=True)


def test_a_checkpoint_and_a_devices_figures_are_taken(tmp_path, capsys):
    """By the device with fused operators, too."""
    options = ("--ckpt", str(TINY_FLUX), "--image_size", "64", "64", "--text_tokens", "32", "--cache", "fora")
    figures = (
        "--peak_tflops",
        "2",
        "--bandwidth_gbs",
        "20",
        "--efficiency",
        "0.5",
        "--turn_ms",
        "0",
        "--launch_us",
        "0",
    )
    assert run_program(tmp_path, *options, *figures) == 0
    data = json.loads((tmp_path / "cost_model.json").read_text())["predicted"]
    for device in (data["device"], data["fused_device"]):
        assert (device["peak"], device["bandwidth"], device["efficiency"]) == (2e12, 2e10, 0.5)
    assert data["device"]["fused"] == 0 < data["fused_device"]["fused"]
    assert capsys.readouterr().out.count("50% of 2.0 TFLOPS and of 20 GB/s") == 2
    assert math.isclose(sum(pair[0] for pair in data["parts"].values()), data["growth"][-4]["predicted_computed_step"])
    # The 4.5 million parameters are read at each step.
    assert data["growth"][0]["predicted_computed_step"] > 2 * 4.5e6 / 1e10


def test_a_run_is_predicted_from_its_file(tmp_path):
    run = {
        "config": "F1B0_W0_T1O1_R0.2",
        "steps": 14,
        "image_size": [512, 768],
        "computed_steps": [0, 1, 5],
        "pictures": 2,
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    args = cost_model.parse_arguments(["--run", str(tmp_path / "run.json"), "--save_path", str(tmp_path)])
    assert (args.what.steps, args.what.computed, args.what.shapes.image_tokens) == (14, (3,), 32 * 48)
    assert args.what.config == CacheConfig.from_tag("F1B0_W0_T1O1_R0.2")
    shapes = args.what.shapes
    assert (shapes.batch, shapes.weight_itemsize) == (2, None)
    for component, itemsize in {"transformer": 1, "text_encoder_2": None}.items():
        (tmp_path / "run.json").write_text(json.dumps({**run, "quantize": {component: {"quant_type": "int8"}}}))
        args = cost_model.parse_arguments(["--run", str(tmp_path / "run.json"), "--save_path", str(tmp_path)])
        assert args.what.shapes.weight_itemsize == itemsize


def test_a_run_of_true_guidance_is_not_predicted(tmp_path, capsys):
    run = {"config": "F1B0_W0_R0.2", "steps": 2, "image_size": [64, 64], "computed_steps": [0], "pictures": 1}
    (tmp_path / "run.json").write_text(json.dumps({**run, "branches": 2}))
    with pytest.raises(SystemExit):
        cost_model.parse_arguments(["--run", str(tmp_path / "run.json"), "--save_path", str(tmp_path)])
    assert "is of true classifier-free guidance, which is not predicted" in capsys.readouterr().err


def test_a_run_of_two_gates_needs_the_computed_steps_of_each(tmp_path, capsys):
    run = {"config": "double_gate", "steps": 14, "image_size": [512, 768], "computed_steps": [0, 1, 5], "pictures": 2}
    (tmp_path / "run.json").write_text(json.dumps(run))
    options = ["--run", str(tmp_path / "run.json"), "--save_path", str(tmp_path)]
    with pytest.raises(SystemExit):
        cost_model.parse_arguments(options)
    assert "give --computed_steps, 2 in all" in capsys.readouterr().err
    assert cost_model.parse_arguments([*options, "--computed_steps", "3", "4"]).what.computed == (3, 4)
    (tmp_path / "run.json").write_text(json.dumps({**run, "config": "fora"}))
    with pytest.raises(SystemExit):
        cost_model.parse_arguments([*options, "--computed_steps", "3"])
    assert "--run says --computed_steps too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cache", "balanced"], "give --computed_steps, 1 in all"),
        (["--cache", "double_gate", "--computed_steps", "14"], "--computed_steps must be 2 for"),
        (["--computed_steps", "29"], "--computed_steps must be in [1, 28], not 29"),
        (["--cache", "fora", "--computed_steps", "11"], "--computed_steps must be in [10, 10], not 11"),
        (["--cache", "F57B0_W0_R0.1", "--computed_steps", "3"], "leave none of the transformer's 57 blocks"),
        (["--cache", "quick"], "cache 'quick' is no tag like"),
        (["--image_size", "1000", "1024"], "--image_size must be positive multiples of 16, not 1000 1024"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be in [1, 1000], not 0"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, not 0"),
        (["--text_tokens", "0"], "--text_tokens must be 1 or more, not 0"),
        (["--efficiency", "1.5"], "--efficiency must be in (0, 1], not 1.5"),
        (["--peak_tflops", "0"], "--peak_tflops must be a number above 0, not 0.0"),
        (["--turn_ms", "nan"], "--turn_ms must be 0 or more, not nan"),
        (["--ckpt", "nowhere"], "checkpoint file nowhere/transformer/config.json is missing"),
        (["--run", "nowhere.json"], "--run nowhere.json cannot be read"),
        (["--run", __file__], "is no run.json of fbcache-flux"),
        (["--run", "nowhere.json", "--cache", "fora"], "--run says --cache"),
        (["--run", "nowhere.json", "--batch_size", "2"], "--run says --cache"),
        (["--into", "nowhere/page.md"], "--into nowhere/page.md: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run_program(tmp_path, *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("cost_model: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_computes_is_told_for_each_gate_that_decides(preset):
    config = CacheConfig.preset(preset)
    steps = len(config.steps_computation_mask or range(50))
    known = cost_model.known_steps(config, steps)
    assert len(known) == (2 if config.span == "stacks" else 1)
    assert all(1 <= least <= most <= steps for least, most in known)
