import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from make_models import make
from PIL import Image

from FBCache_ms.eval import run_flux_withFBCache_pipeline as cli
from FBCache_ms.eval.shared.metrics import psnr, read_picture

KEYS = {
    "config",
    "prompt",
    "seed",
    "steps",
    "pictures",
    "files",
    "image_size",
    "negative_prompt",
    "guidance_scale",
    "true_cfg_scale",
    "branches",
    "computed_steps",
    "cached_steps",
    "residual_diffs",
    "skipped",
    "seconds",
    "graph_compilations",
    "graphs_from_cache",
    "jit_level",
    "cache_bytes",
    "quantize",
    "context_parallel",
    "context_parallel_scheme",
    "cfg_parallel",
    "device",
    "mode",
    "dtype",
    "mindspore",
    "mindone",
}


def run(save_path, *options):
    assert cli.main(["--save_path", str(save_path), *options]) == 0
    return json.loads((save_path / "run.json").read_text())


def written(folder):
    """The names of a folder's files that a person sees."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def test_a_run_writes_its_pictures_and_says_what_it_did(tmp_path, capsys):
    report = run(tmp_path, "--num_images_per_prompt", "2", "--seed", "7", "--cache", "F1B0_W2M0MC0_T1O1_R0.3")
    assert set(report) == KEYS
    parts = {"imports", "load", "encode", "compile", "denoise", "decode"}
    assert set(report["seconds"]) == {*parts, "per_step", "total"}
    seconds = [report["seconds"][part] for part in parts]
    assert min(seconds) >= 0 and sum(seconds) <= report["seconds"]["total"]
    assert report["config"] == "F1B0_W2M0MC0_T1O1_R0.3"
    assert (report["seed"], report["steps"], report["image_size"]) == (7, 28, [64, 64])
    assert sorted(report["computed_steps"] + report["cached_steps"]) == list(range(28))
    assert report["cached_steps"] and report["computed_steps"][:2] == [0, 1]
    compared = [step for step, diff in enumerate(report["residual_diffs"]) if diff is not None]
    assert compared == list(range(2, 28))
    assert all((report["residual_diffs"][step] < 0.3) == (step in report["cached_steps"]) for step in compared)
    assert (report["graph_compilations"], report["device"], report["mode"]) == (1, "CPU", "GRAPH_MODE")
    assert report["cache_bytes"] > 3 * 2 * 64 * 128 * 4
    pictures = [Image.open(tmp_path / f"output_{index}.png") for index in range(2)]
    assert all(picture.size == (64, 64) for picture in pictures)
    assert np.any(np.asarray(pictures[0]) != np.asarray(pictures[1]))
    assert written(tmp_path) == ["output_0.png", "output_1.png", "run.json"]
    assert report["files"] == ["output_0.png", "output_1.png"]
    said = capsys.readouterr().out
    assert f"{len(report['cached_steps'])} of 28 steps reused" in said and "output_0.png to output_1.png" in said


def test_a_former_runs_pictures_go_away(tmp_path):
    for name in ("output_0.png", "output_1.png", "output_2.png", "baseline_0.png", "comparison_0.png", "mine.png"):
        (tmp_path / name).write_text("old")
    cli.write(tmp_path, {"output": [Image.new("RGB", (8, 8))]}, {})
    assert written(tmp_path) == ["mine.png", "output_0.png", "run.json"]


def test_compare_reports_the_gain_and_the_loss_and_shows_them(tmp_path, capsys):
    report = run(tmp_path, "--compare", "--num_inference_steps", "10", "--cache", "F1B0_W1_R0.9")
    assert set(report) == KEYS | {"baseline"}
    assert set(report["baseline"]) == {"denoise", "speedup", "runs", "psnr", "ssim"}
    seconds, baseline = report["seconds"], report["baseline"]
    assert baseline["speedup"] == pytest.approx(baseline["denoise"] / seconds["denoise"])
    assert report["cached_steps"] and 20 < baseline["psnr"] < 60 and baseline["runs"] >= 3
    assert report["graph_compilations"] == 1
    files = ["output_0.png", "baseline_0.png", "comparison_0.png"]
    assert report["files"] == files and written(tmp_path) == sorted([*files, "run.json"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"written to {tmp_path}: {', '.join(files)} and run.json"
    assert f"{seconds['denoise']:.3f} s with the cache, {baseline['denoise']:.3f} s without" in said[-2]
    output, uncached = (read_picture(tmp_path / name) for name in files[:2])
    # Files have whole numbers from 0 to 255, the PSNR is of what they were rounded from.
    assert psnr(uncached, output) > 30


def test_the_cache_off_gives_the_baselines_picture(tmp_path, capsys):
    report = run(tmp_path, "--compare", "--residual_diff_threshold", "0", "--num_inference_steps", "4")
    assert report["cached_steps"] == [] and report["residual_diffs"] == [None] * 4
    assert report["baseline"]["psnr"] is None and report["baseline"]["ssim"] == pytest.approx(1)
    assert "the same picture" in capsys.readouterr().out


def test_another_size_and_true_cfg_and_operator_by_operator(tmp_path):
    options = ["--image_size", "32", "48", "--num_inference_steps", "2", "--no-use_graph_mode"]
    report = run(tmp_path, *options, "--true_cfg_scale", "2", "--negative_prompt", "green background")
    assert report["image_size"] == [32, 48]
    assert (report["mode"], report["graph_compilations"]) == ("PYNATIVE_MODE", 0)
    assert Image.open(tmp_path / "output_0.png").size == (48, 32)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--residual_diff_threshold", "1.5"], "residual_diff_threshold"),
        (["--residual_diff_threshold", "nan"], "residual_diff_threshold"),
        (["--taylorseer_derivative", "-1"], "taylorseer_derivative"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--cache", "fastest"], "fastest"),
        (["--cache", "F0B0_W0M0MC0_T0O0_R0.1"], "Fn_compute_blocks"),
        (["--cache", "F11B1_W0M0MC0_T0O0_R0.1"], "12 blocks"),
        (["--gate", "guess"], "guess"),
        (["--gate", "static"], "schedule"),
        (["--teacache_threshold", "0.3"], "teacache_threshold"),
        (["--max_cached_steps", "many"], "max_cached_steps"),
        (["--steps_computation_mask", "101"], "3 steps"),
        (["--image_size", "60", "64"], "image_size"),
        (["--image_size", "64"], "image_size"),
        (["--compare", "--image_size", "8", "64"], "--compare needs an --image_size of 11 pixels"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
        (["--num_inference_steps", "many"], "num_inference_steps"),
        (["--num_images_per_prompt", "0"], "num_images_per_prompt"),
        (["--seed", "-1"], "seed"),
        (["--guidance_scale", "nan"], "guidance_scale"),
        (["--true_cfg_scale", "4"], "negative_prompt"),
        (["--cfg_parallel"], "--cfg_parallel needs an even --context_parallel, not 1"),
        (
            ["--context_parallel_scheme", "ulysses"],
            "--context_parallel_scheme ulysses needs a --context_parallel above 1",
        ),
        (["--ckpt", "no/such/place"], "no/such/place"),
        (["--device", "Ascend"], "Ascend"),
        (["--device", "GPU"], "GPU"),
        (["--dtype", "float16"], "float16"),
        (["--save_path", "pyproject.toml"], "pyproject.toml"),
        (["--save_path", "/proc/none"], "/proc/none"),
        (["--colour", "red"], "--colour"),
        (["--residual_diff", "0.1"], "--residual_diff"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line_that_names_them(options, named, capsys, tmp_path):
    options = options if "--save_path" in options else [*options, "--save_path", str(tmp_path / "new")]
    try:
        status = cli.main(options)
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("fbcache-flux: error: ") and named in lines[0]
    assert not list(tmp_path.glob("new/[!.]*"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small checkpoints of other families, by the family's name."""
    return {each: make(tmp_path_factory.mktemp(each) / "model", each) for each in ("qwenimage", "flux2")}


