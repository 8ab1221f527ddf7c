import json
import shutil
from pathlib import Path

import huggingface_hub
import mindone.diffusers
import numpy as np
import pytest
from narrow import make_narrow
from safetensors.numpy import load_file, save_file

import mindspore as ms

from FBCache_ms import TINY_FLUX, CacheConfig, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.runtime.checkpoint import check_checkpoint, fingerprint, image_unit

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


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "no/such/place",
        "no_such_place",
        "a big red circle",
        "FBCache_ms/tiny_flux",
        "./black-forest-labs/FLUX.1-dev",
        "here/FLUX.1-dev",
        "here/model_index.json",
        Path("black-forest-labs/FLUX.1-dev"),
    ],
)
def test_a_missing_folder_is_named_and_sought_on_no_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(OSError) as error:
        FluxPipeline.from_pretrained(name)
    assert one_line(error) == f"checkpoint {Path(name)}: there is no such folder"


def test_a_file_is_no_folder(copy):
    with pytest.raises(OSError, match="model_index.json is a file, not a folder"):
        FluxPipeline.from_pretrained(copy / "model_index.json")


def test_a_name_on_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError) as error:
        FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-none", cache_dir=tmp_path)
    said = "checkpoint black-forest-labs/FLUX.1-none cannot be loaded: there is no such folder, and from a hub: "
    assert one_line(error).startswith(said) and "offline mode is enabled" in one_line(error)


def test_a_path_may_begin_with_the_home_folder_and_end_with_a_slash(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert FluxPipeline.from_pretrained("~/copy/", text_encoder_2=None, tokenizer_2=None).vae is not None


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


@pytest.mark.parametrize("index", ["as it was", None, [None, None]])
def test_a_component_that_is_handed_over_or_none_needs_no_files(copy, pipe, index):
    parts = {"transformer": pipe.transformer, "scheduler": pipe.scheduler, "text_encoder_2": None, "tokenizer_2": None}
    content = json.loads((copy / "model_index.json").read_text())
    for part in parts:
        shutil.rmtree(copy / part)
        content[part] = content[part] if index == "as it was" else index
    (copy / "model_index.json").write_text(json.dumps({name: value for name, value in content.items() if value}))
    other = FluxPipeline.from_pretrained(copy, **parts)
    assert all(getattr(other, name) is part for name, part in parts.items())


def test_hidden_files_beside_the_others_are_no_part_of_a_checkpoint(copy):
    tensors, before = check_checkpoint(copy), fingerprint(copy)
    for name in (
        "._model_index.json",
        ".DS_Store",
        ".cache/huggingface/vae/config.json",
        "transformer/._diffusion_pytorch_model.safetensors",
        "vae/.diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/._model.fp16.safetensors",
        ".git/config.txt",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"\0\5\x16\7")
    assert check_checkpoint(copy) == tensors and fingerprint(copy) == before


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A pipeline that is quick to load and to draw with."""
    return quiet_pipe(make_narrow(tmp_path_factory.mktemp("narrow") / "narrow"))


def quiet_pipe(*args, **kwargs):
    pipe = FluxPipeline.from_pretrained(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parameters(pipe):
    """Every Parameter's values, by component and name."""
    return {
        f"{part}.{name}": parameter.asnumpy()
        for part in WEIGHTS
        if getattr(pipe, part) is not None
        for name, parameter in getattr(pipe, part).parameters_and_names()
    }


def assert_same_weights(pipe, other):
    mine, theirs = parameters(pipe), parameters(other)
    assert set(mine) == set(theirs)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    "saved, loaded",
    [
        ({}, {}),
        ({"max_shard_size": "100KB"}, {}),
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"variant": "fp16", "max_shard_size": "100KB"}, {"variant": "fp16"}),
    ],
    ids=str,
)
def test_what_was_saved_is_loaded_again(narrow, saved, loaded, tmp_path):
    folder = tmp_path / "a folder of Jürgen's"
    narrow.save_pretrained(folder, **saved)
    assert_same_weights(narrow, quiet_pipe(folder, **loaded))


def test_a_saved_pipeline_draws_the_same_picture(narrow, tmp_path):
    def draw(pipe):
        rng = np.random.default_rng(0)
        return pipe("a red circle", num_inference_steps=2, generator=rng, output_type="np", cache_config=None)[0]

    narrow.save_pretrained(tmp_path)
    np.testing.assert_array_equal(draw(quiet_pipe(tmp_path)), draw(narrow))


