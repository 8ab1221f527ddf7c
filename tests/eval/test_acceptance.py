"""The acceptance run: dry, with checks that fail, and on machines whose Ascend software is broken."""

import json
from argparse import Namespace

import numpy as np
import pytest
from make_models import make
from narrow import make_narrow

import mindspore as ms

from FBCache_ms import CacheConfig, FluxPipeline, QuantizeConfig
from FBCache_ms.eval import ascend_acceptance, benchmark, environment
from FBCache_ms.eval.environment import Part
from FBCache_ms.eval.shared import acceptance_checks
from FBCache_ms.eval.shared.acceptance_checks import CHECKS, STRUCTURES, Finding, agree, floor_of
from FBCache_ms.eval.shared.drawing import Setting
from FBCache_ms.eval.shared.floors import FLOOR_ELSEWHERE, FLOORS
from FBCache_ms.eval.shared.pictures import PictureFolder
from FBCache_ms.runtime import compile_cache
from FBCache_ms.runtime.checkpoint import TINY_FLUX


def prefixes(report):
    """The verdicts and names of the report's lines."""
    return [line[2:].split(":")[0] for line in report.splitlines() if line.startswith(("- PASS", "- FAIL", "- SKIP"))]


def test_one_npu_shares_no_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(ms.hal, "device_count", lambda kind: 1)
    finding = acceptance_checks.check_sharing(Namespace(args=Namespace(device="Ascend", save_path=tmp_path)))
    assert finding == Finding(None, "one NPU is here, and two have to share a picture")


@pytest.mark.release
def test_two_devices_share_a_picture_as_one_draws_it(tmp_path):
    assert ascend_acceptance.main(["--limit", "1", "--only", "sharing", "--save_path", str(tmp_path)]) == 0


