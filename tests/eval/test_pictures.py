import errno
import json
import os
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from narrow import make_narrow

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import run_flux_withFBCache_pipeline as fbcache_flux
from FBCache_ms.eval import sweep
from FBCache_ms.eval.shared import ranks
from FBCache_ms.eval.shared.arguments import exit_status
from FBCache_ms.eval.shared.drawing import Painter, Setting, draw_missing
from FBCache_ms.eval.shared.files import locked
from FBCache_ms.eval.shared.metrics import read_picture
from FBCache_ms.eval.shared.pictures import PictureFolder, check_numbers
from FBCache_ms.eval.shared.ranks import rank_and_world, wait_until_empty

SETTINGS = {"config": "F1B0_W0M0MC0_T0O0_R0.12", "steps": 4, "image_size": [8, 8]}
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
PROMPTS = ["a cat", "two dogs", "a hen"]


@pytest.fixture
def folder(tmp_path):
    """A folder with the second of three pictures."""
    folder = PictureFolder(tmp_path / "pictures", SETTINGS)
    folder.add(1, PROMPTS[1], PICTURE, {"skipped": 0.5}, {"denoise": 0.25})
    return folder


def test_a_picture_is_found_again_with_what_is_known_of_it(folder):
    again = PictureFolder(folder.path, dict(SETTINGS))
    assert again.missing(PROMPTS) == [0, 2]
    assert again.record(1) == {"index": 1, "prompt": "two dogs", "skipped": 0.5, "settings": SETTINGS}
    with pytest.raises(OSError, match="how long 00000.png took"):
        again.seconds(2)
    assert np.array_equal(read_picture(again.file(1)) * 255, PICTURE)


@pytest.mark.parametrize("name, value", [("steps", 8), ("config", "F1B0_W0M0MC0_T0O0_R0.2"), ("guidance_scale", 2.5)])
def test_pictures_of_another_setting_are_refused_by_its_name(folder, name, value):
    with pytest.raises(OSError, match=f"holds pictures made with {name} .* not {value!r}".replace("'", '"')):
        PictureFolder(folder.path, {**SETTINGS, name: value})
    assert folder.file(1).is_file()


def test_a_picture_of_another_prompt_is_refused(folder):
    with pytest.raises(OSError, match="was made of 'two dogs', not of 'three dogs'"):
        folder.missing(["a cat", "three dogs"])


def test_a_picture_that_does_not_tell_its_settings_is_refused(folder):
    folder.file(1, "json").unlink()
    with pytest.raises(OSError, match="00001.png has no 00001.json"):
        PictureFolder(folder.path, SETTINGS)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3, "prompt": ""}'])
def test_a_damaged_record_is_named(folder, text):
    folder.file(1, "json").write_text(text)
    with pytest.raises(OSError, match="00001.json is damaged"):
        PictureFolder(folder.path, SETTINGS)


def test_a_record_without_its_picture_is_drawn_again(folder):
    folder.file(1).unlink()
    assert PictureFolder(folder.path, SETTINGS).missing(PROMPTS) == [0, 1, 2]


def test_half_a_line_of_seconds_is_passed_over(folder):
    with open(folder.path / "seconds.0.jsonl", "ab") as stream:
        stream.write(b'\n{"index": 0, "den')
    folder.add(2, PROMPTS[2], PICTURE, {}, {"denoise": 0.5})
    folder.add(0, PROMPTS[0], PICTURE, {}, {"denoise": 0.75}, rank=1)
    folder.add(2, PROMPTS[2], PICTURE, {}, {"denoise": 1.0}, rank=1)
    assert [line["denoise"] for line in folder.seconds(3)] == [0.75, 0.25, 1.0]
    assert len(folder.seconds(2)) == 2


@pytest.mark.parametrize("file, fails_at", [("seconds.0.jsonl", 1), ("00002.json", 2), ("00002.png", 3)])
def test_a_full_disk_is_told_and_loses_nothing_that_was_made(folder, file, fails_at, monkeypatch, capsys):
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert exit_status("program", lambda: folder.add(2, PROMPTS[2], PICTURE, {}, {"denoise": 0.5})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder.path / file}: No space left on device; what is made stays" in line
    assert PictureFolder(folder.path, SETTINGS).missing(PROMPTS) == [0, 2]
    assert not list(folder.path.glob(".*"))


def test_another_rank_may_finish_a_file_while_one_looks_for_left_ones(tmp_path):
    (tmp_path / ".00000.png.part").symlink_to(tmp_path / "gone")
    with locked(tmp_path):
        pass


def test_two_runs_do_not_share_a_folder(tmp_path):
    script = "import sys; from pathlib import Path; from FBCache_ms.eval.shared.files import locked\n"
    script += "with locked(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with locked(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0 and "another run is at work in this folder" in done.stderr
    assert subprocess.run(command).returncode == 0


@pytest.fixture
def new_process(request):
    """What rank_and_world() remembers is forgotten, before and behind a test."""
    rank_and_world.cache_clear()
    request.addfinalizer(rank_and_world.cache_clear)


RANK = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1", "MS_WORKER_NUM": "2"}


def test_ranks_are_those_of_msrun(monkeypatch, new_process):
    assert rank_and_world() == (0, 1)
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    rank_and_world.cache_clear()
    assert rank_and_world() == rank_and_world() == (1, 2)
    rank_and_world.cache_clear()
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.delenv("MS_NODE_ID")
    with pytest.raises(ValueError, match="--node_rank"):
        rank_and_world()
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with pytest.raises(SystemExit) as exit:
        rank_and_world()
    assert exit.value.code == 0


