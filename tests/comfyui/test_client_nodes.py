"""ComfyUI's nodes that draw on a server: the nodes as ComfyUI loads them, with stand-ins for torch and comfy."""

import base64
import hashlib
import importlib.util
import io
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from fakes import pixels_of, serving
from PIL import Image

from FBCache_ms.config import CacheConfig

BALANCED = CacheConfig.preset("balanced")
FOLDER = Path(__file__).parents[2] / "comfyui_fbcache"


class Interrupted(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


class Bar:
    """Stands for comfy.utils.ProgressBar; keeps what it was told."""

    told = []

    def __init__(self, total):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        self.told.append((value, self.total, preview))


@pytest.fixture
def nodes(monkeypatch):
    """The package's nodes module, and ``interrupt``: an Event that stands for ComfyUI's button."""
    interrupt, modules = threading.Event(), {name: ModuleType(name) for name in ("torch", "comfy", *COMFY)}

    def throw():
        if interrupt.is_set():
            raise Interrupted

    modules["torch"].from_numpy = lambda array: array
    modules["comfy"].utils, modules["comfy"].model_management = (modules[name] for name in COMFY)
    modules["comfy.utils"].ProgressBar = Bar
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = throw
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(
        "fbcache_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fbcache_nodes", package)
    spec.loader.exec_module(package)
    found = sys.modules["fbcache_nodes.nodes"]
    monkeypatch.setattr(Bar, "told", [])
    found.interrupt = interrupt
    yield found
    for name in [name for name in sys.modules if name.startswith("fbcache_nodes")]:
        del sys.modules[name]


COMFY = ("comfy.utils", "comfy.model_management")


def drawn(nodes, url, **changes):
    """What the node draws on a server, with its defaults."""
    node = nodes.NODE_CLASS_MAPPINGS["FBCacheFluxTextToImage"]
    inputs = node.INPUT_TYPES()["required"]
    defaults = {name: how[1]["default"] for name, how in inputs.items() if "default" in how[1]}
    found = getattr(node(), node.FUNCTION)(**{**defaults, "server": url, "prompt": "a circle", **changes})
    return found[0]


def applied(nodes, url, **changes):
    """A MODEL of Apply First Block Cache on a server."""
    (model,) = nodes.LoadServedModel().load(url, "")
    inputs = {"object_to_patch": "diffusion_model", "residual_diff_threshold": 0.08, **changes}
    return nodes.ApplyFBCacheOnModel().patch(model, **inputs)[0]


def drawings(server):
    """The Drawings that a server's drawing process was told of."""
    return [message[2][0] for message in server.told if message[0] == "draw"]


def test_pictures_are_what_the_server_draws(nodes):
    with serving() as server:
        found = drawn(nodes, server.url, batch_size=2, seed=2**64 - 2, steps=3, size="96x64")
    wanted = [pixels_of(each) for each in drawings(server)]
    assert found.shape == (2, 64, 96, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(np.round(found * 255), wanted)
    assert [each.seed for each in drawings(server)] == [2**64 - 2, 2**64 - 1]


def test_the_bar_and_the_preview_follow_the_steps(nodes):
    with serving() as server:
        drawn(nodes, server.url, prompt="a circle", batch_size=2, steps=4)
    values = [value for value, total, preview in Bar.told]
    assert values == sorted(values) and values[-1] == 8 and {total for _, total, _ in Bar.told} == {8}
    assert Bar.told[-1][2][1].size == (8, 8)


@pytest.mark.parametrize(
    "inputs, config",
    [
        ({}, BALANCED),
        ({"preset": "none"}, BALANCED.switched_off()),
        ({"preset": "teacache"}, CacheConfig.preset("teacache")),
        ({"threshold": 0.25}, BALANCED.changed(residual_diff_threshold=0.25)),
        ({"preset": "teacache", "threshold": 0.3}, CacheConfig.preset("teacache").changed(teacache_threshold=0.3)),
        ({"max_consecutive_cache_hits": 2}, BALANCED.changed(max_consecutive_cache_hits=2)),
        ({"max_consecutive_cache_hits": 0}, BALANCED.switched_off()),
        ({"start": 0.25, "end": 0.5}, BALANCED.changed(start=0.25, end=0.5)),
    ],
)
def test_inputs_are_settings_of_the_cache(nodes, inputs, config):
    with serving() as server:
        drawn(nodes, server.url, **inputs)
    assert drawings(server)[0].tag == str(config)


@pytest.mark.parametrize(
    "inputs, config",
    [
        ({}, BALANCED.changed(residual_diff_threshold=0.08)),
        (
            {"max_consecutive_cache_hits": 3},
            BALANCED.changed(residual_diff_threshold=0.08, max_consecutive_cache_hits=3),
        ),
        ({"residual_diff_threshold": 0.0}, BALANCED.switched_off()),
        ({"max_consecutive_cache_hits": 0}, BALANCED.switched_off()),
        ({"start": 0.5}, BALANCED.changed(residual_diff_threshold=0.08, start=0.5)),
    ],
)
def test_apply_first_block_cache_takes_the_published_inputs(nodes, inputs, config):
    with serving() as server:
        drawn(nodes, "http://127.0.0.1:1", model=applied(nodes, server.url, **inputs))
    assert drawings(server)[0].tag == str(config)


def test_published_inputs_have_their_defaults_and_limits(nodes):
    inputs = nodes.ApplyFBCacheOnModel.INPUT_TYPES()["required"]
    published = {
        "residual_diff_threshold": (0.0, 0.0, 1.0),
        "start": (0.0, 0.0, 1.0),
        "end": (1.0, 0.0, 1.0),
        "max_consecutive_cache_hits": (-1, -1, None),
    }
    assert list(inputs) == ["model", "object_to_patch", *published]
    for name, wanted in published.items():
        assert tuple(inputs[name][1].get(key) for key in ("default", "min", "max")) == wanted


@pytest.mark.parametrize(
    "inputs, error",
    [
        ({"size": "128x128"}, "400: size must be one of 64x64, 96x64"),
        ({"preset": "balanst"}, "400: cache: "),
        ({"prompt": ""}, "400: prompt: "),
        ({"steps": 500}, "400: num_inference_steps must be 100 or fewer"),
        ({"prompt": "fail"}, "it cannot be shown"),
        ({"prompt": "refuse"}, "it has to be another"),
        ({"preset": "none", "threshold": 0.1}, "fbcache.threshold has no effect"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(nodes, inputs, error):
    with serving() as server, pytest.raises(RuntimeError, match=error):
        drawn(nodes, server.url, **inputs)


@pytest.mark.parametrize(
    "url, error",
    [
        ("http://127.0.0.1:1", "nobody serves at http://127.0.0.1:1; `fbcache serve` does"),
        ("127.0.0.1:8000", "must be http://HOST:PORT, not '127.0.0.1:8000'"),
        ("http://127.0.0.1:port", "must be http://HOST:PORT"),
    ],
)
def test_an_address_where_no_server_is(nodes, url, error):
    with pytest.raises(RuntimeError, match=error):
        drawn(nodes, url)


def test_a_model_of_another_node_is_refused(nodes):
    with pytest.raises(ValueError, match="a dict is on no server"):
        drawn(nodes, "http://127.0.0.1:1", model={})
    with pytest.raises(ValueError, match="object_to_patch must be diffusion_model, not 'vae'"):
        applied(nodes, "http://127.0.0.1:1", object_to_patch="vae")


def test_a_key_comes_from_the_node_or_from_the_environment(nodes, monkeypatch):
    with serving(keys=(hashlib.sha256(b"secret").digest(),)) as server:
        with pytest.raises(RuntimeError, match="401: an API key is needed"):
            drawn(nodes, server.url)
        drawn(nodes, server.url, api_key="secret")
        monkeypatch.setenv("FBCACHE_API_KEY", "secret")
        drawn(nodes, server.url)
    assert len(drawings(server)) == 2


def test_comfyuis_interrupt_ends_the_drawing_on_the_server_too(nodes):
    with serving() as server:
        threading.Timer(0.5, nodes.interrupt.set).start()
        with pytest.raises(Interrupted):
            drawn(nodes, server.url, prompt="slow")
        until = time.monotonic() + 10
        while not any(message[0] == "cancel" for message in server.told) and time.monotonic() < until:
            time.sleep(0.02)
        nodes.interrupt.clear()
        drawn(nodes, server.url)
    assert [message[0] for message in server.told] == ["draw", "cancel", "draw"]


def test_a_full_queue_is_waited_for(nodes):
    with serving(queue=1) as server, httpx.Client(base_url=server.url) as others:
        for _ in range(10):
            drawn(nodes, server.url)  # The server learns that a request is quick, and asks nobody to wait for long.
        jobs = [others.post("/v1/jobs", json={"prompt": "slow"}).json()["id"] for _ in range(2)]
        found = []
        thread = threading.Thread(target=lambda: found.append(drawn(nodes, server.url)))
        thread.start()
        thread.join(0.5)
        assert not found
        for job in jobs:
            others.delete(f"/v1/jobs/{job}")
        thread.join(30)
    assert len(found) == 1


def test_pictures_are_read_as_they_were_encoded(nodes):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    np.testing.assert_array_equal(np.asarray(nodes.opened(base64.b64encode(file.getvalue()))), pixels)
