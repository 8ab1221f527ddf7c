"""Compiled graphs are used for as long as they are right, and no longer."""

import gc
from types import MethodType

import mindone.diffusers
import numpy as np
import pytest
from mindone.diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxSingleTransformerBlock
from narrow import make_narrow, text_lora

import mindspore as ms
from mindspore import mint, nn

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.runtime.kept_graphs import KeptGraphs, made_of

CONFIG = CacheConfig(0.6)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The pipeline that the others take their components from, and a prompt's embeddings."""
    pipe = FluxPipeline.from_pretrained(str(make_narrow(tmp_path_factory.mktemp("kept") / "narrow")))
    pipe.prompt = pipe.encode_prompt("a red circle", max_sequence_length=32)[:2]
    return pipe


def whole_loop(first):
    """Our own pipeline on the first one's components, with nothing compiled."""
    pipe = FluxPipeline(**first.components)
    pipe.cache_config = CONFIG
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cached_step(first):
    """mindone's pipeline with the cache on it."""
    pipe = mindone.diffusers.FluxPipeline(**first.components)
    pipe.set_progress_bar_config(disable=True)
    return apply_cache_on_pipe(pipe, CONFIG)


def draw(pipe, first, width=64, steps=6, **more):
    embeds, pooled = first.prompt
    settings = {"height": 64, "width": width, "num_inference_steps": steps, "output_type": "latent"}
    generator = np.random.default_rng(0)
    return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=generator, **settings, **more)[0].asnumpy()


def lora(seed):
    """A LoRA's state dict for two layers of the first block, strong enough to be seen."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer, outputs in {"attn.to_q": 128, "ff.net.0.proj": 512}.items():
        for part, shape in {"lora_A": (4, 128), "lora_B": (outputs, 4)}.items():
            name = f"transformer.transformer_blocks.0.{layer}.{part}.weight"
            tensors[name] = ms.Parameter(ms.Tensor(rng.normal(0, 0.3, shape), ms.float32), name=name)
    return tensors


@pytest.mark.release
def test_adapters_and_weights_are_seen(first):
    """In each state the picture is that of a pipeline that has compiled nothing before."""
    pipe, stepwise, pictures = whole_loop(first), cached_step(first), []
    weight = first.transformer.single_transformer_blocks[0].attn.to_v.weight
    old = weight.asnumpy().copy()
    states = {
        "as it was": lambda: None,
        "one adapter": lambda: pipe.load_lora_weights(lora(0), adapter_name="one"),
        "at half its strength": lambda: pipe.set_adapters(["one"], [0.5]),
        "another adapter": lambda: (pipe.load_lora_weights(lora(1), adapter_name="two"), pipe.set_adapters(["two"])),
        "none of them": lambda: pipe.unload_lora_weights(),
        "another weight": lambda: weight.set_data(ms.Tensor(old * 2)),
    }
    try:
        for name, change in states.items():
            change()
            pictures.append(draw(pipe, first))
            np.testing.assert_array_equal(pictures[-1], draw(whole_loop(first), first), err_msg=name)
            np.testing.assert_array_equal(pictures[-1], draw(stepwise, first), err_msg=name)
    finally:
        weight.set_data(ms.Tensor(old))
    np.testing.assert_array_equal(pictures[4], pictures[0])
    for index in (1, 2, 3, 5):
        assert all(np.abs(pictures[index] - other).max() > 1e-3 for other in pictures[:index])


def twice(parameter):
    parameter.set_data(ms.Tensor(2 * parameter.asnumpy()))


CHANGES = {
    "CLIP's embedding": lambda pipe: twice(next(pipe.text_encoder.get_parameters())),
    "CLIP's layer": lambda pipe: twice(pipe.text_encoder.text_model.encoder.layers[0].mlp.fc1.weight),
    "T5": lambda pipe: twice(next(pipe.text_encoder_2.get_parameters())),
    "autoencoder": lambda pipe: twice(pipe.vae.decoder.conv_out.weight),
    "CLIP's adapter": lambda pipe: pipe.load_lora_weights(text_lora(0), adapter_name="one"),
}


@pytest.mark.release
@pytest.mark.usefixtures("compiled_parts")
@pytest.mark.parametrize("changed", CHANGES)
def test_the_other_models_adapters_and_weights_are_seen(changed, tmp_path, capfd):
    """The picture is that of a pipeline that has compiled nothing before, and what it was when all is undone."""
    folder = str(make_narrow(tmp_path / "narrow"))
    change = CHANGES[changed]

    def load():
        pipe = FluxPipeline.from_pretrained(folder, cache_config=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def picture(pipe, scale=None):
        settings = {"num_inference_steps": 2, "output_type": "np", "generator": np.random.default_rng(0)}
        scaled = None if scale is None else {"scale": scale}
        return pipe("a red circle", height=64, width=64, joint_attention_kwargs=scaled, **settings)[0]

    pipe, fresh = load(), load()
    before = picture(pipe)
    assert "address" not in capfd.readouterr().err
    change(pipe)
    change(fresh)
    after = picture(pipe)
    np.testing.assert_array_equal(after, picture(fresh))
    assert np.abs(after - before).max() > 1e-4
    if "adapter" in changed:
        weaker = picture(pipe, scale=0.5)
        assert np.abs(weaker - after).max() > 1e-4
        np.testing.assert_array_equal(picture(pipe), after)
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(picture(pipe), before)


class Weight:
    """A Parameter's place in memory."""

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


