"""A generation that is killed at random moments ends as one that nobody disturbed."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from make_coco import make_coco
from narrow import make_narrow

from FBCache_ms.eval import fid_mscoco
from FBCache_ms.eval.shared import drawing
from FBCache_ms.runtime.device import api

KILLS = 5
PICTURES = 24
VARIES = ("seconds.*.jsonl", ".lock.*", ".*.part", "fid_mscoco.*", "logs/*")

processes = multiprocessing.get_context("forkserver")
# Imported once, so that a start does not take the time of all imports.
processes.set_forkserver_preload(["FBCache_ms.pipelines.flux", "FBCache_ms.eval.fid_mscoco", "mindone.transformers"])


def generate(arguments, rank, world):
    """A rank's process, in the environment that msrun gives it."""
    # The fork server has no file of its own, which MindSpore's compile cache asks for.
    api.entry_script_path = fid_mscoco.__file__
    if world > 1:
        os.environ.update(MS_ROLE="MS_WORKER", MS_NODE_ID=str(rank), MS_WORKER_NUM=str(world))
    sys.exit(fid_mscoco.main(arguments))


def start(arguments, world):
    ranks = [processes.Process(target=generate, args=(arguments, rank, world)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def alive(process):
    return process.is_alive()


def contents(folder):
    """{name: bytes} of all files but those that tell times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if not any(path.match(pattern) for pattern in VARIES)
    }


def distances(folder):
    return [list(row.values())[-1] for row in json.loads((folder / "fid_mscoco.json").read_text())["rows"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The options of a generation, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_coco(folder / "coco", PICTURES)
    ckpt = make_narrow(folder / "narrow")
    options = ["--ckpt", str(ckpt), "--coco_root", str(folder / "coco"), "--image_size", "32", "32"]
    options += ["--num_inference_steps", "2", "--cache", "F1B0_W1_R1", "--limit", str(PICTURES)]
    # Later starts take their graphs from there; a kill may meet one that is being written, too.
    options += ["--compile_cache", str(folder / "graphs")]
    page = folder / "page.md"
    (process,) = start([*options, "--save_path", str(folder / "out"), "--into", str(page)], 1)
    process.join()
    assert process.exitcode == 0
    assert page.read_text(encoding="utf-8").split("\n\n", 2)[2] == (folder / "out" / "fid_mscoco.md").read_text("utf-8")
    return options, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.release), 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(undisturbed, world, tmp_path):
    options, expected = undisturbed
    arguments, chance = [*options, "--save_path", str(tmp_path)], random.Random(world)
    for kill in range(KILLS):
        ranks = start(arguments, world)
        if kill % 4:
            # Most kills fall into the drawing, where there is something to break.
            written = len(list(tmp_path.rglob("*.png")))
            while len(list(tmp_path.rglob("*.png"))) == written and all(map(alive, ranks)):
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
        else:
            time.sleep(chance.uniform(0, 4))
        chance.choice(ranks).kill()
        # As msrun does when a rank is gone.
        for process in ranks:
            process.kill()
            process.join()
    left = len(list(tmp_path.rglob("*.png")))
    assert 0 < left < 2 * PICTURES, "the kills have to meet a generation at work"
    for process in start(arguments, world):
        process.join(300)
        assert process.exitcode == 0
    assert contents(tmp_path) == contents(expected)
    assert distances(tmp_path) == distances(expected)


@pytest.mark.release
def test_under_msrun_a_dead_rank_is_told_and_the_next_start_goes_on(undisturbed, tmp_path):
    options, expected = undisturbed
    folder = Path(sys.executable).parent
    # msrun starts whatever "python" it finds.
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    msrun = [str(folder / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True"]
    msrun += ["--master_port=8119", f"--log_dir={tmp_path / 'logs'}", fid_mscoco.__file__]
    command = [*msrun, *options, "--save_path", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        while not list(tmp_path.rglob("*.png")) and launcher.poll() is None:
            time.sleep(0.01)
        for worker in psutil.Process(launcher.pid).children():
            ended = worker.status() == psutil.STATUS_ZOMBIE
            if not ended and worker.environ().get("MS_NODE_ID") == "1":
                worker.kill()
    assert launcher.returncode != 0
    assert 0 < len(list(tmp_path.rglob("*.png"))) < 2 * PICTURES
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(expected)
    assert distances(tmp_path / "out") == distances(expected)


def test_who_follows_may_go_before_the_first_rank_evaluates(monkeypatch):
    met, painter = [], SimpleNamespace(dismiss=lambda: met.append("dismissed"))
    monkeypatch.setattr(drawing, "session", lambda args: nullcontext((painter, (0, 1))))
    monkeypatch.setattr(drawing, "draw_missing", lambda *args, **how: met.append("drawn"))
    monkeypatch.setattr(drawing, "wait_for_all", lambda *args: met.append("all there"))
    drawing.draw_and_finish(None, [], [], lambda *args: met.append("finished"))
    assert met == ["drawn", "dismissed", "all there", "finished"]
