"""One picture on several devices: processes that msrun starts on this host's CPU."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import mindone.diffusers
import numpy as np
import psutil
import pytest
import shared_picture
from make_coco import make_coco
from make_models import make
from narrow import make_narrow
from shared_picture import CASES, FLUX, FLUX2, QWEN, draw

import mindspore as ms

from FBCache_ms import ContextParallelConfig, Flux2Pipeline, apply_cache_on_pipe, remove_cache_from_pipe
from FBCache_ms.eval import fid_mscoco
from FBCache_ms.predict import sharing
from FBCache_ms.runtime import parallel, scheduler_watch

KILLS = 10
PICTURES = 40
QUICK = ("order 1, true CFG", "cfg_parallel", "Ulysses, true CFG")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a small model of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_narrow(folder / FLUX, 2, 2)
    for family in (QWEN, FLUX2):
        make(folder / family, family)
    return folder


def free_port():
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(number, script, *arguments, folder):
    """Runs so many processes of a script as msrun would, but for the core that msrun keeps busy with waiting."""
    own = {"MS_WORKER_NUM": str(number), "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}
    (folder / "log").mkdir()
    processes = []
    for rank in (None, *range(number)):
        role = {"MS_ROLE": "MS_SCHED"} if rank is None else {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank)}
        with open(folder / "log" / f"{'scheduler' if rank is None else f'worker_{rank}'}.log", "w") as log:
            command = [sys.executable, str(script), *map(str, arguments)]
            how = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder, "env": {**environment, **role}}
            processes.append(subprocess.Popen(command, **how))
    try:
        return [process.wait() for process in reversed(processes)]
    finally:
        for process in processes:
            process.kill()


def start(number, script, *arguments, folder):
    """msrun with so many processes of a script."""
    command = [str(BIN / "msrun"), f"--worker_num={number}", f"--local_worker_num={number}"]
    command.append(f"--master_port={free_port()}")
    command += [f"--log_dir={folder / 'log'}", "--join=True", str(script), *map(str, arguments)]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def logs(folder):
    """What the processes have said."""
    return "\n".join(file.read_text(errors="replace")[-3000:] for file in sorted((folder / "log").glob("worker_*.log")))


class Drawn:
    """What the ranks have drawn of some cases, in one run."""

    def __init__(self, number, names, checkpoints, folder):
        ended = run_ranks(number, shared_picture.__file__, checkpoints, folder, *names, folder=folder)
        assert ended[:number] == number * [0], logs(folder)
        self.ranks = [dict(np.load(folder / f"{rank}.npz")) for rank in range(number)]

    def compare(self, name, checkpoints):
        """Holds a case against one device's."""
        one = draw(checkpoints, name)
        # An input that lies between two levels may be rounded to the other one: 0.01 apart without AVX512.
        limit = 2e-2 if name == "int8" else 1e-5
        # SpeCa divides by each number of a stream, however small.
        relative = 2e-2 if name == "SpeCa" else 1e-3
        for rank in self.ranks:
            np.testing.assert_array_equal(rank[f"{name}: reused"], one["reused"])
            np.testing.assert_allclose(rank[f"{name}: latents"], one["latents"], rtol=0, atol=limit)
            np.testing.assert_array_equal(rank[f"{name}: latents"], self.ranks[0][f"{name}: latents"])
            np.testing.assert_allclose(rank[f"{name}: diffs"], one["diffs"], rtol=relative, atol=1e-5)
        return one