def test_a_variant_is_told_from_the_weights_beside_it(narrow, tmp_path):
    narrow.save_pretrained(tmp_path)
    narrow.transformer.save_pretrained(tmp_path / "transformer", variant="fp16", max_shard_size="100KB")
    for file in (tmp_path / "transformer").glob("*.fp16-*.safetensors"):
        save_file({name: value * 0.5 for name, value in load_file(file).items()}, file, metadata={"format": "np"})
    half = dict(quiet_pipe(tmp_path, variant="fp16").transformer.parameters_and_names())
    for name, parameter in quiet_pipe(tmp_path).transformer.parameters_and_names():
        np.testing.assert_array_equal(half[name].asnumpy(), parameter.asnumpy() * 0.5, err_msg=name)


def test_a_variant_that_is_not_there_is_named(narrow, tmp_path):
    narrow.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match="has no weights of variant fp; its variants: fp16$"):
        FluxPipeline.from_pretrained(tmp_path, variant="fp")
    with pytest.raises(OSError, match="no weights file .* but for variant fp16$"):
        FluxPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="its variants: none$"):
        FluxPipeline.from_pretrained(TINY_FLUX, variant="fp16")


@pytest.mark.parametrize("first, then", [({}, {"max_shard_size": "100KB"}), ({"max_shard_size": "100KB"}, {})])
def test_weights_that_are_there_twice_are_refused(narrow, first, then, tmp_path):
    # mindone would take the older ones of a text encoder, or none.
    narrow.save_pretrained(tmp_path, **first)
    narrow.save_pretrained(tmp_path, **then)
    with pytest.raises(OSError, match="has its weights twice, by .*safetensors and by .*index.json"):
        FluxPipeline.from_pretrained(tmp_path)


def test_a_pipeline_saved_without_a_component_is_loaded_without_it(narrow, tmp_path):
    part = FluxPipeline.from_pipe(narrow, text_encoder_2=None, tokenizer_2=None)
    part.save_pretrained(tmp_path)
    other = FluxPipeline.from_pretrained(tmp_path)
    assert other.text_encoder_2 is None and other.tokenizer_2 is None
    assert_same_weights(part, other)


def test_a_pipeline_with_the_cache_applied_is_saved_as_mindones_own(narrow, tmp_path):
    theirs = apply_cache_on_pipe(mindone.diffusers.FluxPipeline.from_pipe(narrow, mindspore_dtype=None))
    theirs.save_pretrained(tmp_path)
    assert_same_weights(narrow, FluxPipeline.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [ms.float32, {"default": ms.float32}])
def test_a_dtype_may_be_given_by_component(narrow, tmp_path, dtype):
    narrow.save_pretrained(tmp_path)
    assert FluxPipeline.from_pretrained(tmp_path, mindspore_dtype=dtype).dtype == ms.float32


@pytest.mark.parametrize("make", [FluxPipeline.from_pretrained, FluxPipeline.from_pipe])
@pytest.mark.parametrize("dtype", ["float32", np.float32, {"transformer": "float32"}])
def test_what_is_no_dtype_is_refused(narrow, make, dtype):
    given = narrow if make == FluxPipeline.from_pipe else TINY_FLUX
    with pytest.raises(TypeError, match="mindspore_dtype must be a dtype"):
        make(given, mindspore_dtype=dtype)


KINDS = ["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"]


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_share_components_there_and_back(narrow, kind):
    there = getattr(mindone.diffusers, kind).from_pipe(narrow)
    assert there.components == {name: narrow.components.get(name) for name in there.components}
    back = FluxPipeline.from_pipe(there)
    assert type(back) is FluxPipeline and back.components == narrow.components
    assert (back.cache_config, back.use_graph_mode) == (CacheConfig(), True)


def test_a_pipeline_from_ours_has_its_settings_unless_they_are_given(narrow):
    first = FluxPipeline.from_pipe(narrow, cache_config=CacheConfig(0.3), use_graph_mode=False)
    second = FluxPipeline.from_pipe(first)
    assert (second.cache_config, second.use_graph_mode) == (CacheConfig(0.3), False)
    third = FluxPipeline.from_pipe(first, cache_config=None, use_graph_mode=True)
    assert (third.cache_config, third.use_graph_mode) == (None, True)
    assert narrow.cache_config == CacheConfig()
    with pytest.raises(TypeError, match="cache_config"):
        FluxPipeline.from_pipe(narrow, cache_config=0.3)


def test_a_pipeline_from_one_with_the_cache_applied_has_its_own_components_and_that_cache(narrow):
    theirs = apply_cache_on_pipe(mindone.diffusers.FluxKontextPipeline.from_pipe(narrow), CacheConfig(0.3))
    ours = FluxPipeline.from_pipe(theirs)
    assert ours.components == narrow.components and ours.cache_config == CacheConfig(0.3)


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