def test_the_speed_table_is_drawn_with_the_guidance_and_the_weights_of_the_run(tmp_path, monkeypatch):
    asked, options = [], ["--ckpt", str(make(tmp_path / "model", "qwenimage")), "--negative_prompt", "dark"]
    options += ["--quantize", "int8", "transformer", "text_encoder"]
    monkeypatch.setattr(acceptance_checks, "run_program", lambda module, options: asked.extend(map(str, options)))
    args = ascend_acceptance.parse_arguments([*options, "--only", "speed", "--save_path", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError):
        acceptance_checks.check_speed(Namespace(args=args))
    benchmarked = benchmark.parse_arguments(asked)
    assert (benchmarked.negative_prompt, benchmarked.true_cfg_scale) == ("dark", 4.0)
    assert benchmarked.quantize == args.quantize == QuantizeConfig("int8", (), ("transformer", "text_encoder"))


@pytest.mark.slow
def test_loop_and_memory_hold_for_another_model_and_its_guidance(tmp_path, capsys):
    options = ["--ckpt", str(make(tmp_path / "model", "qwenimage")), "--negative_prompt", "dark"]
    options += ["--image_size", "64", "64", "--num_inference_steps", "4", "--limit", "1", "--only", "memory", "loop"]
    assert ascend_acceptance.main([*options, "--save_path", str(tmp_path / "out")]) == 0, capsys.readouterr().out


def test_pictures_of_other_code_are_drawn_anew(tmp_path, monkeypatch):
    drawn = []

    class Painter:
        device, args = Namespace(name="Ascend"), Namespace(num_inference_steps=4)

        def __init__(self, args):
            pass

        def folder(self, path, setting):
            return PictureFolder(path / setting.folder, {})

        def draw(self, index, prompt, setting):
            drawn.append(index)
            return np.zeros((8, 8, 3), np.uint8), {}, {}

    def draw(sources, cann):
        monkeypatch.setattr(compile_cache, "sources_checksum", lambda: sources)
        monkeypatch.setattr(environment, "ascend_parts", lambda: [Part("CANN", cann)])
        acceptance_checks.Run(Namespace(save_path=tmp_path)).drawn("graph", [Setting.named("fora", 4)], ["a cat"])
        return len(drawn)

    monkeypatch.setattr(acceptance_checks, "Painter", Painter)
    assert [draw("a", "8.1"), draw("a", "8.1"), draw("b", "8.1"), draw("b", "8.2")] == [1, 1, 2, 3]


@pytest.mark.slow
def test_a_dry_run_goes_through_every_check(tmp_path, monkeypatch, capsys):
    def run_program(module, options, apart=acceptance_checks.run_program):
        if module is benchmark:
            assert module.main(list(map(str, options))) == 0
            capsys.readouterr()
        else:
            apart(module, options)

    load, loaded = FluxPipeline.from_pretrained, []

    def load_once(*args, **settings):
        if not loaded:
            loaded.append(load(*args, **settings))
        return loaded[0]

    ckpt = make_narrow(tmp_path / "narrow")
    # What was compiled for one check serves the others.
    monkeypatch.setattr(FluxPipeline, "from_pretrained", load_once)
    monkeypatch.setattr(acceptance_checks, "run_program", run_program)
    monkeypatch.setattr(acceptance_checks, "TINY_FLUX", ckpt)
    monkeypatch.setattr(acceptance_checks, "UNIT_TESTS", ("flops",))
    # Four steps of two blocks are no measure of speed.
    monkeypatch.setattr(acceptance_checks, "LEAST_SPEEDUP", 0)
    page, folder = tmp_path / "page.md", tmp_path / "out"
    options = [
        "--ckpt",
        str(ckpt),
        "--image_size",
        "32",
        "32",
        "--num_inference_steps",
        "4",
    ]
    options += ["--limit", "2", "--runs", "1", "--no-pynative", "--save_path", str(folder)]
    assert ascend_acceptance.main([*options, "--skip", "sharing", "--into", str(page)]) == 0
    report = (folder / "acceptance.md").read_text()
    assert prefixes(report) == [f"PASS {name}" for name in CHECKS if name != "sharing"]
    assert report.startswith("# Acceptance run: a dry run on a CPU\n") and "8 passed, 0 failed, 0 skipped." in report
    lines = [line[2:] for line in report.splitlines() if line.startswith("- PASS")]
    assert page.read_text().split("\n\n", 2)[2].splitlines() == [f"    {line}" for line in lines]
    assert capsys.readouterr().out.splitlines()[-1].startswith("written to ")
    for piece in (
        " passed in ",
        "64x64, float32, F1B0_W0M0MC0_T0O0_R0.12: decisions equal, 14 of 28 steps reused, differences too",
        "FBCache(0.12) + Graph Mode is ",
        f"{len(STRUCTURES) + 1} caches take exactly what the formula says",
        "4 steps, F1B0_W1MC1_R1: ",
        "in pieces of one step the picture is the same to the last bit",
        "2 prompts: FBCache(0.08) ",
        "| Baseline (Graph Mode) | 32x32 | 4 |",
        "| mindone | 0.5.0 | ",
        "| Baseline | no cache | ",
        "differences.\n\nOn the CPU, two processes",
    ):
        assert piece in report
    assert "2 of 4 steps reused" in next(line for line in lines if line.startswith("PASS graph"))
    data = json.loads((folder / "acceptance.json").read_text())
    assert [row["verdict"] for row in data["findings"]] == 8 * ["PASS"]
    assert data["settings"]["device"] == "CPU" and data["settings"]["steps"] == 4


def test_a_check_that_fails_or_raises_leaves_the_others_running(tmp_path, monkeypatch):
    def broken(run):
        raise ValueError("no\nluck")

    checks = {
        "bad": lambda run: Finding(False, "too far"),
        "broken": broken,
        "absent": lambda run: Finding(None, "not here"),
        "good": lambda run: Finding(True, "fine"),
    }
    monkeypatch.setattr(ascend_acceptance, "CHECKS", checks)
    assert ascend_acceptance.main(["--limit", "2", "--save_path", str(tmp_path)]) == 1
    report = (tmp_path / "acceptance.md").read_text()
    assert "- FAIL bad: too far\n- FAIL broken: no luck\n- SKIP absent: not here\n- PASS good: fine\n" in report
    assert "1 passed, 2 failed, 1 skipped." in report
    assert (tmp_path / "broken.log").read_text().startswith("Traceback")
    assert ascend_acceptance.main(["--limit", "2", "--skip", "bad", "broken", "--save_path", str(tmp_path)]) == 0
    assert ascend_acceptance.main(["--limit", "2", "--only", "good", "--save_path", str(tmp_path)]) == 0
    assert prefixes((tmp_path / "acceptance.md").read_text()) == ["PASS good"]


def test_a_program_that_fails_is_told_by_its_last_line(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 2: benchmark: error: --runs must be in"):
        acceptance_checks.run_program(benchmark, ["--runs", 0, "--save_path", tmp_path])


def test_without_the_repository_there_are_no_unit_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(acceptance_checks, "TESTS", tmp_path / "tests")
    assert acceptance_checks.check_unit_tests(None).passed is None


@pytest.mark.parametrize(
    "options, named",
    [
        (["--runs", "0"], "--runs must be in [1, 10000], not 0"),
        (["--only", "luck"], "invalid choice: 'luck'"),
        (["--only", "loop", "--skip", "loop"], "--only and --skip leave no check"),
        (["--ckpt", "nowhere"], "checkpoint nowhere: there is no such folder"),
        (["--into", "nowhere/page.md"], "--into nowhere/page.md: there is no folder nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(options, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        ascend_acceptance.main([*options, "--save_path", str(tmp_path)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype, floor", [("float32", FLOORS[0.12, 0]), ("bfloat16", FLOOR_ELSEWHERE)])
def test_pictures_in_another_dtype_than_measured_have_a_floor_of_their_own(dtype, floor):
    args = Namespace(ckpt=TINY_FLUX, num_inference_steps=28, image_size=None)
    run = Namespace(args=args, painter=Namespace(device=Namespace(dtype=dtype)))
    assert floor_of(run, CacheConfig(0.12)) == floor


FIRST = {"reused": [False, True, False], "residual_diffs": [None, 0.1, 0.2]}


@pytest.mark.parametrize(
    "second, tolerance, passed, text",
    [
        (FIRST, 0, True, "decisions equal, 1 of 3 steps reused, differences too"),
        ({**FIRST, "residual_diffs": [None, 0.1, 0.201]}, 0.01, True, "differences at most 0.50% apart (1.0%)"),
        ({**FIRST, "residual_diffs": [None, 0.1, 0.203]}, 0.01, False, "0.20300 for 0.20000, 1.50% off"),
        ({**FIRST, "residual_diffs": [None, 0.1, None]}, 0.01, False, "step 2 was compared by one alone"),
        ({**FIRST, "reused": [False, False, False]}, 0.01, False, "step 1 is computed by the other alone"),
        ({**FIRST, "reused": [False, True, True]}, 0.05, True, "equal up to step 2, where rounding decides"),
        ({"reused": [False], "residual_diffs": [None]}, 0, False, "1 steps for 3"),
    ],
)
def test_generations_agree_within_what_rounding_explains(second, tolerance, passed, text):
    found, words = agree(FIRST, second, 0.195, tolerance)
    assert found is passed and text in words


@pytest.fixture
def ascend(tmp_path, monkeypatch):
    """A machine with an NPU and all that MindSpore 2.7.0 is published with; files may be taken away or changed."""
    files = {
        "Ascend/driver/version.info": "Version=25.2.0\nascendhal_version=7.35.23\n",
        "Ascend/firmware/version.info": "Version=7.7.0.6.236\n",
        "cann/latest/aarch64-linux/ascend_toolkit_install.info": "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n",
        "cann/latest/compiler/version.info": "Version=7.8.0.1.229\n",
        "dev/davinci0": "",
        "dev/davinci_manager": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "ASCEND", tmp_path / "Ascend")
    monkeypatch.setattr(environment, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(environment, "mindspores_list", lambda: ["7.7", "7.8", "8.2"])
    monkeypatch.setattr(ms, "__version__", "2.7.0")
    monkeypatch.setattr(ms.hal, "is_available", lambda device: True)
    monkeypatch.setattr(ms.hal, "device_count", lambda device: 8)
    monkeypatch.setattr(ms.hal, "get_device_name", lambda number, device: "Ascend910B3")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann" / "latest"))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    return tmp_path


def test_a_machine_as_published_is_right(ascend):
    assert environment.is_ascend_machine()
    assert environment.ascend_parts() == [
        Part("driver", "25.2.0", "any"),
        Part("firmware", "7.7.0.6.236"),
        Part("CANN", "8.2.RC1 (compiler 7.8.0.1.229)", "compiler 7.7, 7.8, 8.2"),
        Part("NPU", "8 x Ascend910B3", "Ascend910B"),
    ]


@pytest.mark.parametrize(
    "spoil, name, advice",
    [
        (
            lambda root, patch: (root / "cann/latest/compiler/version.info").write_text("Version=7.5.0.1\n"),
            "CANN",
            "MindSpore 2.7.0 does not work with it: install CANN 8.2.RC1",
        ),
        (
            lambda root, patch: patch.setenv("ASCEND_HOME_PATH", str(root / "nowhere")),
            "CANN",
            "it is not there: install CANN 8.2.RC1 and run its set_env.sh",
        ),
        (
            lambda root, patch: (
                patch.delenv("ASCEND_HOME_PATH"),
                (root / "Ascend/ascend-toolkit").mkdir(),
                (root / "cann/latest").rename(root / "Ascend/ascend-toolkit/latest"),
            ),
            "CANN",
            "its environment is not set: run . {root}/Ascend/ascend-toolkit/set_env.sh",
        ),
        (
            lambda root, patch: (root / "Ascend/driver/version.info").unlink(),
            "driver",
            "{root}/Ascend/driver/version.info is not there: install the driver 25.2.0, or mount {root}/Ascend/driver "
            "into this container",
        ),
        (
            lambda root, patch: patch.setattr(ms.hal, "is_available", lambda device: False),
            "NPU",
            "MindSpore sees none, though {root}/dev has 1: mend what is wrong above, then see npu-smi info",
        ),
        (
            lambda root, patch: (
                patch.setattr(ms.hal, "is_available", lambda device: False),
                (root / "dev/davinci0").unlink(),
            ),
            "NPU",
            "{root}/dev has no davinci0: load the driver, or give this container the device",
        ),
    ],
)
def test_what_is_wrong_with_a_machine_is_said_with_its_cure(spoil, name, advice, ascend, monkeypatch):
    spoil(ascend, monkeypatch)
    (part,) = [part for part in environment.ascend_parts() if part.wrong]
    assert (part.name, part.advice) == (name, advice.format(root=ascend))


@pytest.mark.parametrize(
    "spoil, name, advice",
    [
        (
            lambda root, patch: (root / "Ascend/driver/version.info").write_text("Version=24.1.rc2\n"),
            "driver",
            "older than the published 25.2.0: update it if a check fails",
        ),
        (
            lambda root, patch: (root / "cann/latest/compiler/version.info").unlink(),
            "CANN",
            "nothing in {root}/cann/latest tells whether MindSpore 2.7.0 works with it",
        ),
        (
            lambda root, patch: patch.setattr(ms.hal, "get_device_name", lambda number, device: "Ascend910A"),
            "NPU",
            "the Atlas 800T A2 has Ascend910B; nobody has tried another",
        ),
    ],
)
def test_what_is_doubtful_is_said_and_fails_nothing(spoil, name, advice, ascend, monkeypatch):
    spoil(ascend, monkeypatch)
    (part,) = [part for part in environment.ascend_parts() if part.advice]
    assert (part.name, part.advice, part.wrong) == (name, advice.format(root=ascend), False)


def test_a_machine_whose_npu_does_not_work_is_not_taken_for_a_cpu(ascend, monkeypatch, tmp_path):
    monkeypatch.setattr(ms.hal, "is_available", lambda device: False)
    (ascend / "Ascend/driver/version.info").unlink()
    folder = tmp_path / "out"
    options = ["--limit", "2", "--only", "environment", "memory", "--save_path", str(folder)]
    assert ascend_acceptance.main(options) == 1
    report = (folder / "acceptance.md").read_text()
    assert report.startswith("# Acceptance run on Ascend\n")
    assert prefixes(report) == ["FAIL environment", "FAIL memory"]
    assert "install the driver 25.2.0" in report and "there is no Ascend NPU here" in report


def test_a_package_of_another_version_is_named(monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: "0.1")
    (part,) = [part for part in environment.python_parts() if part.name == "mindone"]
    assert part.wrong and part.advice == '0.1 is not supported: pip install "mindone==0.5.0"'


def test_mindspore_tells_which_cann_it_works_with():
    supported = environment.mindspores_list()
    assert supported and all(part.count(".") == 1 for part in supported)
