"""Qwen-Image as the cache sees it is mindone's own, and what mindone's is not: padding counts for nothing."""

import numpy as np
import pytest
from mindone.diffusers.models.transformers import transformer_qwenimage
from small_models import TEXT_WIDTH, CachedCalls, graph_inputs, mindones, qwen_transformer, tensor

import mindspore as ms

from FBCache_ms.models import foreign_transformer, padding, qwenimage

BLOCKS, ROWS, COLUMNS, CHANNELS = 3, 3, 4, 64
LENGTHS = 7, 4


@pytest.fixture(scope="module")
def transformer():
    return qwen_transformer(BLOCKS)


@pytest.fixture(scope="module")
def cached(transformer):
    """Calls by graphs that the tests of this file share."""
    return CachedCalls(transformer)


def arguments(batch=2, length=LENGTHS[0], mask=None):
    """A call of the transformer."""
    return {
        "hidden_states": tensor(0, batch, ROWS * COLUMNS, CHANNELS),
        "timestep": ms.Tensor(np.linspace(0.7, 0.4, batch), ms.float32),
        "encoder_hidden_states": tensor(1, batch, length, TEXT_WIDTH),
        "encoder_hidden_states_mask": ms.Tensor(np.ones((batch, length)) if mask is None else mask, ms.int64),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * batch,
        "txt_seq_lens": [length] * batch,
    }


def row(given, index, length):
    """One sample of a batch, its text without what pads it."""
    alone = {name: value[index : index + 1] for name, value in given.items()}
    for name in ("encoder_hidden_states", "encoder_hidden_states_mask"):
        alone[name] = alone[name][:, :length]
    return {**alone, "txt_seq_lens": [length]}


def test_a_cached_call_is_mindones_own_forward(transformer, cached):
    given = arguments()
    np.testing.assert_allclose(cached(**given), mindones(transformer, **given), atol=2e-5)


def test_padding_to_a_bucket_changes_nothing(transformer, cached, monkeypatch):
    given = arguments()
    padded = cached(**given)
    text = np.full((2, 30, TEXT_WIDTH), 100.0, np.float32)
    text[:, : LENGTHS[0]] = given["encoder_hidden_states"].asnumpy()
    mask = np.tile(np.arange(30) < LENGTHS[0], (2, 1))
    others = {"encoder_hidden_states": ms.Tensor(text), "encoder_hidden_states_mask": ms.Tensor(mask)}
    np.testing.assert_array_equal(cached(**{**given, **others}), padded)
    monkeypatch.setattr(padding, "BUCKETS", LENGTHS[:1])
    unpadded = CachedCalls(transformer, compiled=False)
    np.testing.assert_allclose(unpadded(**given), padded, atol=2e-6)
    assert [key[3] for key in (*cached.steps, *unpadded.steps)] == [64, LENGTHS[0]]


def test_a_batchs_texts_of_several_lengths_are_each_text_alone(transformer, cached):
    given = arguments(mask=np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None])
    together = cached(**given)
    for index, length in enumerate(LENGTHS):
        alone = mindones(transformer, **row(given, index, length))
        np.testing.assert_allclose(together[index : index + 1], alone, atol=2e-5)
    # mindone's attends to the padding of the shorter one.
    assert np.abs(mindones(transformer, **given)[1] - together[1]).max() > 1e-3


def test_controlnet_residuals_go_to_mindones_blocks(transformer, cached):
    given = arguments(batch=1)
    residuals = [tensor(seed, 1, ROWS * COLUMNS, transformer.inner_dim) for seed in (2, 3)]
    expected = mindones(transformer, **given, controlnet_block_samples=residuals)
    got = cached(**given, controlnet_block_samples=residuals)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(cached(**given, controlnet_block_samples=residuals[::-1]) - got).max() > 0.1


def test_the_weights_behind_the_last_block_are_read_by_no_graph(transformer, cached):
    given, model = arguments(), transformer.cached_model
    before = cached(**given)

    def with_nans(parameters):
        """A call by a graph of its own: one that has run may go on with the weights that it had then."""
        kept = [parameter.asnumpy().copy() for parameter in parameters]
        for parameter in parameters:
            parameter.set_data(ms.Tensor(np.full(parameter.shape, np.nan), parameter.dtype))
        try:
            return CachedCalls(transformer)(**given)
        finally:
            for parameter, values in zip(parameters, kept):
                parameter.set_data(ms.Tensor(values))

    np.testing.assert_array_equal(with_nans(model.idle()), before)
    assert np.isnan(with_nans(model.cell(BLOCKS - 2).txt_mlp.trainable_params())).any()


