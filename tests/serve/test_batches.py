"""Pictures of several requests that are drawn at once."""

import base64
import io
from dataclasses import replace

import httpx
import numpy as np
import pytest
from fakes import SETTINGS, pixels_of, serving
from PIL import Image
from test_server import wait_for

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.serve import main
from FBCache_ms.serve.requests import checked, ordered

PRESETS = {"fora": CacheConfig.preset("fora"), "balanced": CacheConfig.preset("balanced")}
BATCHES = {"presets": PRESETS, "batch_sizes": (1, 2, 4), "queue": 8}


def batch(**fields):
    """What the pictures of a request have in common with those that they may be drawn with."""
    fields = checked({"prompt": "a circle", **fields})
    return ordered(fields, replace(SETTINGS, **BATCHES), fields.stream).batch


def test_requests_alike_are_drawn_together_whatever_their_prompts():
    assert batch() == batch(prompt="a square", n=3) is not None
    others = batch(size="96x64"), batch(num_inference_steps=8), batch(guidance_scale=2.0)
    assert len({batch(), *others}) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 0},
        {"cache": "balanced"},
        {"fbcache": {"compare": True}},
        {"stream": True, "fbcache": {"progress": True}},
        {"stream": True, "partial_images": 2},
    ],
    ids=str,
)
def test_what_depends_on_a_batch_is_drawn_alone(fields):
    assert batch(**fields) is None


def drawn(server):
    """How many pictures each call had drawn."""
    return [len(message[2]) for message in server.told if message[0] == "draw"]


def result(client, job):
    """The pictures of a job that is done."""
    wait_for(lambda: client.get(f"/v1/jobs/{job}").json()["status"] in ("succeeded", "failed", "cancelled"))
    return client.get(f"/v1/jobs/{job}").json()


def begun(client, **fields):
    """The id of a job."""
    return client.post("/v1/jobs", json={"prompt": "a circle", **fields}).json()["id"]


def test_each_request_gets_its_own_pictures_of_a_batch():
    with serving(**BATCHES) as server, httpx.Client(base_url=server.url) as client:
        slow = begun(client, prompt="slow")
        wait_for(lambda: client.get(f"/v1/jobs/{slow}").json()["status"] == "running")
        jobs = [begun(client, prompt=prompt, n=n) for prompt, n in (("one", 1), ("two", 3), ("three", 2))]
        client.delete(f"/v1/jobs/{slow}")
        found = [result(client, job)["result"]["data"] for job in jobs]
    assert drawn(server) == [1, 4, 2] and [len(each) for each in found] == [1, 3, 2]
    told = [drawing for message in server.told[1:] if message[0] == "draw" for drawing in message[2]]
    for drawing, picture in zip(told, sum(found, [])):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))))
        np.testing.assert_array_equal(pixels, pixels_of(drawing))
        assert picture["seed"] == drawing.seed


def test_one_that_is_refused_or_cancelled_leaves_the_others_alone():
    with serving(**BATCHES, batch_wait=0.3) as server, httpx.Client(base_url=server.url) as client:
        one, refused, left = (begun(client, prompt=prompt) for prompt in ("one", "refuse", "two"))
        client.delete(f"/v1/jobs/{left}")
        assert result(client, refused)["error"]["message"] == "it has to be another"
        assert result(client, one)["status"] == "succeeded" and result(client, left)["status"] == "cancelled"
    assert drawn(server) == [2, 1]


def test_without_batch_sizes_each_is_drawn_alone():
    with serving(presets=PRESETS) as server, httpx.Client(base_url=server.url) as client:
        assert len(result(client, begun(client, n=3))["result"]["data"]) == 3
    assert drawn(server) == [1, 1, 1]


def test_batches_of_a_gate_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--batch_sizes", "4"])
    assert "--batch_sizes needs a preset of a schedule alone" in capsys.readouterr().err
