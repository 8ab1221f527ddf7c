import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from FBCache_ms import FluxPipeline
from FBCache_ms.checkpoint import TINY_FLUX, check_checkpoint, image_unit

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINY_FLUX, tmp_path / "copy")


def test_the_embedded_checkpoint_is_whole_and_small():
    tensors = check_checkpoint(TINY_FLUX)
    assert set(tensors) == set(WEIGHTS)
    assert sum(file.stat().st_size for file in TINY_FLUX.rglob("*")) < 24e6


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_missing_file_is_named(copy, file):
    path = copy / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(OSError, match=file.split("/")[0]):
        FluxPipeline.from_pretrained(str(copy))


def test_a_missing_folder_is_named():
    with pytest.raises(OSError, match="no/such/place"):
        FluxPipeline.from_pretrained("no/such/place")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path):
    path.write_bytes(b"\xff" * 1000)


def empty(path):
    path.write_bytes(b"")


def headless(path):
    header = b'{"a": {"dtype": "F32"}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("damage", [cut, scramble, empty, headless])
def test_damaged_weights_are_named(copy, damage):
    damage(copy / "vae" / WEIGHTS["vae"])
    with pytest.raises(OSError, match="vae.*damaged"):
        FluxPipeline.from_pretrained(str(copy))


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "tokenizer_2/tokenizer.json"])
@pytest.mark.parametrize("content, named", [("{", "not JSON"), ("[]", "damaged")])
def test_a_damaged_config_is_named(copy, file, content, named):
    (copy / file).write_text(content)
    with pytest.raises(OSError, match=f"{file}.*{named}"):
        FluxPipeline.from_pretrained(str(copy))


@pytest.mark.parametrize("entry", [None, [], ["diffusers", "NoSuchClass"]])
def test_a_component_that_the_index_does_not_name_rightly_is_named(copy, entry):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": entry}))
    with pytest.raises((OSError, ValueError), match="vae|NoSuchClass"):
        FluxPipeline.from_pretrained(str(copy))


def test_a_component_that_is_handed_over_is_not_compared_with_the_folder(pipe):
    other = FluxPipeline.from_pretrained(str(TINY_FLUX), text_encoder_2=None, tokenizer_2=None, vae=pipe.vae)
    assert other.text_encoder_2 is None and other.vae is pipe.vae


def test_without_an_autoencoder_there_are_latents(pipe):
    parts = {name: part for name, part in pipe.components.items() if name != "vae"}
    other = FluxPipeline.from_pretrained(str(TINY_FLUX), vae=None, **{**parts, "image_encoder": None})
    other.set_progress_bar_config(disable=True)
    drawn = other("a red circle", height=64, width=64, num_inference_steps=1, output_type="latent")[0]
    assert drawn.shape[0] == 1 and np.isfinite(drawn.asnumpy()).all()


def test_an_autoencoder_that_does_not_say_its_factor_is_named(copy):
    (copy / "vae" / "config.json").write_text("{}")
    with pytest.raises(OSError, match="block_out_channels"):
        image_unit(copy)


def test_a_missing_shard_is_named(copy):
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (copy / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="part-1.safetensors"):
        check_checkpoint(copy)


def without_first(tensors):
    tensors.pop(min(tensors))


def with_another(tensors):
    tensors["another.weight"] = np.zeros(3, np.float32)


def with_a_wrong_shape(tensors):
    name = min(name for name in tensors if tensors[name].ndim == 1)
    tensors[name] = np.zeros(3, np.float32)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("change", [without_first, with_another, with_a_wrong_shape])
def test_weights_that_do_not_fit_their_config_are_refused(copy, component, change):
    path = copy / component / WEIGHTS[component]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint"):
        FluxPipeline.from_pretrained(str(copy))