@pytest.fixture(scope="module")
def quick(checkpoints, tmp_path_factory):
    return Drawn(2, QUICK, checkpoints, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def others(checkpoints, tmp_path_factory):
    return Drawn(2, [name for name in CASES if name not in QUICK], checkpoints, tmp_path_factory.mktemp("others"))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_draw_and_decide_what_one_does(quick, checkpoints, name):
    one = quick.compare(name, checkpoints)
    assert one["reused"].any() and not one["reused"].all() and len(one["reused"]) == 2
    # What does not grow with the tokens stays.
    assert quick.ranks[0][f"{name}: bytes"] < one["bytes"]


@pytest.mark.release
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_two_ranks_draw_and_decide_what_one_does_in_every_case(others, checkpoints, name):
    others.compare(name, checkpoints)


@pytest.mark.release
def test_four_ranks_draw_and_decide_what_one_does(checkpoints, tmp_path):
    names = QUICK[0], QUICK[2]
    drawn = Drawn(4, names, checkpoints, tmp_path)
    for name in names:
        drawn.compare(name, checkpoints)


DISAGREEING = """
import sys
import numpy as np
from FBCache_ms import CacheConfig, ContextParallelConfig, FluxPipeline, choose_device

choose_device("CPU")
pipe = FluxPipeline.from_pretrained(sys.argv[1])
pipe.enable_parallelism(ContextParallelConfig())
rank, threshold, prompt, guidance = pipe.sharing.ranks.rank, 0.3, "a big red circle", 3.5
if sys.argv[2] == "settings":
    threshold += 0.1 * rank
elif sys.argv[2] == "prompts":
    prompt = ["a big red circle", "a small green square"][rank]
elif sys.argv[2] == "inputs":
    guidance += rank
elif sys.argv[2] == "weights":
    weight = pipe.transformer.x_embedder.weight
    weight.set_data(weight * (1 + rank))
elif rank == 1:
    raise RuntimeError("something went wrong here")
pipe(prompt, num_inference_steps=8, guidance_scale=guidance, cache_config=CacheConfig(threshold))
"""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("settings", marks=pytest.mark.slow),
        *[pytest.param(what, marks=pytest.mark.release) for what in ("prompts", "inputs", "weights", "nothing")],
    ],
)
def test_ranks_that_were_given_different_things_are_told_so_and_end(what, checkpoints, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISAGREEING)
    process = start(2, script, checkpoints / FLUX, what, folder=tmp_path)
    process.communicate(timeout=240)
    said = "something went wrong here" if what == "nothing" else f"disagree on {what}: rank 1 of the group"
    assert process.returncode != 0 and said in logs(tmp_path)


def ended(process):
    """A process's status, once it has ended; pytest shows what it said where a test fails."""
    print(process.communicate(timeout=600)[0])
    return process.returncode


