"""The command fbcache serve with the embedded checkpoint, from its start to its end."""

import base64
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from FBCache_ms.eval.run_flux_withFBCache_pipeline import image_of
from FBCache_ms.eval.serve import main
from FBCache_ms.runtime.checkpoint import TINY_FLUX

COMMAND = sys.executable, "-m", "FBCache_ms.serve", "--port", "0"
FACTS = {"size": "96x64", "seed": 5, "num_inference_steps": 12, "prompt": "a small green diamond, red background"}


def wait_for(holds, seconds=300):
    """Waits until something holds."""
    for _ in range(seconds * 10):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("this does not come to be")


def is_ready(client):
    return client.get("/ready").status_code == 200


@pytest.fixture(scope="module")
def server():
    """The process and a client of it."""
    command = *COMMAND, "--sizes", "64x64", "96x64", "--presets", "balanced"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    with httpx.Client(base_url=url, timeout=300) as client:
        wait_for(lambda: is_ready(client))
        yield SimpleNamespace(process=process, client=client)
    process.kill()
    process.communicate()


@pytest.fixture
def client(server):
    wait_for(lambda: is_ready(server.client))
    return server.client


def draw(client, **fields):
    """A picture's data."""
    answer = client.post("/v1/images/generations", json={"prompt": "a big red circle", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]


def metric(client, name):
    """A metric's value."""
    return float(re.search(rf"^{name} (.+)$", client.get("/metrics").text, re.MULTILINE)[1])


def painter_of(server):
    """The drawing process."""
    (painter,) = psutil.Process(server.process.pid).children()
    return painter


def test_a_picture_is_the_pipelines(client, pipe):
    data = draw(client, **FACTS, fbcache={"stats": True})
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))
    drawn = pipe(
        FACTS["prompt"],
        width=96,
        height=64,
        num_inference_steps=12,
        generator=np.random.default_rng(5),
        output_type="np",
    )[0][0]
    assert np.array_equal(picture, np.asarray(image_of(drawn)))
    stats = data["fbcache"]["stats"]
    assert (stats["computed_steps"], stats["cached_steps"]) == (
        pipe.cache_stats.computed_steps,
        pipe.cache_stats.cached_steps,
    )


def test_nothing_compiles_behind_ready_and_the_same_request_gets_the_same_bytes(client):
    before, first = metric(client, "graph_compilations_total"), draw(client, **FACTS)
    for size in ("64x64", "96x64"):
        for steps, cache in enumerate(("balanced", "none", "conservative", "fast", "F1B0_W2_R0.3"), 3):
            draw(client, size=size, cache=cache, num_inference_steps=steps, seed=1)
    draw(client, seed=2, n=2, fbcache={"compare": True}, output_format="webp", guidance_scale=2)
    assert draw(client, **FACTS) == first
    assert metric(client, "graph_compilations_total") == before == 2


def test_a_prompt_that_would_be_cut_is_refused(client):
    answer = client.post("/v1/images/generations", json={"prompt": "a big red circle " * 20})
    assert answer.status_code == 400 and "tokens; at most 32 are read" in answer.json()["error"]["message"]


def test_watching_and_cancelling_leave_the_bytes_as_they_are(client):
    first = draw(client, **FACTS)
    streamed = client.post(
        "/v1/images/generations", json={**FACTS, "stream": True, "partial_images": 1, "fbcache": {"progress": True}}
    ).text
    assert first["b64_json"] in streamed and streamed.count("event: fbcache.step") >= 2
    for fields in ({}, {"fbcache": {"progress": True}}):
        job = client.post("/v1/jobs", json={**FACTS, "num_inference_steps": 100, "n": 10, **fields}).json()["id"]
        wait_for(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "running")
        assert client.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"
        assert draw(client, **FACTS) == first


def test_a_killed_painter_is_replaced_and_its_request_drawn(server, client):
    first, killed = draw(client, **FACTS), painter_of(server)
    job = client.post("/v1/jobs", json={**FACTS, "n": 10}).json()["id"]
    wait_for(lambda: client.get(f"/v1/jobs/{job}").json()["pictures"] == 1)
    killed.kill()
    wait_for(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "succeeded")
    assert client.get(f"/v1/jobs/{job}").json()["result"]["data"][0] == first
    assert painter_of(server).pid != killed.pid


def test_the_web_process_has_no_mindspore(server):
    maps = psutil.Process(server.process.pid).memory_maps()
    assert not any("mindspore" in each.path for each in maps)
    assert any("mindspore" in each.path for each in painter_of(server).memory_maps())


def test_at_the_end_running_work_is_finished_and_nothing_is_left(server, client):
    painter = painter_of(server)
    with httpx.Client(base_url=client.base_url, timeout=300) as other:
        request = other.build_request(
            "POST", "/v1/images/generations", json={**FACTS, "n": 10, "stream": True, "fbcache": {"progress": True}}
        )
        answer = other.send(request, stream=True)
        lines = answer.iter_lines()
        assert next(lines).startswith("event: ")
        waiting = client.post("/v1/jobs", json=FACTS).json()["id"]
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get(f"/v1/jobs/{waiting}").json()["status"] == "failed")
        assert [line for line in lines].count("event: image_generation.completed") == 10
    output = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0 and "Traceback" not in output
    assert not psutil.pid_exists(painter.pid) or painter.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "65x64"], "--sizes must be like 1024x1024"),
        (["--sizes", "big"], "--sizes must be like 1024x1024"),
        (["--presets", "balancd"], "did you mean balanced?"),
        (["--presets", "F9B9_W0_R0.1"], "leave none"),
        (["--presets", "balanced", "balanced"], "two have the same name"),
        (["--host", "0.0.0.0"], "is open to others"),
        (["--api_keys", "nowhere"], "--api_keys nowhere cannot be read"),
        (["--moderation", "nowhere"], "--moderation nowhere cannot be imported"),
        (["--moderation", "json"], "--moderation json has no function check_prompt"),
        (["--timeout", "inf"], "--timeout must be finite, not inf"),
        (["--batch_wait_ms", "inf"], "--batch_wait_ms must be finite, not inf"),
        (["--painter_timeout", "nan"], "--painter_timeout must be 1 or more, not nan"),
        (["--max_steps", "20"], "--max_steps must be in [28, 1000]"),
        (["--sizes", *(f"{8 * number}x64" for number in range(1, 18))], "need 17 graphs"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=lambda given: " ".join(given[:3]) if isinstance(given, list) else "",
)
def test_a_mistake_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = *COMMAND[:-1], str(taken.getsockname()[1])
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "in use" in ended.stderr


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server(tmp_path):
    shutil.copytree(TINY_FLUX, tmp_path / "broken")
    config = tmp_path / "broken" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"base_shift"', '"base_shifted"').replace("1000", '"x"'))
    ended = subprocess.run((*COMMAND, "--ckpt", tmp_path / "broken"), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "serve: error:" in ended.stderr
