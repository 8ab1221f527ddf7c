"""Several drawing processes behind one server: on this host, and where a Ray cluster has room for them."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import httpx
import psutil
import pytest
from fakes import serving
from test_server import draw, is_ready, metric, wait_for

from FBCache_ms.eval.serve import main
from FBCache_ms.serve.child import device_of

KILLS = 10

CLUSTER = """
import ray
print(ray.init(num_cpus=0, resources={"NPU": 2}, include_dashboard=False).address_info["address"], flush=True)
input()
"""
"""A host with two NPUs that are not there."""


def test_two_requests_are_drawn_at_once_by_two_processes():
    with serving(replicas=2) as server, httpx.Client(base_url=server.url) as client:
        jobs = [client.post("/v1/jobs", json={"prompt": "slow"}).json()["id"] for _ in range(2)]
        wait_for(lambda: all(client.get(f"/v1/jobs/{job}").json()["status"] == "running" for job in jobs))
        third = client.post("/v1/jobs", json={"prompt": "a circle"}).json()["id"]
        assert client.get(f"/v1/jobs/{third}").json()["status"] == "queued"
        client.delete(f"/v1/jobs/{jobs[1]}")
        wait_for(lambda: client.get(f"/v1/jobs/{third}").json()["status"] == "succeeded")
        assert client.get(f"/v1/jobs/{jobs[0]}").json()["status"] == "running"
        client.delete(f"/v1/jobs/{jobs[0]}")


def test_one_process_draws_on_where_another_has_died():
    with serving(replicas=2) as server, httpx.Client(base_url=server.url) as client:
        slow = client.post("/v1/jobs", json={"prompt": "slow"}).json()["id"]
        wait_for(lambda: client.get(f"/v1/jobs/{slow}").json()["status"] == "running")
        client.post("/v1/jobs", json={"prompt": "die once"})
        wait_for(lambda: metric(client, "fbcache_painter_restarts_total") == 1)
        assert is_ready(client) and client.get(f"/v1/jobs/{slow}").json()["status"] == "running"
        client.delete(f"/v1/jobs/{slow}")
        assert draw(client)["b64_json"]


def test_a_host_is_asked_once_whether_its_drawing_process_is_gone():
    """What nobody awaits any more goes on there."""
    ray_child = pytest.importorskip("FBCache_ms.serve.ray_child")
    asked = []

    async def wait():
        died = asyncio.Event()

        async def gone():
            asked.append(None)
            await died.wait()

        child = ray_child.RayChild(SimpleNamespace(gone=SimpleNamespace(remote=gone)))
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(child.gone(), 0)
            await asyncio.sleep(0)
        died.set()
        await child.gone()

    asyncio.run(wait())
    assert len(asked) == 1


def test_a_place_that_never_gets_ready_leaves_the_others_alone():
    with serving(broken={0}, replicas=2) as server, httpx.Client(base_url=server.url) as client:
        wait_for(lambda: metric(client, "fbcache_painter_restarts_total") >= 2)
        assert is_ready(client) and draw(client)["b64_json"]


def test_each_process_has_an_npu_of_its_own(monkeypatch):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    assert device_of(3) == {"ASCEND_RT_VISIBLE_DEVICES": "3"}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,6")
    assert device_of(1) == {"ASCEND_RT_VISIBLE_DEVICES": "6"}


def test_more_processes_than_npus_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,6")
    with pytest.raises(SystemExit):
        main(["--replicas", "3"])
    assert "--replicas 3: ASCEND_RT_VISIBLE_DEVICES names 4,6 alone" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    """Ray asks for a token that its own command would make."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@contextmanager
def cluster():
    """A Ray cluster's address."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate("\n")


@contextmanager
def served(*options):
    """A client of the server, and its process."""
    command = sys.executable, "-m", "FBCache_ms.serve", "--port", "0", *options
    # Without what MindSpore has set beside Python's environment.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            wait_for(lambda: metric(client, "fbcache_painters_ready") == 2)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


PAINTER = "FBCache_ms.serve.painter"


def painters():
    """The drawing processes, which are Ray's children where Ray has placed them."""
    # A process that has just ended has no command line.
    return [each for each in psutil.process_iter(["cmdline"]) if PAINTER in (each.info["cmdline"] or ())]


@contextmanager
def asked(client, number):
    """Asks for the same picture so many times at once; what came back, once it is over."""
    found = []
    threads = [Thread(target=lambda: found.append(draw(client, seed=1)["b64_json"])) for _ in range(number)]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_two_of_a_ray_clusters_npus_give_the_same_bytes_and_one_that_dies_is_replaced():
    with cluster() as address, served("--ray", address, "--replicas", "2") as client:
        with asked(client, 4) as found:
            pass
        assert len(found) == 4 and len(set(found)) == 1
        devices = {each.environ()["ASCEND_RT_VISIBLE_DEVICES"] for each in painters()}
        # Ray's own would be 1.
        threads = {each.environ().get("OMP_NUM_THREADS") for each in painters()}
        assert devices == {"0", "1"} and threads == {os.environ.get("OMP_NUM_THREADS")}
        os.kill(painters()[0].pid, signal.SIGKILL)
        assert draw(client, seed=1)["b64_json"] == found[0]
        wait_for(lambda: metric(client, "fbcache_painters_ready") == 2)
        assert metric(client, "fbcache_painter_restarts_total") == 1
    wait_for(lambda: not painters(), 30)


@pytest.mark.release
def test_killed_or_stopped_at_random_moments_a_ray_replica_is_replaced_and_its_picture_is_drawn():
    chance = random.Random(0)
    with cluster() as address, served("--ray", address, "--replicas", "2", "--painter_timeout", "5") as client:
        expected = draw(client, seed=1)["b64_json"]
        for kill in range(KILLS):
            victim = chance.choice(painters())
            with asked(client, 4) as found:
                time.sleep(chance.uniform(0, 1))
                victim.send_signal(signal.SIGSTOP if kill % 2 else signal.SIGKILL)
            assert found == 4 * [expected]
            if victim.is_running():
                # Stopped while it had nothing to do.
                victim.kill()
            wait_for(lambda: metric(client, "fbcache_painter_restarts_total") == kill + 1)
            wait_for(lambda: metric(client, "fbcache_painters_ready") == 2)
    wait_for(lambda: not painters(), 30)


@pytest.mark.slow
def test_a_cluster_with_too_few_npus_is_refused():
    with cluster() as address:
        command = [sys.executable, "-m", "FBCache_ms.serve", "--ray", address, "--replicas", "3"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--replicas 3: the Ray cluster" in done.stderr