class Layers(nn.Cell):
    """A transformer without layers."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = weights

    def get_parameters(self):
        return iter(self.weights)


class Compiled:
    """A cell."""

    released = False

    def release(self):
        self.released = True


def test_a_cell_is_made_anew_where_weights_have_moved_and_goes_at_the_next_call():
    graphs, first, second = KeptGraphs(), Layers(Weight(1)), Layers(Weight(2))
    cells = []
    for transformer in (first, second):
        cells.append(graphs.get(transformer, "shape", Compiled))
        graphs.settle()
    first.weights[0].address = 3
    assert graphs.get(second, "shape", Compiled) is cells[1] and not cells[1].released
    assert graphs.get(first, "shape", Compiled) is not cells[0] and not cells[0].released
    graphs.get(second, "shape", Compiled)
    assert cells[0].released and not cells[1].released


def test_a_cell_that_never_ran_to_its_end_is_made_anew_and_goes_at_the_next_call():
    graphs, transformer = KeptGraphs(), Layers(Weight(1))
    cell = graphs.get(transformer, "shape", Compiled)
    again = graphs.get(transformer, "shape", Compiled)
    assert again is not cell and not cell.released
    graphs.settle()
    assert graphs.get(transformer, "shape", Compiled) is again and cell.released


class Quiet(FluxAttnProcessor):
    """An attention processor of the user's own."""


