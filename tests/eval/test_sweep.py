import csv
import json
import re
from argparse import Namespace

import numpy as np
import pytest
from narrow import make_narrow

from FBCache_ms.config import FITTED, OPTIONS, CacheConfig
from FBCache_ms.eval import benchmark, fid_mscoco, sweep, tune
from FBCache_ms.eval.shared.cases import CASES, UNCACHED, own_mask
from FBCache_ms.eval.shared.drawing import Painter, Setting
from FBCache_ms.eval.shared.measure import Judge, difference_limit
from FBCache_ms.eval.shared.pictures import PictureFolder

PROMPTS = ["a big red circle in the center, blue background", "a small green square on the left, white background"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options that make a program draw two prompts in no time."""
    folder = tmp_path_factory.mktemp("model")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    ckpt = make_narrow(folder / "narrow")
    return ["--ckpt", str(ckpt), "--image_size", "32", "32", "--num_inference_steps", "4", "--prompts", str(prompts)]


def test_every_rule_has_its_row():
    configs = [CacheConfig.named(row.cache_at(28)) for row in CASES["rules"]()]
    for name in ("gate", "forecast", "span", "schedule", "probe", "batch_reduction", "forecast_coordinate"):
        assert set(OPTIONS[name].allowed) <= {getattr(config, name) for config in configs}, name
    for name in ("max_consecutive_cache_hits", "max_accumulated_residual_diff", "end", "downsample_factor"):
        assert any(getattr(config, name) != getattr(CacheConfig(), name) for config in configs), name


@pytest.mark.parametrize(
    "cache, limit",
    [
        ("F1B0_W0_R0.2", 0.2),
        ("F1B0_W0_R0.2,span=stacks,residual_diff_threshold_single=0.1", 0.2),
        ("F1B0_W0_R0,span=stacks,residual_diff_threshold_single=0.1", 0.1),
        ("teacache", None),
    ],
)
def test_the_limit_is_that_of_the_gate_whose_differences_are_shown(cache, limit):
    assert difference_limit(CacheConfig.named(cache)) == limit


@pytest.mark.parametrize(
    "case, number, structures",
    [("fbcache", 6, 1), ("teacache", 4, 1), ("combination", 48, 2), ("gates", 36, 2), ("dbcache", 15, 6)],
)
def test_a_case_has_its_rows_in_few_structures(case, number, structures):
    rows = CASES[case]()
    assert len(rows) == number
    assert len({CacheConfig.named(row.cache).structure for row in rows}) == structures


@pytest.mark.parametrize("steps", [28, 50, 20])
def test_a_fitted_preset_is_swept_at_its_own_number_of_steps_alone(steps):
    rows = sweep.rows_of(Namespace(cases=["masks"], cache=[], thresholds=None, num_inference_steps=steps))
    fitted = [row.name for row in rows if row.name.startswith("fitted")]
    assert fitted == [name for name in FITTED if name.endswith(f"_of_{steps}")] and len(fitted) == 3 * (steps != 20)


def test_the_mask_of_ones_own_fits_the_steps():
    assert [own_mask(steps).count("1") for steps in (4, 28)] == [2, 14]


def test_a_sweep_measures_what_it_draws_and_goes_on_where_it_was(options, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    arguments = [*options, "--save_path", str(tmp_path / "out"), "--cases", "fbcache", "--thresholds", "0", "1"]
    arguments += ["--cache", "F1B0_W0M1_R1", "--into", str(page), "--num_inference_steps", "5"]
    assert sweep.main(arguments) == 0
    table = capsys.readouterr().out
    assert page.read_text().split("\n\n", 2)[2] == table
    assert (tmp_path / "out" / "sweep.md").read_text() == table
    assert "| Uncached (s) | Time (s) | Speedup |" in table
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert report["prompts"] == PROMPTS
    uncached, never, always, once = report["cells"]
    assert [cell["computed_steps"] for cell in report["cells"]] == [5, 5, 1, 4]
    assert (uncached["psnr"], uncached["skipped"], never["psnr"]) == (None, 0, None)
    assert 10 < always["psnr"] < once["psnr"] < 99 and 0 < once["skipped"] < always["skipped"] < 1
    assert once["tflops"] == pytest.approx(uncached["tflops"] * (1 - once["skipped"]))
    assert once["speedup"] == pytest.approx(once["uncached_seconds"] / once["seconds"])
    assert always["pictures"][1]["reused"] == [False, True, True, True, True]
    assert (tmp_path / "out" / always["folder"] / "00001.png").is_file()
    with open(tmp_path / "out" / "sweep.csv") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [cell["name"] for cell in report["cells"]]

    (tmp_path / "out" / always["folder"] / "00001.png").unlink()
    drawn, draw = [], Painter.draw
    monkeypatch.setattr(Painter, "draw", lambda self, *asked: drawn.append(asked) or draw(self, *asked))
    assert sweep.main(arguments) == 0
    assert [(index, setting.config) for index, _, setting in drawn] == [(1, CacheConfig(1))]
    again = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [cell["psnr"] for cell in again["cells"]] == [cell["psnr"] for cell in report["cells"]]


def test_a_sweep_compiles_and_warms_up_once_a_structure(options, tmp_path, strict_graph_mode, monkeypatch):
    drawn, draw = [], Painter._draw
    compiled, seconds = [], []

    def counted(self, *asked):
        found = draw(self, *asked)
        drawn.append(asked[2])
        compiled.append(self.pipe.graph_compilations)
        seconds.append(found[2]["compile"])
        return found

    monkeypatch.setattr(Painter, "_draw", counted)
    arguments = [*options, "--save_path", str(tmp_path), "--cases", "fbcache", "--thresholds", "0", "0.5", "1"]
    arguments += ["--limit", "1"]
    assert sweep.main(arguments) == 0
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    compile_seconds = [
        json.loads((tmp_path / cell["folder"] / "seconds.0.jsonl").read_text())["compile"] for cell in cells
    ]
    assert compiled == [1, 1] + [2] * 7 and compile_seconds == [seconds[index] for index in (0, 2, 5, 7)]
    uncached, *cached = [Setting.named(cell["cache"], cell["steps"]) for cell in cells]
    assert drawn == [uncached] * 2 + [cached[0]] * 2 + [uncached, cached[1], uncached, cached[2], uncached]


def test_the_speed_table_has_the_fields_of_the_field(options, tmp_path, capsys):
    page, folder = tmp_path / "page.md", tmp_path / "out"
    arguments = [*options, "--save_path", str(folder), "--runs", "2", "--num_inference_steps", "1"]
    assert benchmark.main([*arguments, "--cache", "F1B0_W0_R1", "--into", str(page)]) == 0
    text = capsys.readouterr().out
    assert page.read_text().split("\n\n", 2)[2] == text
    lines = text.splitlines()
    assert lines[0] == "| Configuration | Image Size | Steps | Time per Step (s) | Total Time (s) | Speedup |"
    names = ["Baseline (PyNative Mode)", "Baseline (Graph Mode)"]
    names += ["FBCache(0.08) + Graph Mode", "FBCache(0.12) + Graph Mode", "FBCache(1) + Graph Mode"]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:7]] == names
    for line in lines[2:7]:
        *_, total, speedup = line.strip("| ").split(" | ")
        ratios = re.findall(r"([\d.]+)x (?:over PyNative )?\(([\d.]+) / ([\d.]+)\)", speedup)
        assert len(ratios) == 2 and {own for _, _, own in ratios} == {total}
        assert [ratios[0][1], ratios[1][1]] == [lines[row].strip("| ").split(" | ")[-2] for row in (3, 2)]
    assert "| Total Time, Median of 2 Runs (s) |" in lines[8]
    rows = json.loads((folder / "benchmark.json").read_text())["rows"]
    for row in rows:
        assert len(row["times"]) == 2 and row["least_seconds"] <= row["seconds"] <= row["greatest_seconds"]
        assert row["speedup"] == pytest.approx(rows[1]["seconds"] / row["seconds"])
        assert row["speedup_over_pynative"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    assert [row["cache_bytes"] > 0 for row in rows] == [False, False, True, True, True]
    assert all(row["peak_bytes"] > 1e7 for row in rows)
    written = ["benchmark.csv", "benchmark.json", "benchmark.md"]
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == written


def bad(program, *options):
    return pytest.param(program, list(options[:-1]), options[-1], id=f"{program.__name__.split('.')[-1]}-{options[-1]}")


@pytest.mark.parametrize(
    "program, options, named",
    [
        bad(sweep, "--cache", "fastest", "fastest"),
        bad(sweep, "--cache", "F12B0_W0_R0.1", "12 blocks"),
        bad(sweep, "--cases", "everything", "everything"),
        bad(sweep, "--cases", "rules", "--thresholds", "0.1", "--thresholds"),
        bad(sweep, "--into", "nowhere/page.md", "nowhere"),
        bad(benchmark, "--into", "nowhere/page.md", "nowhere"),
        bad(fid_mscoco, "--coco_root", "no/such/coco", "--into", "nowhere/page.md", "nowhere"),
        bad(tune, "--min_psnr", "35", "--into", "nowhere/page.md", "nowhere"),
        bad(sweep, "--prompts", "no/such/file", "no/such/file"),
        bad(sweep, "--limit", "0", "limit"),
        bad(sweep, "--seed", "-1", "seed"),
        bad(sweep, "--image_size", "60", "64", "image_size"),
        bad(sweep, "--image_size", "8", "64", "--image_size must be 11 pixels or more, for SSIM, not 8 64"),
        bad(benchmark, "--runs", "0", "runs"),
        bad(benchmark, "--cache", "F1B0_W0_R7", "not 7"),
        bad(benchmark, "--ckpt", "no/such/place", "no/such/place"),
        bad(fid_mscoco, "--coco_root", "no/such/coco", "no/such/coco"),
        bad(fid_mscoco, "--coco_root"),
        bad(tune, "--limit", "4", "--min_psnr"),
        bad(tune, "--min_psnr", "35", "--limit", "1", "limit"),
        bad(tune, "--max_clip_score_loss", "101", "max_clip_score_loss"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(program, options, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        program.main([*options, "--save_path", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and named in lines[0]


def test_a_speedup_is_over_the_uncached_run_of_the_same_hour(tmp_path):
    def folder(name, seconds):
        folder = PictureFolder(tmp_path / name, {})
        facts = {"reused": [False], "residual_diffs": [None], "skipped": 0.0, "tflops": 1.0}
        picture = np.zeros((16, 16, 3), np.uint8)
        for index, prompt in enumerate(PROMPTS):
            folder.add(index, prompt, picture, facts, seconds[index])
        return folder

    slow = folder("uncached", [{"denoise": 2.0}, {"denoise": 2.0}])
    cached = folder("cached", [{"denoise": 0.5, "uncached": 1.0}, {"denoise": 0.5}])
    judge = Judge(PROMPTS, slow)
    assert judge.judge(Setting.named("balanced", 1), cached)["speedup"] == 2
    assert judge.judge(Setting.named(UNCACHED, 1), slow)["speedup"] == 1
