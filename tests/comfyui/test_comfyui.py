"""The ComfyUI nodes, through the node registry of mindone's port and with its own SaveImage.

mindone 0.5.0 has the port's nodes.py, but not comfy.model_management, comfy.sd, comfy.samplers, comfy_api, folder_paths
and comfy_execution, which it imports: stand-ins take their places here, and the prompt graph is walked by this test.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import mindone
import numpy as np
import pytest
from narrow import make_narrow
from PIL import Image

import FBCache_ms.comfyui
from FBCache_ms.comfyui import ApplyFBCacheOnModel, FluxModel

PORT = Path(mindone.__file__).parent / "comfyui"
MISSING = """
comfy.diffusers_load comfy.model_management comfy.options comfy.sd comfy.utils comfy.comfy_types
comfy.taesd comfy.taesd.taesd comfy_api comfy_api.internal comfy_api.latest comfy_api.version_list
comfy_config folder_paths
"""


@pytest.fixture
def port(monkeypatch, tmp_path):
    """The port's nodes.py with what mindone has of the port, and our folder among its custom nodes."""
    comfy = ModuleType("comfy")
    comfy.__path__ = [str(PORT / "comfy")]
    modules = {"comfy": comfy, **{name: MagicMock(name=name) for name in MISSING.split()}}
    modules["comfy.options"].args_parsing = False
    modules["comfy.comfy_types"].ComfyNodeABC = object
    modules["folder_paths"].get_output_directory = lambda: str(tmp_path)
    modules["folder_paths"].get_save_image_path = lambda prefix, folder, *size: (folder, prefix, 1, "", prefix)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent == "comfy":
            setattr(comfy, last, module)
    monkeypatch.setattr(sys, "path", [str(PORT), *sys.path])
    spec = importlib.util.spec_from_file_location("mindone_comfyui_nodes", PORT / "nodes.py")
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    assert asyncio.run(nodes.load_custom_node(str(Path(FBCache_ms.comfyui.__file__).parent)))
    yield nodes
    for name in set(sys.modules) - set(modules):
        if name.startswith(("comfy.", "latent_preview")):
            del sys.modules[name]


def prompt_graph(checkpoint, **cache):
    """A prompt as ComfyUI's API takes it."""
    size = {"width": 64, "height": 64, "batch_size": 2, "steps": 10, "guidance": 3.5, "seed": 7}
    inputs = {"object_to_patch": "diffusion_model", "start": 0.0, "end": 1.0, "max_consecutive_cache_hits": -1, **cache}
    return {
        "1": {"class_type": "LoadFluxPipeline", "inputs": {"checkpoint": str(checkpoint)}},
        "2": {"class_type": "ApplyFBCacheOnModel", "inputs": {"model": ["1", 0], **inputs}},
        "3": {"class_type": "FluxTextToImage", "inputs": {"model": ["2", 0], "text": "a big red circle", **size}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "drawn"}},
    }


def execute(nodes, prompt):
    """Each node's outputs, by its id; inputs are checked against INPUT_TYPES as ComfyUI does."""
    outputs = {}
    for node_id, node in prompt.items():
        kind = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        required, given = kind.INPUT_TYPES()["required"], {}
        assert set(node["inputs"]) == set(required)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = nodes.NODE_CLASS_MAPPINGS[prompt[value[0]]["class_type"]]
                assert source.RETURN_TYPES[value[1]] == required[name][0]
                value = outputs[value[0]][value[1]]
            elif len(required[name]) > 1:
                assert required[name][1].get("min", value) <= value <= required[name][1].get("max", value)
            given[name] = value
        outputs[node_id] = getattr(kind(), kind.FUNCTION)(**given)
    return outputs


def test_a_prompt_graph_draws_with_the_cache_and_the_ports_own_node_saves(port, tmp_path):
    checkpoint = make_narrow(tmp_path / "narrow")
    outputs = execute(port, prompt_graph(checkpoint, residual_diff_threshold=0.9, max_consecutive_cache_hits=2))
    model, pipe = outputs["2"][0], outputs["1"][0].pipe
    assert outputs["1"][0].config is None and model.pipe is pipe
    assert pipe.cache_stats.computed_steps == [0, 3, 6, 9]
    images = outputs["3"][0].asnumpy()
    assert images.shape == (2, 64, 64, 3) and 0 <= images.min() < images.max() <= 1
    for number, image in enumerate(images, 1):
        saved = np.asarray(Image.open(tmp_path / f"drawn_{number:05}_.png"))
        np.testing.assert_allclose(saved / 255, image, atol=1 / 255)
    windowed = execute(port, prompt_graph(checkpoint, residual_diff_threshold=0.9, start=0.3, end=0.5))
    assert windowed["1"][0].pipe.cache_stats.cached_steps == [3, 4, 5]


def test_the_port_knows_our_nodes_by_the_names_that_users_know(port):
    assert port.NODE_DISPLAY_NAME_MAPPINGS["ApplyFBCacheOnModel"] == "Apply First Block Cache"
    inputs = port.NODE_CLASS_MAPPINGS["ApplyFBCacheOnModel"].INPUT_TYPES()["required"]
    defaults = {name: rest[0]["default"] for name, (_, *rest) in inputs.items() if rest}
    assert list(inputs)[0] == "model"
    assert defaults == {
        "object_to_patch": "diffusion_model",
        "residual_diff_threshold": 0.0,
        "start": 0.0,
        "end": 1.0,
        "max_consecutive_cache_hits": -1,
    }


@pytest.mark.parametrize("inputs", [(0.0, -1), (0.1, 0)])
def test_what_puts_the_cache_off_gives_the_model_itself(inputs):
    model = FluxModel(pipe=None)
    assert ApplyFBCacheOnModel().patch(model, "diffusion_model", *inputs) == (model,)


def test_another_model_and_another_object_are_refused_by_name(pipe):
    other = SimpleNamespace(clone=lambda: other, get_model_object=lambda name: object())
    with pytest.raises(ValueError, match="Unsupported model object; the cache is for mindone's FluxTransformer2DModel"):
        ApplyFBCacheOnModel().patch(other, "diffusion_model", 0.1)
    with pytest.raises(ValueError, match="object_to_patch must be diffusion_model, not 'unet'"):
        ApplyFBCacheOnModel().patch(FluxModel(pipe), "unet", 0.1)
    with pytest.raises(ValueError, match="start=0.8 is behind end=0.5"):
        ApplyFBCacheOnModel().patch(FluxModel(pipe), "diffusion_model", 0.1, start=0.8, end=0.5)
