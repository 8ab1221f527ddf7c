"""bfloat16 on a CPU: the matrices of a transformer's blocks alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from make_models import FLUX2_LAYERS, make
from narrow import adapter, draw, load, make_narrow

import mindspore as ms
from mindspore import mint

from FBCache_ms import CacheConfig, Flux2Pipeline, FluxPipeline, QuantizeConfig, QwenImagePipeline, quantize
from FBCache_ms.eval.shared.metrics import psnr
from FBCache_ms.runtime.bfloat16 import round_matrices
from FBCache_ms.runtime.checkpoint import TINY_FLUX
from FBCache_ms.runtime.cpu import kernels, stand_ins
from FBCache_ms.runtime.device import graph_mode
from FBCache_ms.runtime.quantize import linear_layers, model_layer

GOLDEN = Path(__file__).parents[1] / "golden" / "linear_bfloat16.npz"
LINEAR = {
    "MindSpore's": stand_ins.linear_cell,
    "kernels.cc": stand_ins.fused_linear_cell,
}
FAMILIES = {"qwenimage": QwenImagePipeline, "flux2": Flux2Pipeline}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_narrow(tmp_path_factory.mktemp("checkpoint") / "narrow", 1, 2)


def matrices(pipe):
    return [model_layer(pipe.transformer, name).weight for name in linear_layers(pipe.transformer, QuantizeConfig())]


def from_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("construct", LINEAR)
@pytest.mark.parametrize("number", range(len(json.loads(str(np.load(GOLDEN)["about"]))["cases"])))
def test_a_layer_is_torchs_until_its_output_is_rounded(number, construct, monkeypatch):
    golden = np.load(GOLDEN)
    rows, weight, bias, output = (
        from_bits(golden[f"{name}_{number}"]) for name in ("rows", "weight", "bias", "output")
    )
    layer = mint.nn.Linear(*weight.shape[::-1])
    layer.weight.set_data(ms.Tensor(weight))
    layer.weight.set_dtype(ms.bfloat16)
    layer.bias.set_data(ms.Tensor(bias))
    monkeypatch.setattr(mint.nn.Linear, "construct", LINEAR[construct])
    # What the layer rounds off of its input is no bfloat16.
    with graph_mode(True):
        found = layer(ms.Tensor(rows * np.float32(1 + 2**-12))).asnumpy()
    np.testing.assert_allclose(found, rows @ weight.T + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, output, rtol=2**-8, atol=2**-9)


@pytest.mark.skipif(kernels.LINEAR is None, reason="no g++")
def test_what_is_no_number_stays_none_and_the_rest_is_rounded_to_even():
    values = np.array([[np.nan, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3e38]], np.float32)
    eye = ms.Tensor(np.eye(6), ms.float32)
    for column in range(6):
        row = ms.Tensor(np.where(np.arange(6) == column, values, 0)[:, : column + 1].astype(np.float32))
        kept = kernels.LINEAR_BFLOAT16(
            row, eye[:, : column + 1].astype(ms.bfloat16), ms.Tensor(np.zeros(6), ms.float32)
        )
        expected = ms.Tensor(values[0, column]).astype(ms.bfloat16).float().asnumpy()
        np.testing.assert_array_equal(kept.asnumpy()[0, column], expected)


def test_only_the_blocks_matrices_are_bfloat16_and_a_picture_is_what_it_was():
    config, steps = CacheConfig(0.12), {"num_inference_steps": 28}
    plain = load(TINY_FLUX, cache_config=config)
    before, reused = draw(plain, **steps), plain.cache_stats.reused
    pipe = load(TINY_FLUX, cache_config=config, mindspore_dtype=ms.bfloat16)
    assert {each.dtype for each in matrices(pipe)} == {ms.bfloat16}
    others = {id(each) for each in pipe.transformer.get_parameters()} - {id(each) for each in matrices(pipe)}
    assert {each.dtype for each in pipe.transformer.get_parameters() if id(each) in others} == {ms.float32}
    after = draw(pipe, **steps)
    assert pipe.cache_stats.reused == reused and any(reused)
    assert 60 < psnr(before, after) < 90


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_too(name, tmp_path):
    folder = make(tmp_path / name, name)
    settings = {"num_inference_steps": 4, "output_type": "np", "height": 64, "width": 64}
    if name == "flux2":
        settings["text_encoder_out_layers"] = FLUX2_LAYERS
    pictures = []
    for dtype in (ms.float32, ms.bfloat16):
        pipe = FAMILIES[name].from_pretrained(folder, mindspore_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(prompt="a cat", generator=np.random.default_rng(0), **settings)[0][0])
    assert {each.dtype for each in matrices(pipe)} == {ms.bfloat16}
    assert 40 < psnr(*pictures) < 120


def test_a_pipeline_changes_its_dtype_and_back(checkpoint):
    pipe = load(checkpoint)
    before = draw(pipe)
    rounded = draw(pipe.to(ms.bfloat16))
    assert {each.dtype for each in matrices(pipe)} == {ms.bfloat16}
    np.testing.assert_array_equal(rounded, draw(load(checkpoint, mindspore_dtype=ms.bfloat16)))
    assert not np.array_equal(before, rounded)
    assert {each.dtype for each in pipe.to(ms.float32).transformer.get_parameters()} == {ms.float32}
    # The weights stay what they were rounded to; what goes into the layers does not.
    assert psnr(draw(pipe), rounded) > 40
    other = FluxPipeline.from_pipe(pipe, mindspore_dtype=ms.bfloat16)
    assert {each.dtype for each in matrices(other)} == {ms.bfloat16}


def test_a_transformer_that_is_handed_over_stays_as_it_is(checkpoint):
    transformer = load(checkpoint).transformer
    pipe = load(checkpoint, transformer=transformer, mindspore_dtype=ms.bfloat16)
    assert {each.dtype for each in matrices(pipe)} == {ms.float32}
    pipe = load(checkpoint, mindspore_dtype={"transformer": ms.bfloat16, "default": ms.float32})
    assert {each.dtype for each in matrices(pipe)} == {ms.bfloat16}


def test_it_is_saved_and_loaded(checkpoint, tmp_path):
    pipe = load(checkpoint, mindspore_dtype=ms.bfloat16)
    pipe.save_pretrained(tmp_path)
    np.testing.assert_array_equal(draw(load(tmp_path, mindspore_dtype=ms.bfloat16)), draw(pipe))


def test_an_adapter_acts(checkpoint):
    pipes = [load(checkpoint), load(checkpoint, mindspore_dtype=ms.bfloat16)]
    plain = draw(pipes[0])
    for pipe in pipes:
        pipe.load_lora_weights(adapter(), adapter_name="mine")
    adapted = [draw(pipe) for pipe in pipes]
    assert psnr(*adapted) > psnr(adapted[0], plain) + 15


def test_bfloat16_and_int8_are_not_both_had_on_a_cpu(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="int8 weights need float32 ones on CPU, not bfloat16"):
        load(checkpoint, quantize_config=QuantizeConfig(), mindspore_dtype=ms.bfloat16)
    pipe = load(checkpoint, mindspore_dtype=ms.bfloat16)
    with pytest.raises(ValueError, match="int8 weights need float32 ones on CPU, not bfloat16"):
        quantize(pipe)
    load(checkpoint, quantize_config=QuantizeConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="int8 weights need float32 ones on CPU, not bfloat16"):
        load(tmp_path, mindspore_dtype=ms.bfloat16)


def test_a_transformer_that_is_bfloat16_throughout_is_refused(checkpoint):
    pipe = load(checkpoint)
    pipe.transformer.to(ms.bfloat16)
    with pytest.raises(ValueError, match="throughout, which is not supported on CPU"):
        draw(pipe)


def test_rounding_twice_is_rounding_once(checkpoint):
    pipe = load(checkpoint, mindspore_dtype=ms.bfloat16)
    before = [each.float().asnumpy() for each in matrices(pipe)]
    round_matrices(pipe.transformer)
    for one, two in zip(before, matrices(pipe)):
        np.testing.assert_array_equal(one, two.float().asnumpy())