def unchanged(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    return encoder_hidden_states, hidden_states


def watch(cell, inputs, output):
    return output


class Same(FluxSingleTransformerBlock):
    """A block of the user's own."""


def with_the_weights_of(block, kind):
    """Another cell that has all of a block's layers."""
    other = kind(16, 2, 8)
    for name, layer in block._cells.items():
        setattr(other, name, layer)
    return other


SWAPS = {
    "layer": lambda blocks: setattr(blocks[0], "act_mlp", mint.nn.SiLU()),
    "block": lambda blocks: blocks.__setitem__(0, with_the_weights_of(blocks[0], Same)),
    "class": lambda blocks: setattr(blocks[0], "__class__", Same),
    "order": lambda blocks: blocks.__init__([blocks[1], blocks[0]]),
    "construct": lambda blocks: setattr(blocks[0], "construct", MethodType(unchanged, blocks[0])),
    "processor": lambda blocks: setattr(blocks[0].attn, "processor", Quiet()),
    "processor's attribute": lambda blocks: setattr(blocks[0].attn.processor, "strength", 2),
    "hook": lambda blocks: blocks[0].proj_mlp.register_forward_hook(watch),
    "training": lambda blocks: blocks[0].act_mlp.set_train(),
    "epsilon": lambda blocks: setattr(blocks[0].norm.norm, "eps", 1e-3),
    "precision": lambda blocks: blocks[0].proj_mlp.to_float(ms.float16),
    "parameter": lambda blocks: setattr(blocks[0].proj_mlp, "weight", blocks[1].proj_mlp.weight),
}
"""What may be swapped for another in a transformer that was compiled."""


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swap_is_seen(swap):
    blocks = nn.CellList([FluxSingleTransformerBlock(16, 2, 8) for _ in range(2)])
    before, again = made_of(blocks), made_of(blocks)
    assert before[0] == again[0]
    SWAPS[swap](blocks)
    assert made_of(blocks)[0] != before[0]


def test_a_method_that_a_user_puts_on_a_class_is_seen(monkeypatch):
    blocks = nn.CellList([FluxSingleTransformerBlock(16, 2, 8)])
    before = made_of(blocks)
    monkeypatch.setattr(FluxSingleTransformerBlock, "construct", unchanged)
    after = made_of(blocks)
    assert after[0] != before[0]
    monkeypatch.undo()
    assert made_of(blocks)[0] == before[0]


@pytest.mark.release
def test_swapped_layers_are_drawn_with(first):
    """In each state the picture is that of a pipeline that has compiled nothing before, and is found again."""
    pipe, stepwise, pictures = whole_loop(first), cached_step(first), []
    double, single = first.transformer.transformer_blocks[0], first.transformer.single_transformer_blocks[0]
    activation = single.act_mlp
    states = {
        "as it was": lambda: None,
        "another layer": lambda: setattr(single, "act_mlp", mint.nn.SiLU()),
        "another construct": lambda: setattr(double, "construct", MethodType(unchanged, double)),
        "as it was again": lambda: (delattr(double, "construct"), setattr(single, "act_mlp", activation)),
    }
    try:
        for name, change in states.items():
            change()
            pictures.append(draw(pipe, first))
            np.testing.assert_array_equal(pictures[-1], draw(whole_loop(first), first), err_msg=name)
            np.testing.assert_array_equal(pictures[-1], draw(stepwise, first), err_msg=name)
    finally:
        vars(double).pop("construct", None)
        single.act_mlp = activation
    np.testing.assert_array_equal(pictures[3], pictures[0])
    assert all(np.abs(pictures[index] - pictures[index - 1]).max() > 1e-3 for index in (1, 2))
    assert pipe.graph_compilations == 3


def test_weights_that_are_set_behind_a_broken_off_call_are_seen(first):
    pipe, weight = whole_loop(first), first.transformer.single_transformer_blocks[0].attn.to_v.weight
    old = weight.asnumpy().copy()

    def stop(*_):
        raise KeyboardInterrupt

    draw(pipe, first)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, first, callback_on_step_end=stop)
    try:
        weight.set_data(ms.Tensor(old * 2))
        np.testing.assert_array_equal(draw(pipe, first), draw(whole_loop(first), first))
    finally:
        weight.set_data(ms.Tensor(old))


def test_another_pipeline_may_take_a_cached_ones_components(first):
    pipe = cached_step(first)
    expected = draw(pipe, first)
    other = mindone.diffusers.FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(apply_cache_on_pipe(other, CONFIG), first), expected)
    assert other.transformer.cache_stats.cached_steps
    third = mindone.diffusers.FluxPipeline(**other.components)
    third.set_progress_bar_config(disable=True)
    del other
    gc.collect()
    with pytest.raises(ValueError, match="apply_cache_on_pipe"):
        draw(third, first)
    np.testing.assert_array_equal(draw(pipe, first), expected)