def test_a_divided_block_is_the_block(transformer):
    model, batch, text_len = transformer.cached_model, 2, 5
    image, text = tensor(2, batch, ROWS * COLUMNS, model.width), tensor(3, batch, text_len, model.width)
    given = {
        "temb": tensor(4, batch, model.width),
        "rotary": qwenimage.rotary_table(10000, (8, 12, 12), True, ((1, ROWS, COLUMNS),), text_len),
        "keys": ms.Tensor(np.ones((batch, 1, 1, text_len + ROWS * COLUMNS), bool)),
        "controlnet": None,
    }
    divided, unfinished = model.divided_block(0, image, text, given)
    whole_text, whole = model.cell(0)(image, text, None, given["temb"], complex_table(given["rotary"], text_len))
    np.testing.assert_allclose(divided.asnumpy(), whole.asnumpy(), atol=1e-5)
    np.testing.assert_allclose(model.text_behind(0, unfinished, given).asnumpy(), whole_text.asnumpy(), atol=1e-5)
    assert tuple(each.shape for each in unfinished) == model.unfinished_shapes(0, image.shape, text.shape)


def complex_table(rotary, text_len):
    """The table as mindone's blocks take it, the pictures' and the text's."""
    cos, sin = (part.asnumpy()[:, ::2] for part in rotary)
    return ms.Tensor((cos + 1j * sin)[text_len:]), ms.Tensor((cos + 1j * sin)[:text_len])


def test_what_teacache_looks_at_is_the_first_blocks_modulated_input(transformer):
    model = transformer.cached_model
    image, temb = tensor(2, 2, 6, model.width), tensor(3, 2, model.width)
    block = model.cell(0)
    expected, _ = block._modulate(block.img_norm1(image), block.img_mod(temb)[:, : 3 * model.width])
    np.testing.assert_allclose(model.modulated(image, {"temb": temb}).asnumpy(), expected.asnumpy(), atol=1e-6)


