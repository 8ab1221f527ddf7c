import gc
import json
import subprocess
import sys
import weakref
from collections import Counter

import further
import mindone.diffusers
import numpy as np
import pytest
import quantized
from make_models import FLUX2_LAYERS, make
from narrow import PROMPT, adapter, draw, load, make_narrow
from quantized import make_wide
from safetensors import safe_open

import mindspore as ms
from mindspore import mint, nn

from FBCache_ms import (
    CacheConfig,
    Flux2Pipeline,
    FluxPipeline,
    QuantizeConfig,
    QwenImagePipeline,
    apply_cache_on_pipe,
    dequantize,
    quantize,
)
from FBCache_ms.eval.shared.metrics import psnr
from FBCache_ms.models import transformer_flux_withFBCache as flux
from FBCache_ms.models.quantized import Int8Linear, Int8WeightOnlyLinear
from FBCache_ms.runtime.cpu import kernels
from FBCache_ms.runtime.device import graph_mode
from FBCache_ms.runtime.quantize import check_quantize, quantized_as, quantized_layers

KINDS = {"int8_weight_only": Int8WeightOnlyLinear, "int8": Int8Linear}
PIPELINES = {"qwenimage": QwenImagePipeline, "flux2": Flux2Pipeline}
DOUBLES, SINGLES = 1, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_narrow(tmp_path_factory.mktemp("checkpoint") / "narrow", DOUBLES, SINGLES)