def test_each_rank_times_the_uncached_run_beside_every_fourth_picture_of_its_own(tmp_path):
    """And none does where its time is not asked for."""

    class Painter:
        args = Namespace(num_inference_steps=4)

        def __init__(self):
            self.uncached = 0

        def draw(self, index, prompt, setting):
            self.uncached += setting.config.gate == "none"
            return PICTURE, {}, {"denoise": 1.0}

    setting, prompts = Setting(CacheConfig(), 4), [f"prompt {index}" for index in range(16)]
    for rank in range(2):
        painter, folder = Painter(), PictureFolder(tmp_path / str(rank), {})
        draw_missing(painter, {setting: folder}, prompts, (rank, 2))
        assert painter.uncached == 2
    painter = Painter()
    draw_missing(painter, {setting: PictureFolder(tmp_path / "fid", {})}, prompts, uncached_beside=False)
    assert painter.uncached == 0


def test_a_negative_prompt_guides_what_a_program_draws(tmp_path):
    def painter(*options):
        given = "--ckpt", str(ckpt), "--save_path", str(tmp_path / "out"), *options
        return Painter(sweep.parse_arguments(given))

    ckpt, setting = make_narrow(tmp_path / "narrow"), Setting(CacheConfig(0.12), 2)
    guided, plain = painter("--negative_prompt", "dark", "--true_cfg_scale", "3"), painter()
    picture, facts, _ = guided.draw(0, "a cat", setting)
    (expected,) = guided.pipe(
        "a cat",
        negative_prompt="dark",
        true_cfg_scale=3.0,
        num_inference_steps=2,
        max_sequence_length=guided.pipe.text_length,
        generator=np.random.default_rng((0, 0)),
        cache_config=setting.config,
        output_type="np",
    )[0]
    np.testing.assert_array_equal(picture, (expected * 255).round().astype(np.uint8))
    assert guided.common == {**plain.common, "negative_prompt": "dark", "true_cfg_scale": 3.0}
    assert facts["tflops"] == 2 * plain.draw(0, "a cat", setting)[1]["tflops"]


def test_a_picture_that_is_not_a_number_is_refused(tmp_path):
    """MindSpore's clamp makes black of it."""
    options = ["--ckpt", str(make_narrow(tmp_path / "narrow")), "--num_inference_steps", "2"]
    options += ["--save_path", str(tmp_path / "out")]
    painter, setting = Painter(sweep.parse_arguments(options)), Setting(CacheConfig(0.12), 2, graph=False)
    bias = painter.pipe.vae.decoder.conv_out.bias
    bias.set_data(bias * float("nan"))
    with pytest.raises(ValueError, match=f"the picture of prompt 3 is not a number, .* --cache {setting.config}"):
        painter.draw(3, "a cat", setting)
    with pytest.raises(ValueError, match="the picture is not a number"):
        fbcache_flux.generate(painter.pipe, fbcache_flux.parse_arguments(options), setting.config)
    # mindone's pipeline has drawn, and nobody has looked.
    check_numbers(SimpleNamespace(finite=None), setting.config)


def test_the_first_rank_waits_for_the_others_but_not_for_ever():
    left = iter([["a", "b"], ["b"], []])
    wait_until_empty(lambda: next(left), poll=0)
    with pytest.raises(OSError, match="1 are missing, the first of them a"):
        wait_until_empty(lambda: ["a"], poll=0, patience=0.01)


LIVING = """
import sys, time
from pathlib import Path
from FBCache_ms.eval.shared import ranks
ranks.BEAT = 0.1
with ranks.signs_of_life(Path(sys.argv[1]), (1, 2)):
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_rank_that_was_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.1)
    monkeypatch.setattr(ranks, "SILENCE", 2)
    with ranks.signs_of_life(tmp_path, (0, 2)):
        other = subprocess.Popen([sys.executable, "-c", LIVING, tmp_path], stdout=subprocess.PIPE)
        try:
            assert other.stdout.readline() == b"here\n"
            # While it lives it is waited for.
            with pytest.raises(OSError, match="no new picture for 0.5 s"):
                wait_until_empty(lambda: ["a"], poll=0.1, patience=0.5)
        finally:
            other.kill()
            other.wait()
        with pytest.raises(OSError, match="rank 1 has given no sign of life for 2 s, and 1 files are missing"):
            wait_until_empty(lambda: ["a"], poll=0.1, patience=30)
    assert [file.name for file in tmp_path.iterdir()] == [".alive.1"]


def test_what_a_killed_run_has_left_is_no_dead_rank(tmp_path):
    old = tmp_path / ".alive.1"
    old.touch()
    os.utime(old, (0, 0))
    with ranks.signs_of_life(tmp_path, (0, 2)):
        assert not old.exists()
        with pytest.raises(OSError, match="no new picture"):
            wait_until_empty(lambda: ["a"], poll=0, patience=0.01)
    assert not list(tmp_path.iterdir())


def test_one_process_alone_leaves_no_sign(tmp_path):
    with ranks.signs_of_life(tmp_path, (0, 1)):
        assert not list(tmp_path.iterdir())


def test_numbers_that_json_lacks_are_null(folder):
    folder.add(0, PROMPTS[0], PICTURE, {"residual_diffs": [None, float("nan"), float("inf")]}, {})
    assert json.loads(folder.file(0, "json").read_text())["residual_diffs"] == [None, None, None]