def mindones_table(theta, axes, scale_rope, shapes, text_len):
    """mindone's QwenEmbedRope in float64: rows of two tables, of positions 0, 1, ... and of ..., -2, -1."""
    frequencies = [1 / theta ** (np.arange(0, axis, 2) / axis) for axis in axes]
    positive = [np.exp(1j * np.outer(np.arange(4096), each)) for each in frequencies]
    negative = [np.exp(1j * np.outer(np.arange(-4096, 0), each)) for each in frequencies]
    pictures, largest = [], 0
    for frames, height, width in shapes:
        sides = []
        for axis, side in ((1, height), (2, width)):
            half = side // 2
            centred = np.concatenate([negative[axis][-(side - half) :], positive[axis][:half]])
            sides.append(centred if scale_rope else positive[axis][:side])
        size = frames, height, width
        parts = positive[0][:frames, None, None], sides[0][None, :, None], sides[1][None, None]
        parts = [np.broadcast_to(part, size + part.shape[-1:]) for part in parts]
        pictures.append(np.concatenate(parts, -1).reshape(frames * height * width, -1))
        largest = max(largest, *((height // 2, width // 2) if scale_rope else (height, width)))
    text = np.concatenate([table[largest : largest + text_len] for table in positive], 1)
    return np.concatenate([text, *pictures])


@pytest.mark.parametrize("scale_rope", [True, False])
@pytest.mark.parametrize("shapes", [((1, 4, 6),), ((1, 5, 3),), ((1, 4, 4), (1, 7, 3), (1, 1, 1)), ((3, 2, 5),)])
def test_the_rotary_table_is_mindones(shapes, scale_rope):
    settings = 10000, (8, 12, 12), scale_rope, shapes, 9
    expected = mindones_table(*settings)
    for got, want in zip(qwenimage.rotary_table(*settings), (expected.real, expected.imag)):
        assert got.dtype == ms.float32
        np.testing.assert_allclose(got.asnumpy(), np.repeat(want, 2, 1), atol=1e-5)


@pytest.mark.parametrize(
    "shapes", [[[(1, 4, 6)]] * 2, [(1, 4, 6)] * 2, (1, 4, 6)], ids=["a list each", "a shape each", "one"]
)
def test_pictures_of_a_batch_are_told_as_mindones_pipelines_tell_them(transformer, shapes):
    """A list each, or by those with a ControlNet a shape each."""
    given = {**arguments(), "img_shapes": shapes}
    tables = graph_inputs(transformer, **{name: given[name] for name in list(given)[2:]})["rotary"]
    assert [table.shape for table in tables] == [(64 + 24, 32)] * 2


def test_guidance_keeps_each_tokens_norm(transformer):
    rng = np.random.default_rng(0)
    negative, positive = rng.normal(size=(2, 2, 5, 8)) * [[[[1.0]]], [[[3.0]]]]
    combined = negative + 4.5 * (positive - negative)
    sizes = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (positive, combined)]
    tensors = (ms.Tensor(each, ms.float32) for each in (negative, positive, 4.5))
    got = transformer.cached_model.guide(*tensors).asnumpy()
    np.testing.assert_allclose(got, combined * sizes[0] / sizes[1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1, keepdims=True), sizes[0], rtol=1e-5)


@pytest.mark.parametrize(
    "more, named",
    [
        ({"encoder_hidden_states_mask": ms.Tensor(np.ones((2, 6)))}, r"mask is \(2, 6\), its embeddings are \(2, 7"),
        ({"encoder_hidden_states_mask": ms.Tensor(np.ones((1, 7)))}, r"mask is \(1, 7\)"),
        ({"encoder_hidden_states": tensor(0, 1, 2049, 1), "encoder_hidden_states_mask": None}, "2049 tokens .* 2048"),
        ({"guidance": ms.Tensor([1.0])}, "guidance must be None"),
        ({"attention_kwargs": {"colour": 1, "scale": 2}}, "attention_kwargs colour, scale are not supported"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(transformer, more, named):
    given = {**arguments(), **more}
    with pytest.raises(ValueError, match=named) as caught:
        graph_inputs(transformer, **{name: given[name] for name in list(given)[2:]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length, bucket", [(1, 64), (64, 64), (65, 128), (2048, 2048)])
def test_a_text_is_padded_to_the_least_bucket_that_holds_it(length, bucket):
    given = tensor(0, 2, length, 3)
    for mask in (None, ms.Tensor(np.arange(2 * length).reshape(2, length) % 3 > 0)):
        text, keys = qwenimage.padded_text(given, mask)
        assert text.shape == (2, bucket, 3) and keys.shape == (2, bucket) and keys.dtype == ms.float32
        np.testing.assert_array_equal(text.asnumpy()[:, :length], given.asnumpy())
        np.testing.assert_array_equal(keys.asnumpy()[:, :length], 1 if mask is None else mask.asnumpy())
        assert not text.asnumpy()[:, length:].any() and not keys.asnumpy()[:, length:].any()


class OwnBlock(transformer_qwenimage.QwenImageTransformerBlock):
    def construct(self, *streams, **more):
        return super().construct(*streams, **more)


class OwnAttention(transformer_qwenimage.Attention):
    def construct(self, *streams, **more):
        return super().construct(*streams, **more)


class OwnProcessor(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
    def __call__(self, *streams, **more):
        return super().__call__(*streams, **more)


class OwnRotary(transformer_qwenimage.QwenEmbedRope):
    def construct(self, *shapes):
        return super().construct(*shapes)


class OwnTime(transformer_qwenimage.QwenTimestepProjEmbeddings):
    def construct(self, *times):
        return super().construct(*times)


PLACES = {
    "block": (lambda transformer: transformer.transformer_blocks[1], OwnBlock),
    "attention": (lambda transformer: transformer.transformer_blocks[1].attn, OwnAttention),
    "processor": (lambda transformer: transformer.transformer_blocks[1].attn.processor, OwnProcessor),
    "pos_embed": (lambda transformer: transformer.pos_embed, OwnRotary),
    "time": (lambda transformer: transformer.time_text_embed, OwnTime),
}


@pytest.mark.parametrize(
    "place, named",
    [
        ("block", "block 1 is not mindone's QwenImageTransformerBlock"),
        ("attention", "block 1's attention is not mindone's"),
        ("processor", "block 1 has the attention processor OwnProcessor"),
        ("pos_embed", "pos_embed OwnRotary has a construct of its own"),
        ("time", "time_text_embed OwnTime has a construct of its own"),
    ],
)
def test_what_is_the_users_own_is_named(transformer, monkeypatch, place, named):
    assert foreign_transformer(transformer) is None
    find, kind = PLACES[place]
    monkeypatch.setattr(find(transformer), "__class__", kind)
    assert named in foreign_transformer(transformer)


def test_a_block_with_a_hook_is_the_users_own(transformer):
    handle = transformer.transformer_blocks[2].register_forward_hook(lambda cell, inputs, output: output)
    try:
        assert "block 2 is not mindone's" in foreign_transformer(transformer)
    finally:
        handle.remove()
    assert foreign_transformer(transformer) is None
