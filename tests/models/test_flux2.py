"""FLUX.2 as the cache sees it is mindone's own; tokens of pictures that are drawn after stay."""

import numpy as np
import pytest
from mindone.diffusers.models.transformers import transformer_flux2
from small_models import TEXT_WIDTH, CachedCalls, flux2_transformer, graph_inputs, mindones, tensor

import mindspore as ms

from FBCache_ms.models import flux2, foreign_transformer

TEXT, ROWS, COLUMNS, CHANNELS, STILL = 5, 3, 4, 16, 2


@pytest.fixture(scope="module")
def transformer():
    return flux2_transformer(2, 2)


@pytest.fixture(scope="module")
def cached(transformer):
    """Calls by graphs that the tests of this file share."""
    return CachedCalls(transformer)


def positions(*counts, batch=2):
    """Frame, row, column and word of each token of a grid, (B, N, 4)."""
    grid = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(1, -1, 4)
    return ms.Tensor(np.repeat(grid, batch, 0))


def arguments(batch=2):
    """A call of the transformer."""
    return {
        "hidden_states": tensor(0, batch, ROWS * COLUMNS, CHANNELS),
        "timestep": ms.Tensor(np.linspace(0.7, 0.4, batch), ms.float32),
        "encoder_hidden_states": tensor(1, batch, TEXT, TEXT_WIDTH),
        "txt_ids": positions(1, 1, 1, TEXT, batch=batch),
        "img_ids": positions(1, ROWS, COLUMNS, 1, batch=batch),
        "guidance": ms.Tensor(np.linspace(4, 2, batch), ms.float32),
    }


def inputs_of(given):
    """Those that are neither the latents nor their time."""
    return {name: given[name] for name in list(given)[2:]}


def test_a_cached_call_is_mindones_own_forward(transformer, cached):
    given = arguments()
    expected = mindones(transformer, **given)
    np.testing.assert_allclose(cached(**given), expected, atol=2e-5)
    of_one = {name: given[name][0] for name in ("txt_ids", "img_ids")}
    np.testing.assert_allclose(cached(**{**given, **of_one}), expected, atol=2e-5)
    assert len(cached.steps) == 1


def test_tokens_that_the_latents_are_drawn_after_do_not_move(transformer):
    given = arguments()
    velocity = CachedCalls(transformer, compiled=False)(**given, still=given["hidden_states"][:, -STILL:])
    assert not velocity[:, -STILL:].any()
    np.testing.assert_allclose(velocity[:, :-STILL], mindones(transformer, **given)[:, :-STILL], atol=2e-5)


@pytest.mark.parametrize(
    "more, named",
    [
        ({"guidance": None}, "guidance is None"),
        ({"joint_attention_kwargs": {"scale": 1.0, "colour": 2}}, "attention_kwargs scale, colour are not supported"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(transformer, more, named):
    with pytest.raises(ValueError, match=named) as caught:
        graph_inputs(transformer, **{**inputs_of(arguments()), **more})
    assert "\n" not in str(caught.value)


def test_no_kwargs_are_as_good_as_none(transformer):
    names = set(graph_inputs(transformer, **inputs_of(arguments())))
    assert set(graph_inputs(transformer, **inputs_of(arguments()), joint_attention_kwargs={})) == names


def test_the_rotary_table_is_mindones():
    """Text first, and each axis has frequencies of its own number; pictures to draw after are later frames."""
    axes, theta = (4, 6, 8, 2), 2000
    places = np.concatenate(
        [positions(1, 1, 1, 7)[0], positions(1, 3, 5, 1)[0], positions(1, 2, 2, 1)[0] + [10, 0, 0, 0]]
    )
    angles = [
        np.outer(places[:, index], 1.0 / theta ** (np.arange(0, axis, 2) / axis)) for index, axis in enumerate(axes)
    ]
    angles = np.repeat(np.concatenate(angles, 1), 2, 1)
    table = flux2.rotary_table(places.astype(np.float64).tobytes(), theta, axes)
    for got, expected in zip(table, (np.cos(angles), np.sin(angles))):
        assert got.dtype == ms.float32 and got.shape == (7 + 15 + 4, 20)
        np.testing.assert_allclose(got.asnumpy(), expected, atol=1e-6)


class Seeing(transformer_flux2.Flux2Attention):
    """Notes what it is given."""

    seen = []

    def construct(self, hidden_states, **others):
        self.seen.append(hidden_states.asnumpy())
        return super().construct(hidden_states, **others)


def test_what_teacache_looks_at_is_the_first_blocks_modulated_input(transformer, monkeypatch):
    model = transformer.cached_model
    image, temb = tensor(2, 2, 6, model.width), tensor(3, 2, model.width)
    given = model.modulation(temb, {"rotary": None, "moves": None})
    monkeypatch.setattr(model.cell(0).attn, "__class__", Seeing)
    model.block(0, image, tensor(4, 2, TEXT, model.width), given)
    np.testing.assert_allclose(model.modulated(image, given).asnumpy(), Seeing.seen.pop(), atol=1e-6)


class OwnRotary(transformer_flux2.Flux2PosEmbed):
    def construct(self, ids):
        return super().construct(ids)


class OwnTime(transformer_flux2.Flux2TimestepGuidanceEmbeddings):
    def construct(self, timestep, guidance):
        return super().construct(timestep, guidance)


class OwnModulation(transformer_flux2.Flux2Modulation):
    def construct(self, temb):
        return super().construct(temb)


OWN = {
    "pos_embed": OwnRotary,
    "time_guidance_embed": OwnTime,
    "double_stream_modulation_img": OwnModulation,
    "double_stream_modulation_txt": OwnModulation,
    "single_stream_modulation": OwnModulation,
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_the_users_own_is_named(transformer, monkeypatch, name):
    assert foreign_transformer(transformer) is None
    monkeypatch.setattr(getattr(transformer, name), "__class__", OWN[name])
    assert foreign_transformer(transformer) == f"{name} {OWN[name].__name__} has a construct of its own"


class Halved(transformer_flux2.Flux2TransformerBlock):
    def construct(self, **given):
        text, image = super().construct(**given)
        return text * 0.5, image


class Doubled(transformer_flux2.Flux2ParallelSelfAttnProcessor):
    def __call__(self, *streams, **more):
        return super().__call__(*streams, **more) * 2


@pytest.mark.parametrize("place", ["a block", "an attention processor"])
def test_what_is_the_users_own_in_a_stack_is_run(transformer, monkeypatch, place):
    given = arguments()
    before = mindones(transformer, **given)
    thing, kind = {
        "a block": (transformer.transformer_blocks[0], Halved),
        "an attention processor": (transformer.single_transformer_blocks[1].attn.processor, Doubled),
    }[place]
    monkeypatch.setattr(thing, "__class__", kind)
    expected = mindones(transformer, **given)
    assert foreign_transformer(transformer) is None and np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(CachedCalls(transformer, compiled=False)(**given), expected, atol=2e-5)


def test_teacache_is_kept_from_a_first_block_of_the_users(transformer, monkeypatch):
    assert flux2.why_not_probed(transformer, "modulated") is None
    monkeypatch.setattr(transformer.transformer_blocks[0], "__class__", Halved)
    assert "first block, Halved, is not mindone's" in flux2.why_not_probed(transformer, "modulated")
    assert flux2.why_not_probed(transformer, "residual") is None