def test_fused_adapters_are_seen(first, tmp_path):
    """In a transformer of its own: mindone's unfuse_lora leaves the weights fused."""
    transformer = type(first.transformer).from_pretrained(str(make_narrow(tmp_path / "narrow") / "transformer"))
    parts = FluxPipeline(**{**first.components, "transformer": transformer})
    parts.prompt = first.prompt
    pipe, stepwise = whole_loop(parts), cached_step(parts)
    plain = draw(pipe, first)
    np.testing.assert_array_equal(draw(stepwise, first), plain)
    pipe.load_lora_weights(lora(0), adapter_name="one")
    pipe.fuse_lora()
    fused = draw(pipe, first)
    assert np.abs(fused - plain).max() > 1e-3
    np.testing.assert_array_equal(fused, draw(whole_loop(parts), first))
    np.testing.assert_array_equal(fused, draw(stepwise, first))


def test_pipelines_with_one_transformer_do_not_see_each_other(first):
    kind = type(first.transformer)
    construct, plain, off = kind.construct, mindone.diffusers.FluxPipeline(**first.components), cached_step(first)
    plain.set_progress_bar_config(disable=True)
    apply_cache_on_pipe(off, CacheConfig(0.0))
    before, uncached = draw(plain, first), draw(off, first)
    pipe = cached_step(first)
    cached = draw(pipe, first)
    assert pipe.transformer.cache_stats.cached_steps and not off.transformer.cache_stats.cached_steps
    np.testing.assert_array_equal(draw(plain, first), before)
    np.testing.assert_array_equal(draw(off, first), uncached)
    np.testing.assert_array_equal(draw(pipe, first), cached)
    assert plain.transformer is first.transformer and kind.construct is construct
    assert "construct" not in vars(first.transformer)


def test_a_shape_finds_its_graph_again_until_another_takes_its_place(first):
    pipe = apply_cache_on_pipe(cached_step(first), CONFIG, kept_shapes=2)
    pictures = {width: draw(pipe, first, width, steps=2) for width in (32, 64)}
    kept = list(pipe.transformer.steps)
    for width in (64, 32):
        np.testing.assert_array_equal(draw(pipe, first, width, steps=2), pictures[width])
    assert set(pipe.transformer.steps) == set(kept) and len(kept) == 2
    draw(pipe, first, 96, steps=2)
    assert len(pipe.transformer.steps) == 2 and kept[0] in list(pipe.transformer.steps)
    # MindSpore never lets go of what remains of it.
    assert kept[1].cache_context.nbytes < 100 < kept[0].cache_context.nbytes
    np.testing.assert_array_equal(draw(pipe, first, 64, steps=2), pictures[64])


def test_a_generation_keeps_all_its_shapes(first):
    """A negative prompt of another length has a graph of its own, and both go on to the end."""
    embeds, pooled = first.prompt
    negative = {"negative_prompt_embeds": embeds[:, :20] * 0.5, "negative_pooled_prompt_embeds": pooled * 0.5}
    settings = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **negative, "true_cfg_scale": 2.0}
    pictures = []
    for most in (1, 2):
        pipe = apply_cache_on_pipe(cached_step(first), CONFIG, kept_shapes=most)
        size = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
        pictures.append(pipe(**settings, **size, generator=np.random.default_rng(0))[0].asnumpy())
        assert len(pipe.transformer.steps) == 2
    np.testing.assert_array_equal(*pictures)


def test_another_scheduler_tells_the_cache_too(first):
    pipe = cached_step(first)
    draw(pipe, first, steps=3)
    pipe.scheduler = type(first.scheduler).from_config(first.scheduler.config, shift=1.0)
    for steps in (4, 5):
        draw(pipe, first, steps=steps)
        assert len(pipe.transformer.cache_stats.reused) == steps


def test_no_kept_shape_is_refused_by_name(first):
    with pytest.raises(ValueError, match="kept_shapes must be 1 or more, not 0"):
        apply_cache_on_pipe(whole_loop(first), CONFIG, kept_shapes=0)