@pytest.mark.parametrize(
    "family, options, scales",
    [
        ("qwenimage", [], {"true_cfg_scale": 1.0}),
        ("qwenimage", ["--negative_prompt", "dark"], {"true_cfg_scale": 4.0}),
        ("flux2", [], {"guidance_scale": 4.0}),
        ("flux2", ["--guidance_scale", "2"], {"guidance_scale": 2.0}),
    ],
)
def test_a_family_has_scales_of_its_own(small, family, options, scales):
    args = cli.parse_arguments(["--ckpt", str(small[family]), *options])
    assert cli.guidance_of(args) == scales


@pytest.mark.parametrize(
    "family, options, named",
    [
        ("qwenimage", ["--guidance_scale", "3"], "a QwenImagePipeline takes true_cfg_scale"),
        ("flux2", ["--true_cfg_scale", "3", "--negative_prompt", "dark"], "a Flux2Pipeline takes guidance_scale"),
        ("flux2", ["--negative_prompt", "dark"], "--negative_prompt is not for this checkpoint"),
        ("qwenimage", ["--cache", "double_gate"], "0 single blocks"),
    ],
)
def test_what_a_family_does_not_take_is_told_in_one_line(small, family, options, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse_arguments(["--ckpt", str(small[family]), *options])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def test_a_model_of_an_unknown_family_is_told_in_one_line(small, tmp_path, capsys):
    shutil.copytree(small["qwenimage"], tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("QwenImageTransformer2DModel", "WanTransformer3DModel"))
    with pytest.raises(SystemExit, match="2"):
        cli.parse_arguments(["--ckpt", str(tmp_path / "other")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Unsupported model WanTransformer3DModel" in line


def test_a_checkpoint_says_which_pipeline_draws(small, tmp_path):
    options = ["--ckpt", str(small["qwenimage"]), "--image_size", "32", "32", "--num_inference_steps", "8"]
    report = run(tmp_path, *options, "--cache", "F1B0_W0_R1")
    assert report["computed_steps"] == [0] and report["image_size"] == [32, 32]


def test_a_file_that_cannot_be_written_whole_is_not_written(tmp_path):
    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cli.write_file(tmp_path / "file", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_run_leaves_earlier_results_alone(tmp_path, monkeypatch):
    (tmp_path / "output_0.png").write_text("mine")
    monkeypatch.setattr(cli, "generate", lambda *args: (_ for _ in ()).throw(OSError("no")))
    assert cli.main(["--save_path", str(tmp_path)]) == 2
    assert (tmp_path / "output_0.png").read_text() == "mine"
    assert written(tmp_path) == ["output_0.png"]


def test_two_runs_do_not_write_into_one_folder(tmp_path, capsys):
    with cli.locked(tmp_path):
        assert cli.main(["--save_path", str(tmp_path)]) == 2
    assert "another run is at work" in capsys.readouterr().err and written(tmp_path) == []


def test_bad_arguments_are_told_before_mindspore_is_imported():
    script = (
        "import sys; from FBCache_ms.eval import run_flux_withFBCache_pipeline as cli\n"
        "try: cli.main(['--seed', '-1'])\n"
        "except SystemExit: print('mindspore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