def layer_of(kind, inputs, outputs, seed=0, dtype=ms.float32):
    """A quantised layer, and the dense weight and bias that it was made from."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((outputs, inputs)).astype(np.float32), rng.standard_normal(outputs)
    layer = KINDS[kind](inputs, outputs, dtype, ms.Parameter(ms.Tensor(bias, dtype), "layer.bias"))
    layer.take(weight)
    return layer, weight, bias


def of_kinds(model):
    return Counter(type(layer).__name__ for layer in quantized_layers(model).values())


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_weights_are_rounded_to_half_a_level_of_their_channel(dtype):
    layer, weight, _ = layer_of("int8_weight_only", 40, 30, dtype=dtype)
    level = np.abs(weight).max(1, keepdims=True) / 127
    assert layer.weight.dtype == ms.int8 and layer.weight_scale.dtype == dtype
    # What bfloat16 makes of a scale may cut the greatest numbers off.
    limit = 0.501 if dtype == ms.float32 else 0.501 + 127 / 256
    assert (np.abs(layer.dense_weight() - weight) <= limit * level).all()


def test_a_channel_of_zeros_stays_zero():
    layer, weight, bias = layer_of("int8_weight_only", 8, 2)
    weight[0] = 0
    layer.take(weight)
    assert (layer.dense_weight()[0] == 0).all()
    with graph_mode(True):
        assert np.isfinite(layer(ms.Tensor(np.zeros((1, 8)), ms.float32)).asnumpy()).all()


def test_a_weight_only_layer_is_the_dense_one_of_its_rounded_weights():
    layer, _, bias = layer_of("int8_weight_only", 40, 30)
    rows = np.random.default_rng(1).standard_normal((2, 3, 40)).astype(np.float32)
    with graph_mode(True):
        found = layer(ms.Tensor(rows)).asnumpy()
    np.testing.assert_allclose(found, rows @ layer.dense_weight().T + bias, rtol=1e-5, atol=1e-5)


def test_a_layer_with_rounded_inputs_sums_integers_exactly():
    # Wider than float32 sums products of two numbers up to 127 exactly.
    layer, _, _ = layer_of("int8", 3072, 5)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4, 3072)).astype(np.float32) * np.array([[1], [100], [0], [1e-3]], np.float32)
    with graph_mode(True):
        found = layer.product(ms.Tensor(rows)).asnumpy()
    token_scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    token_scale[2] = 1
    quantised = np.rint(rows / token_scale).astype(np.int64)
    exact = quantised @ layer.weight.asnumpy().astype(np.int64).T
    scaled = exact.astype(np.float32) * token_scale * layer.weight_scale.asnumpy()
    np.testing.assert_array_equal(found, scaled)


class Blocks(nn.Cell):
    """The first double and the first single block of a transformer."""

    def __init__(self, transformer):
        super().__init__(auto_prefix=False)
        self.double, self.single = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]

    def construct(self, image, text, temb, cosine, sine):
        text, image = self.double(image, text, temb, (cosine, sine))
        return mint.cat(self.single(image, text, temb, (cosine, sine)), 1)


@pytest.mark.skipif(kernels.LINEAR is None, reason="no g++")
@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_a_block_of_rounded_matrices_is_one_kernel_on_a_cpu(checkpoint, kind, monkeypatch):
    how = {"mindspore_dtype": ms.bfloat16} if kind == "bfloat16" else {"quantize_config": QuantizeConfig(kind)}
    transformer = load(checkpoint, **how).transformer
    width, heads = transformer.inner_dim, transformer.config.num_attention_heads
    rng, angles = (
        np.random.default_rng(0),
        np.random.default_rng(1).uniform(0, 6, (9, width // heads // 2)).repeat(2, 1),
    )
    streams = [rng.standard_normal(shape) for shape in ((2, 6, width), (2, 3, width), (2, width))]
    inputs = [ms.Tensor(value, ms.float32) for value in (*streams, np.cos(angles), np.sin(angles))]
    blocks = Blocks(transformer)
    assert None not in (blocks.double.kernel_weights, blocks.single.kernel_weights)
    with graph_mode(True):
        by_kernel = blocks(*inputs).asnumpy()
        for block in (blocks.double, blocks.single):
            monkeypatch.setattr(vars(type(block))["kernel_weights"], "rounded", False)
            assert block.kernel_weights is None
        by_operators = Blocks(transformer)(*inputs).asnumpy()
    # An input that lies between two levels, or two bfloat16, may be rounded to the other one.
    limit = 1e-5 if kind == "int8_weight_only" else 0.02
    np.testing.assert_allclose(by_kernel, by_operators, rtol=0, atol=limit * np.abs(by_operators).max())
    assert np.abs(by_kernel - by_operators).mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layers_of_the_blocks_are_quantised(checkpoint, kind):
    pipe = load(checkpoint, quantize_config=QuantizeConfig(kind))
    layers = quantized_layers(pipe.transformer)
    dense = {
        name
        for name, cell in pipe.transformer.cells_and_names()
        if isinstance(cell, mint.nn.Linear) and name not in layers
    }
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in layers)
    assert not any("transformer_blocks." in name for name in dense)
    modulation = {name for name in layers if name.endswith(flux.MODULATION)}
    assert len(modulation) == 2 * DOUBLES + SINGLES
    for name, layer in layers.items():
        assert type(layer) is (Int8WeightOnlyLinear if name in modulation else KINDS[kind])
    assert quantized_as(pipe) == {"transformer": kind}


def test_layers_are_left_out_or_taken_in(checkpoint):
    pipe = load(checkpoint)
    quantize(pipe, QuantizeConfig("int8", exclude_layers=["norm*.linear", "single_transformer_blocks.1."]))
    names = quantized_layers(pipe.transformer)
    assert names and not any("norm" in name or "single_transformer_blocks.1." in name for name in names)
    dequantize(pipe)
    quantize(pipe, QuantizeConfig("int8", weight_only_layers=(), layers="all"))
    assert of_kinds(pipe.transformer) == {"Int8Linear": len(quantized_layers(pipe.transformer))}
    assert "x_embedder" in quantized_layers(pipe.transformer)


@pytest.mark.parametrize("kind", further.after(1, KINDS))
def test_rounding_while_loading_is_rounding_behind_it(checkpoint, kind):
    config = QuantizeConfig(kind)
    ours, other = load(checkpoint, quantize_config=config), quantize(load(checkpoint), config)
    for (name, one), (_, two) in zip(ours.transformer.parameters_and_names(), other.transformer.parameters_and_names()):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy(), name)
    np.testing.assert_array_equal(draw(ours), draw(other))


def test_a_quantised_pipeline_is_saved_and_loaded_as_int8(checkpoint, tmp_path):
    components = ("transformer", "text_encoder", "text_encoder_2")
    pipe = load(checkpoint, quantize_config=QuantizeConfig(components_to_quantize=components))
    pipe.save_pretrained(tmp_path / "saved")
    with safe_open(next((tmp_path / "saved" / "transformer").glob("*.safetensors")), "np") as weights:
        kinds = Counter(str(weights.get_slice(name).get_dtype()) for name in weights.keys())
    assert kinds["I8"] == len(quantized_layers(pipe.transformer))
    again = load(tmp_path / "saved")
    assert quantized_as(again) == dict.fromkeys(components, "int8_weight_only")
    np.testing.assert_array_equal(draw(again), draw(pipe))
    dequantize(again)
    assert "quantization_config" not in again.transformer.config
    again.save_pretrained(tmp_path / "dense")
    assert quantized_as(load(tmp_path / "dense")) == {}


def test_a_picture_is_what_it_was(pipe):
    """On the embedded checkpoint: the same steps reused, and nothing that anyone sees."""
    config, steps = CacheConfig(0.12), {"num_inference_steps": 28}
    before = draw(pipe, cache_config=config, **steps)
    reused = pipe.cache_stats.reused
    quantize(pipe)
    try:
        after = draw(pipe, cache_config=config, **steps)
        assert pipe.cache_stats.reused == reused and any(reused)
    finally:
        dequantize(pipe)
    assert 55 < psnr(before, after) < 90


@pytest.mark.release
def test_the_modulation_is_not_to_be_quantised(pipe):
    """What the cache compares is scaled by it: with rounded inputs the difference of two steps is another."""
    diffs = {}
    for name, layers in {"float32": None, "weight only": None, "rounded": ()}.items():
        if name != "float32":
            quantize(pipe, QuantizeConfig("int8", weight_only_layers=layers))
        draw(pipe, cache_config=CacheConfig(0.12), num_inference_steps=28)
        diffs[name] = np.array([value for value in pipe.cache_stats.residual_diffs[1:4]], float)
        dequantize(pipe)
    error = {name: np.abs(diffs[name] / diffs["float32"] - 1).max() for name in ("weight only", "rounded")}
    assert error["rounded"] > 4 * error["weight only"]


def test_int8_weights_stay_so_in_another_dtype(checkpoint):
    pipe = load(checkpoint, quantize_config=QuantizeConfig())
    pipe.transformer.to(ms.bfloat16)
    kinds = {str(parameter.dtype) for parameter in pipe.transformer.get_parameters()}
    assert kinds == {"Int8", "BFloat16"}


@pytest.mark.release
def test_dense_weights_come_back_within_the_rounding(checkpoint):
    pipe, original = load(checkpoint), load(checkpoint)
    before = draw(pipe)
    quantize(pipe)
    rounded = draw(pipe)
    dequantize(pipe)
    assert not quantized_layers(pipe.transformer)
    np.testing.assert_allclose(draw(pipe), rounded, atol=1e-4)
    assert not np.array_equal(before, rounded)
    pairs = zip(original.transformer.parameters_and_names(), pipe.transformer.parameters_and_names())
    for (name, one), (other_name, other) in pairs:
        assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)
        level = np.abs(one.asnumpy()).max(-1, keepdims=True) / 127
        assert (np.abs(one.asnumpy() - other.asnumpy()) <= 0.501 * level).all()


@pytest.mark.release
def test_an_adapter_acts_on_quantised_layers_before_and_behind(checkpoint):
    dense = load(checkpoint)
    plain = draw(dense)
    dense.load_lora_weights(adapter(), adapter_name="mine")
    adapted = draw(dense)
    quantize(dense)
    assert not any("lora_" in name for name in quantized_layers(dense.transformer))
    first = draw(dense)
    later = load(checkpoint, quantize_config=QuantizeConfig())
    later.load_lora_weights(adapter(), adapter_name="mine")
    second = draw(later)
    np.testing.assert_array_equal(first, second)
    assert psnr(adapted, first) > psnr(adapted, plain) + 15
    later.unload_lora_weights()
    assert psnr(plain, draw(later)) > 45


def test_an_adapter_is_not_fused_into_int8_weights(checkpoint):
    pipe = load(checkpoint, quantize_config=QuantizeConfig())
    pipe.load_lora_weights(adapter(), adapter_name="mine")
    before = draw(pipe)
    with pytest.raises(ValueError, match="cannot be fused into .*int8"):
        pipe.fuse_lora()
    np.testing.assert_array_equal(draw(pipe), before)


@pytest.mark.release
def test_a_kept_graph_of_dense_weights_is_not_run_with_int8_ones(checkpoint):
    pipe = load(checkpoint)
    dense = draw(pipe)
    compiled = pipe.graph_compilations
    quantize(pipe, QuantizeConfig("int8"))
    assert not np.array_equal(draw(pipe), dense) and pipe.graph_compilations == compiled + 1


@pytest.mark.slow
def test_the_cache_is_put_on_mindones_pipeline_with_int8_weights(checkpoint):
    config, cfg = CacheConfig(0.3), {"negative_prompt": "a small green square", "true_cfg_scale": 2.0}
    ours = load(checkpoint, quantize_config=QuantizeConfig())
    theirs = mindone.diffusers.FluxPipeline(**ours.components)
    theirs.set_progress_bar_config(disable=True)
    before = draw(ours, cache_config=config, max_sequence_length=32, **cfg)
    reused = ours.cache_stats.reused
    apply_cache_on_pipe(theirs, config)
    with graph_mode(True):
        after = draw(theirs, max_sequence_length=32, height=64, width=64, **cfg)
    assert theirs.transformer.cache_stats.reused == reused and any(reused)
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.release
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwenimage", "flux2"])
def test_another_family_draws_what_its_rounded_weights_draw(family, kind, tmp_path):
    pipe = PIPELINES[family].from_pretrained(make(tmp_path / family, family), quantize_config=QuantizeConfig(kind))
    pipe.set_progress_bar_config(disable=True)
    layers = FLUX2_LAYERS if family == "flux2" else None
    more = {"text_encoder_out_layers": layers} if layers else {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    settings = {"height": 64, "width": 64, "num_inference_steps": 6, "cache_config": CacheConfig(0.3), **more}

    def latents():
        noise = np.random.default_rng(0)
        return pipe(prompt="a big red circle", **settings, generator=noise, output_type="latent")[0].asnumpy()

    quantised = latents()
    assert quantized_as(pipe) == {"transformer": kind} and pipe.why_not_cached() is None
    dequantize(pipe)
    dense = latents()
    # With rounded inputs the layers are others; how far apart they lie is the model's.
    assert np.abs(quantised - dense).max() < (1e-3 if kind == "int8_weight_only" else 0.3) * np.abs(dense).max()


@pytest.mark.slow
def test_loading_as_int8_takes_no_dense_model(tmp_path):
    make_wide(tmp_path / "wide")
    peaks = {}
    for kind in ("int8_weight_only", "bfloat16, by mindone"):
        command = [sys.executable, quantized.__file__, "--save_path", tmp_path, "--load", tmp_path / "wide", kind]
        found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
        size, peak = json.loads(found.splitlines()[-1])
        peaks[kind] = size, peak
    # mindone's own loading holds the weights in float32 for a while.
    size, peak = peaks["int8_weight_only"]
    dense_size, dense_peak = peaks["bfloat16, by mindone"]
    assert size < 0.55 * dense_size and peak < dense_size and peak < 0.6 * dense_peak


def test_a_large_picture_is_decoded_in_tiles(pipe):
    settings = {"height": 128, "width": 128, "num_inference_steps": 4}
    whole = draw(pipe, **settings)
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    try:
        tiled = draw(pipe, **settings)
    finally:
        pipe.disable_vae_tiling()
        pipe.disable_vae_slicing()
    assert psnr(whole, tiled) > 25 and not np.array_equal(whole, tiled)


def test_text_encoders_are_let_go_once_the_prompt_is_embedded(checkpoint):
    pipe = load(checkpoint)
    embeds, encoders = pipe.embeddings(PROMPT), [weakref.ref(pipe.text_encoder), weakref.ref(pipe.text_encoder_2)]
    pipe.text_encoder = pipe.text_encoder_2 = None
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None]
    noise = np.random.default_rng(0)
    drawn = pipe(**embeds, num_inference_steps=8, output_type="np", generator=noise)[0][0]
    np.testing.assert_allclose(drawn, draw(load(checkpoint)), atol=1e-4)


BAD = {
    "quant_type must be one of int8_weight_only, int8, not 'int4'": {"quant_type": "int4"},
    "layers must be one of blocks, all, not 'some'": {"layers": "some"},
    "exclude_layers must be a list of texts, not 'norm'": {"exclude_layers": "norm"},
    "components_to_quantize names no component": {"components_to_quantize": ()},
}


@pytest.mark.parametrize("message", BAD)
def test_a_config_that_says_nothing_is_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        QuantizeConfig(**BAD[message])


REFUSED = {
    "exclude_layers: 'nothing' matches no layer of transformer": {"exclude_layers": ["nothing"]},
    "weight_only_layers: 'nothing' matches no layer": {"quant_type": "int8", "weight_only_layers": ["nothing"]},
    "there is no text_encoder_3 to load, but .*text_encoder": {"components_to_quantize": ["text_encoder_3"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_checkpoint_cannot_be_is_told_before_it_is_loaded(message, checkpoint, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "_with_settings", None)
    with pytest.raises(ValueError, match=message):
        load(checkpoint, quantize_config=QuantizeConfig(**REFUSED[message]))
    with pytest.raises(TypeError, match="quantize_config must be a QuantizeConfig or None, not str"):
        load(checkpoint, quantize_config="int8")


def test_float32_is_not_for_int8_operators_on_ascend(monkeypatch):
    monkeypatch.setattr(ms, "get_context", lambda name: "Ascend")
    check_quantize(QuantizeConfig(), ms.bfloat16)
    check_quantize(None, ms.float32)
    with pytest.raises(ValueError, match="mindspore_dtype of bfloat16 or float16 on Ascend, not float32"):
        check_quantize(QuantizeConfig(), ms.float32)
    for dtype in (None, {"default": ms.float32}, {"vae": ms.float16}, {"transformer": None, "default": ms.bfloat16}):
        with pytest.raises(ValueError, match="not float32"):
            check_quantize(QuantizeConfig(), dtype)
    check_quantize(QuantizeConfig(), {"default": ms.bfloat16, "vae": ms.float32})
    with pytest.raises(ValueError, match="not float32"):
        quantize(mint.nn.Linear(2, 2))


def test_nothing_is_quantised_twice(checkpoint, tmp_path):
    pipe = load(checkpoint, quantize_config=QuantizeConfig())
    with pytest.raises(ValueError, match="transformer is quantised already"):
        quantize(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformer of .* is quantised already, as int8_weight_only"):
        load(tmp_path, quantize_config=QuantizeConfig("int8"))


def test_a_checkpoint_that_is_half_quantised_is_refused(checkpoint, tmp_path):
    load(checkpoint, quantize_config=QuantizeConfig()).save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    config = json.loads(file.read_text())
    saved = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights have, but its config does not, .*weight_scale"):
        load(tmp_path)
    file.write_text(json.dumps({**config, "quantization_config": {**saved, "layers": "all"}}))
    with pytest.raises(ValueError, match="weights lack .*weight_scale"):
        load(tmp_path)
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match="quant_method 'bitsandbytes'; only 'fbcache_ms'"):
        load(tmp_path)


def test_the_command_line_quantises(checkpoint, tmp_path):
    command = [sys.executable, "-m", "FBCache_ms", "draw", "--ckpt", checkpoint, "--num_inference_steps", "2"]
    command += ["--save_path", tmp_path, "--no-compile_cache", "--quantize"]
    ran = subprocess.run([*map(str, command), "int8", "transformer", "text_encoder_2"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["quantize"] == {"transformer": "int8", "text_encoder_2": "int8"}
    for words, message in {
        ("int4",): "quant_type must be one of",
        ("int8", "unet"): "there is no unet to load",
    }.items():
        ran = subprocess.run([*map(str, command), *words], capture_output=True, text=True)
        assert ran.returncode == 2 and message in ran.stderr and len(ran.stderr.splitlines()) == 1