def contents(folder):
    """{name: bytes} of the pictures in a folder."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


@pytest.mark.release
def test_killed_at_random_moments_all_end_within_a_minute_and_the_same_command_goes_on(checkpoints, tmp_path):
    make_coco(tmp_path / "coco", PICTURES)
    options = ["--ckpt", checkpoints / FLUX, "--coco_root", tmp_path / "coco", "--image_size", "64", "64"]
    options += ["--num_inference_steps", "4", "--cache", "F1B0_W1_R1", "--limit", PICTURES, "--context_parallel", "2"]
    options += ["--compile_cache", tmp_path / "graphs", "--save_path"]
    begin, undisturbed = time.monotonic(), tmp_path / "undisturbed"
    process = start(2, fid_mscoco.__file__, *options, undisturbed, folder=tmp_path)
    while not contents(undisturbed) and process.poll() is None:
        time.sleep(0.01)
    to_first, chance, met = time.monotonic() - begin, random.Random(0), 0
    assert ended(process) == 0
    for kill in range(KILLS):
        process = start(2, fid_mscoco.__file__, *options, tmp_path / "killed", folder=tmp_path)
        pictures = len(contents(tmp_path / "killed"))
        if kill % 2:
            # Into the drawing, where ranks wait for each other.
            while len(contents(tmp_path / "killed")) == pictures and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
        else:
            time.sleep(chance.uniform(0, to_first))
        victim = str(chance.randrange(2))
        for worker in psutil.Process(process.pid).children() if process.poll() is None else []:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if worker.environ().get("MS_NODE_ID") != victim:
                    continue
                worker.kill()
                met += 1
                said, _ = process.communicate(timeout=60)
                assert process.returncode != 0 and f"Worker process {worker.pid} exit with exception" in said
        if process.returncode is None:
            ended(process)
    assert met == KILLS
    assert ended(start(2, fid_mscoco.__file__, *options, tmp_path / "killed", folder=tmp_path)) == 0
    assert contents(tmp_path / "killed") == contents(undisturbed) != {}


SCHEDULER = f"""
import os, subprocess, sys, time
watch = "import sys, scheduler_watch; scheduler_watch.watch(int(sys.argv[1]), grace=0.2, pause=0.05)"
environment = {{**os.environ, "PYTHONPATH": {str(Path(scheduler_watch.__file__).parent)!r}}}
subprocess.Popen([sys.executable, "-c", watch, str(os.getpid())], env=environment)
print(flush=True)
time.sleep(600)
"""


def of_job(role, port, command):
    """A process that msrun would have started."""
    job = {"MS_ROLE": role, "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", command], env={**os.environ, **job}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def test_the_scheduler_ends_behind_the_last_process_of_its_job():
    waiting = "print(flush=True); import time; time.sleep(600)"
    workers = [of_job("MS_WORKER", 1, waiting), of_job("MS_WORKER", 1, waiting), of_job("MS_WORKER", 2, waiting)]
    schedulers = [of_job("MS_SCHED", port, SCHEDULER) for port in (1, 2, 3)]
    for process in (*workers, *schedulers):
        process.stdout.readline()
    try:
        workers[0].kill()
        workers[0].wait()
        with pytest.raises(subprocess.TimeoutExpired):
            schedulers[0].wait(timeout=2)
        workers[1].kill()
        workers[1].wait()
        assert schedulers[0].wait(timeout=60) == -signal.SIGKILL
        # One has its worker yet, and the other's are on other hosts.
        assert [each.poll() for each in schedulers[1:]] == [None, None]
    finally:
        for process in (*workers, *schedulers):
            process.kill()
            process.communicate()


def test_a_scheduler_of_msruns_ends_too_where_no_process_was_ever_seen(tmp_path):
    (tmp_path / "msrun").write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SCHEDULER!r}])")
    job = {"MS_ROLE": "MS_SCHED", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "4"}
    done = subprocess.run([sys.executable, tmp_path / "msrun"], env={**os.environ, **job}, timeout=60)
    assert done.returncode == 0


BAD = {
    "degree must be a number from 1 on or None, not 0": {"degree": 0},
    "scheme must be one of gather, ulysses, not 'ring'": {"scheme": "ring"},
    "degree must be even with cfg_parallel, not 3": {"degree": 3, "cfg_parallel": True},
}


@pytest.mark.parametrize("message", BAD)
def test_a_config_that_says_nothing_is_refused(message):
    with pytest.raises(ValueError, match=message):
        ContextParallelConfig(**BAD[message])


def test_what_cannot_be_shared_is_refused(pipe, monkeypatch):
    with pytest.raises(TypeError, match="config must be a ContextParallelConfig, not int"):
        pipe.enable_parallelism(2)
    with pytest.raises(ValueError, match="degree 2: 1 processes cannot be divided"):
        pipe.enable_parallelism(ContextParallelConfig(2))
    ranks = parallel.Ranks.__new__(parallel.Ranks)
    ranks.number = 2
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    monkeypatch.setattr(pipe.transformer.transformer_blocks[0].attn, "processor", lambda *args: None)
    with pytest.raises(ValueError, match="attention processor function cannot be shared"):
        parallel.share(pipe.transformer, ranks)
    monkeypatch.undo()
    assert pipe.transformer.transformer_blocks[0].attn.processor is processor


def test_heads_that_cannot_be_shared_evenly_are_refused(pipe):
    ranks = parallel.SCHEMES["ulysses"](1, 0, None)
    ranks.number, heads = 5, pipe.transformer.transformer_blocks[0].attn.heads
    with pytest.raises(ValueError, match=f"{heads} heads cannot be shared by 5 devices evenly"):
        parallel.share(pipe.transformer, ranks)


def test_who_follows_is_let_go_once(monkeypatch):
    ranks, told = parallel.SCHEMES["gather"](1, 0, None), []
    sharing = parallel.Sharing(ranks, ranks, None, {})
    monkeypatch.setattr(sharing, "tell", lambda: told.append(None))
    sharing.dismiss()
    sharing.dismiss()
    assert told == [None]


def test_threads_are_free_again_behind_the_connections():
    found, ready, done = {}, Event(), Event()

    def work():
        found["within"] = os.sched_getaffinity(0), os.sched_getscheduler(0)
        ready.set()
        done.wait()
        found["after"] = os.sched_getaffinity(0), os.sched_getscheduler(0)

    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    thread = Thread(target=work)
    with parallel.in_turn():
        thread.start()
        ready.wait()
    done.set()
    thread.join()
    assert found["within"] == ({min(before[0])}, os.SCHED_BATCH)
    assert found["after"] == before == (os.sched_getaffinity(0), os.sched_getscheduler(0))


def test_where_threads_may_not_be_bound_ranks_meet_all_the_same(monkeypatch):
    def forbidden(*arguments):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with parallel.in_turn():
        pass


def test_the_programs_know_every_scheme():
    assert tuple(parallel.SCHEMES) == sharing.SCHEMES


def test_a_group_of_one_hands_on_what_it_has():
    exchange = parallel.Exchange(parallel.Ranks(1, 0, None))
    np.testing.assert_array_equal(exchange(ms.Tensor([3, 4], ms.int32)).asnumpy(), [[3, 4]])


def test_a_transformer_that_another_pipeline_shares_is_refused(pipe):
    ranks = parallel.Ranks.__new__(parallel.Ranks)
    ranks.number, ranks.rank, ranks.group = 2, 0, None
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    parallel.share(pipe.transformer, ranks)
    try:
        with pytest.raises(ValueError, match="another pipeline shares the transformer's calls"):
            pipe("a big red circle", num_inference_steps=1)
        sharing = SimpleNamespace(ranks=ranks)
        assert parallel.why_not_shared(pipe.transformer, sharing) is None
    finally:
        parallel.unshare(pipe.transformer)
    assert pipe.transformer.transformer_blocks[0].attn.processor is processor
    # Another pipeline with the same transformer has ended it, or set processors of its own.
    assert "processor FluxAttnProcessor is not the one" in parallel.why_not_shared(pipe.transformer, sharing)


def test_what_ranks_compare_is_every_input():
    def given(**more):
        return {"encoder_hidden_states": ms.Tensor([[1.0, 2.0]]), "guidance": ms.Tensor([3.5]), "still": None, **more}

    whole = parallel.digest([given(), given()])
    assert parallel.digest([given(), given()]) == whole
    others = {"guidance": ms.Tensor([3.0])}, {"still": ms.Tensor([0.0])}, {"ids": (ms.Tensor([1.0]), {"a": 1})}
    for other in others:
        assert parallel.digest([given(), given(**other)]) != whole


def test_the_cache_that_is_taken_out_leaves_no_shared_attention(pipe):
    plain = mindone.diffusers.FluxPipeline(**pipe.components)
    applied = apply_cache_on_pipe(plain).transformer
    ranks = parallel.Ranks.__new__(parallel.Ranks)
    ranks.number, ranks.rank, ranks.group = 2, 0, None
    parallel.share(pipe.transformer, ranks)
    applied.sharing = SimpleNamespace(ranks=ranks)
    remove_cache_from_pipe(plain)
    assert plain.transformer is pipe.transformer and parallel.why_not_shared(pipe.transformer, None) is None


def test_flux_2_takes_no_negative_prompt_to_share():
    with pytest.raises(ValueError, match="cfg_parallel needs a negative prompt, and Flux2Pipeline takes none"):
        Flux2Pipeline.enable_parallelism(
            Flux2Pipeline.__new__(Flux2Pipeline), parallel.ContextParallelConfig(cfg_parallel=True)
        )
