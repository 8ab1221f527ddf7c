"""Image prompts and joint_attention_kwargs reach the blocks that mindone hands them to."""

import further
import mindone.diffusers
import numpy as np
import pytest
from narrow import make_narrow, text_lora

import mindspore as ms

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.eval.shared.metrics import psnr
from FBCache_ms.models.transformer_flux_withFBCache import attention_inputs
from FBCache_ms.runtime.device import graph_mode

TEXT, IMAGE, EMBEDDING = 32, 64, 16
RNG = np.random.default_rng(0)


def tensor(*shape, scale=1.0):
    return ms.Tensor(RNG.normal(0, scale, shape), ms.float32)


def ip_adapter(config, width):
    """A random IP adapter's state dict, of four tokens an image."""

    def parameters(**shapes):
        return {name: ms.Parameter(tensor(*shape, scale=0.1), name=name) for name, shape in shapes.items()}

    text = config.joint_attention_dim
    projection = {"proj.weight": (4 * text, EMBEDDING), "proj.bias": (4 * text,)}
    blocks = {}
    for block in range(config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            blocks.update({f"{block}.{part}.weight": (width, text), f"{block}.{part}.bias": (width,)})
    norm = {"norm.weight": (text,), "norm.bias": (text,)}
    return {"image_proj": parameters(**projection, **norm), "ip_adapter": parameters(**blocks)}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    folder = make_narrow(tmp_path_factory.mktemp("inputs") / "narrow", 2, 1)
    pipe = FluxPipeline.from_pretrained(str(folder))
    pipe.components["transformer"].folder = folder
    return pipe.components


@pytest.fixture(scope="module")
def image_prompted(components):
    """The components with an IP adapter in a transformer of its own: mindone's unload_ip_adapter raises."""
    transformer = type(components["transformer"]).from_pretrained(str(components["transformer"].folder / "transformer"))
    pipe = mindone.diffusers.FluxPipeline(**{**components, "transformer": transformer})
    adapter = ip_adapter(transformer.config, transformer.inner_dim)
    pipe.load_ip_adapter(adapter, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    pipe.set_ip_adapter_scale(0.7)
    return pipe.components


def whole_loop(components, config):
    pipe = FluxPipeline(**components)
    pipe.cache_config = config
    return pipe


def cached_step(components, config):
    return apply_cache_on_pipe(mindone.diffusers.FluxPipeline(**components), config)


def draw(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 3, **settings}
    generator = np.random.default_rng(0)
    return pipe(**settings, generator=generator, max_sequence_length=TEXT, output_type="latent")[0].asnumpy()


def mindones(components, **settings):
    """What mindone's pipeline draws, operator by operator: its IP adapters do not compile."""
    with graph_mode(False):
        return draw(mindone.diffusers.FluxPipeline(**components), **settings)


def image_prompt(seen=1.0):
    image = np.linspace(-1, 1, EMBEDDING).reshape(1, 1, EMBEDDING)
    embeds = {"ip_adapter_image_embeds": image * seen, "negative_ip_adapter_image_embeds": image * 0 + 0.1}
    return {name: [ms.Tensor(value, ms.float32)] for name, value in embeds.items()}


TRUE_CFG = {"negative_prompt": "a green square", "true_cfg_scale": 2.0}


@pytest.mark.parametrize("make", further.after(1, [whole_loop, cached_step]))
@pytest.mark.parametrize("guidance", [{}, TRUE_CFG], ids=["one branch", "true CFG"])
def test_image_prompts(image_prompted, make, guidance):
    pipe = make(image_prompted, CacheConfig(0.0))
    expected = mindones(image_prompted, **image_prompt(), **guidance)
    np.testing.assert_allclose(draw(pipe, **image_prompt(), **guidance), expected, atol=1e-4)
    compilations = len(pipe.transformer.steps) if make is cached_step else pipe.graph_compilations
    other = draw(pipe, **image_prompt(-1.0), **guidance)
    assert np.abs(other - expected).max() > 1e-2
    assert compilations == (len(pipe.transformer.steps) if make is cached_step else pipe.graph_compilations) == 1
    apply_cache_on_pipe(pipe, CacheConfig(0.5))
    cached = draw(pipe, **image_prompt(), **guidance, num_inference_steps=8)
    stats = pipe.cache_stats if make is whole_loop else pipe.transformer.cache_stats
    assert stats.cached_steps
    apply_cache_on_pipe(pipe, CacheConfig(0.0))
    assert 20 < psnr(draw(pipe, **image_prompt(), **guidance, num_inference_steps=8), cached) < 70


@pytest.mark.parametrize("make", [whole_loop, cached_step])
def test_an_attention_mask(components, make):
    mask = {"attention_mask": ms.Tensor(np.where(np.arange(TEXT + IMAGE) % 3, 0, -5)[None, None, None], ms.float32)}
    expected = mindones(components, joint_attention_kwargs=dict(mask))
    pipe = make(components, CacheConfig(0.0))
    np.testing.assert_allclose(draw(pipe, joint_attention_kwargs=dict(mask)), expected, atol=1e-4)
    assert np.abs(draw(pipe) - expected).max() > 1e-3


def test_a_lora_scale_is_taken_by_the_pipeline(components):
    pipe = whole_loop(components, CacheConfig(0.0))
    plain = draw(pipe)
    np.testing.assert_array_equal(draw(pipe, joint_attention_kwargs={"scale": 0.5}), plain)


def test_both_prompts_are_encoded_under_the_lora_scale(components, monkeypatch):
    pipe, strengths = whole_loop(components, CacheConfig(0.0)), []
    pipe.load_lora_weights(text_lora(0), adapter_name="one")
    layer, encode = pipe.text_encoder.text_model.encoder.layers[0].self_attn.q_proj, pipe.encode_prompt

    def spy(*args, **kwargs):
        strengths.append(layer.scaling["one"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", spy)
    try:
        draw(pipe, **TRUE_CFG, joint_attention_kwargs={"scale": 0.5})
        assert strengths == [0.5, 0.5] and layer.scaling["one"] == 1
    finally:
        pipe.unload_lora_weights()


def test_without_an_image_for_the_adapter_it_is_said_what_to_do(image_prompted):
    with pytest.raises(ValueError, match="give ip_adapter_image or ip_adapter_image_embeds"):
        draw(whole_loop(image_prompted, CacheConfig()))


def test_what_attention_does_not_know_is_ignored_with_a_warning(components, caplog):
    with caplog.at_level("WARNING"):
        assert attention_inputs(components["transformer"], {"colour": 3}) is None
    assert "joint_attention_kwargs colour are not known to Flux's attention: ignored" in caplog.text
