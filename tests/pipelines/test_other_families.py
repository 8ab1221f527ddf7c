"""QwenImagePipeline and Flux2Pipeline draw as mindone's do, and their caches decide as Flux's does."""

import json
import shutil
from dataclasses import dataclass, replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any, Dict

import further
import mindone.diffusers
import numpy as np
import pytest
from make_models import make
from mindone.diffusers import FlowMatchEulerDiscreteScheduler
from mindone.diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from PIL import Image
from small_models import (
    TEXT_WIDTH,
    flux2_transformer,
    flux2_vae,
    mindones_own,
    qwen_transformer,
    tensor,
)

import mindspore as ms

from FBCache_ms import (
    TINY_FLUX,
    CacheConfig,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    apply_cache_on_pipe,
    remove_cache_from_pipe,
)
from FBCache_ms.pipelines.flux2 import check_layers
from FBCache_ms.pipelines.whole_loop import WholeLoop
from FBCache_ms.runtime.checkpoint import check_checkpoint
from FBCache_ms.runtime.device import graph_mode

STEPS, TEXT = 10, 7


@dataclass
class Family:
    """A family's two pipelines on the same parts, what they are called with, and a threshold that reuses some steps."""

    ours: Any
    mindones: Any
    side: int
    prompt: Dict[str, Any]
    other: Dict[str, Any]
    threshold: float

    @property
    def config(self):
        return CacheConfig(self.threshold)

    def draw(self, pipe=None, config=None, seed=0, **settings):
        """Latents, unless told otherwise; by our pipeline uncached unless there is a CacheConfig."""
        common = {"num_inference_steps": STEPS, "height": self.side, "width": self.side, "output_type": "latent"}
        if isinstance(pipe or self.ours, WholeLoop):
            common["cache_config"] = config
        settings = {**common, "generator": np.random.default_rng(seed), **settings}
        if settings.get("prompt") is None:
            settings = {**self.prompt, **settings}
        result = (pipe or self.ours)(**settings)[0]
        return result.asnumpy() if isinstance(result, ms.Tensor) else result


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of(kind, pipe):
    """A pipeline of that kind with a pipeline's parts."""
    return quiet(kind(**pipe.components))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of each family's kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"flux": TINY_FLUX, **{name: make(folder / name, name) for name in ("qwenimage", "flux2")}}


def embeds(seed, batch=1, length=TEXT, kind="", mask=None):
    """A prompt's embeddings and their mask, as Qwen-Image's pipelines take them."""
    mask = np.ones((batch, length)) if mask is None else mask
    return {
        f"{kind}prompt_embeds": tensor(seed, batch, length, TEXT_WIDTH),
        f"{kind}prompt_embeds_mask": ms.Tensor(mask, ms.int64),
    }


@pytest.fixture(scope="module")
def qwen(checkpoints):
    pipe = quiet(QwenImagePipeline.from_pretrained(checkpoints["qwenimage"], transformer=qwen_transformer(4)))
    theirs = of(mindone.diffusers.QwenImagePipeline, pipe)
    return Family(pipe, theirs, 64, embeds(0), embeds(1), 0.36)


def placed(latents, ids):
    """Tokens (B, S, C) as pictures (B, C, H, W). mindone 0.5.0's own fails: mint.zeros gets a size of tensors."""
    latents, ids = latents.asnumpy(), ids.asnumpy()
    pictures = np.zeros((len(latents), latents.shape[2], *ids[0, :, 1:3].max(0) + 1), np.float32)
    for picture, tokens, place in zip(pictures, latents, ids):
        picture[:, place[:, 1], place[:, 2]] = tokens.T
    return ms.Tensor(pictures)


@pytest.fixture(scope="module")
def flux2():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = quiet(Flux2Pipeline(scheduler, flux2_vae(), None, None, flux2_transformer(2, 2)))
    theirs = of(mindone.diffusers.Flux2Pipeline, pipe)
    theirs._unpack_latents_with_ids, theirs._encode_vae_image = placed, pipe._encode_vae_image
    prompts = [{"prompt_embeds": tensor(seed, 1, TEXT, TEXT_WIDTH)} for seed in (0, 1)]
    return Family(pipe, theirs, 16, *prompts, 0.15)


@pytest.fixture(scope="module", params=["qwen", "flux2"])
def family(request):
    return request.getfixturevalue(request.param)


class Watcher:
    """A callback_on_step_end that notes what it is given, and may put something in its place."""

    def __init__(self, change=None):
        self.change, self.seen = change, []

    def __call__(self, pipe, step, timestep, tensors):
        given = {name: value.asnumpy() for name, value in tensors.items()}
        self.seen.append((step, float(timestep), float(pipe.current_timestep), pipe.num_timesteps, given))
        return self.change(pipe, step, tensors) if self.change else {}

    def settings(self):
        """A call's, that hand it everything."""
        return {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def assert_seen_alike(ours, theirs):
    """Two watchers were given the same."""
    assert len(ours.seen) == len(theirs.seen)
    for got, expected in zip(ours.seen, theirs.seen):
        np.testing.assert_allclose(got[:4], expected[:4], rtol=1e-6)
        assert got[4].keys() == expected[4].keys()
        for name, values in expected[4].items():
            np.testing.assert_allclose(got[4][name], values, atol=1e-4)


def drawn_by_mindone(family, **settings):
    with mindones_own(family.ours.transformer):
        return family.draw(family.mindones, **{"num_inference_steps": 3, **settings})


def test_uncached_it_draws_what_mindones_pipeline_does(family):
    watchers = Watcher(), Watcher()
    pictures = drawn_by_mindone(family, output_type="np", **watchers[1].settings())
    got = family.draw(num_inference_steps=3, output_type="np", **watchers[0].settings())
    assert got.shape == pictures.shape == (1, family.side, family.side, 3) and pictures.std() > 0.01
    np.testing.assert_allclose(got, pictures, atol=1e-4)
    assert_seen_alike(*watchers)


def interfering(family):
    """A change of the latents after the first step, of the prompt after the second."""

    def change(pipe, step, tensors):
        if step == 0:
            return {"latents": tensors["latents"] * 0.5}
        return {"prompt_embeds": family.other["prompt_embeds"]} if step == 1 else {}

    return change


def test_a_callback_may_replace_what_mindones_may(family):
    watchers = [Watcher(interfering(family)) for _ in range(2)]
    expected = drawn_by_mindone(family, **watchers[1].settings())
    np.testing.assert_allclose(family.draw(num_inference_steps=3, **watchers[0].settings()), expected, atol=1e-4)
    assert_seen_alike(*watchers)
    assert np.abs(family.draw(num_inference_steps=3) - expected).max() > 0.05


def test_pieces_are_the_whole_bit_for_bit(family):
    whole, watcher = family.draw(config=family.config), Watcher()
    stats = family.ours.cache_stats
    np.testing.assert_array_equal(family.draw(config=family.config, **watcher.settings()), whole)
    assert family.ours.cache_stats == stats and stats.cached_steps and stats.uncond is None
    assert [seen[0] for seen in watcher.seen] == list(range(STEPS))
    assert family.ours.current_timestep is None


def test_a_callback_may_interrupt(family):
    def interrupt(pipe, step, tensors):
        pipe._interrupt = step == 3
        return {}

    watcher = Watcher(interrupt)
    latents = family.draw(config=family.config, **watcher.settings())
    assert len(watcher.seen) == len(family.ours.cache_stats.reused) == 4
    np.testing.assert_array_equal(latents, watcher.seen[-1][4]["latents"])


def test_one_compilation_serves_thresholds_prompts_seeds_and_step_counts(family):
    pipe, counts = family.ours, []
    family.draw()
    compilations = pipe.graph_compilations
    for index, factor in enumerate((0, 0.7, 1, 1.4, 2)):
        settings = {"num_inference_steps": STEPS + index, "seed": index, **(family.other if index % 2 else {})}
        settings["config"] = CacheConfig(factor * family.threshold, warmup_steps=index % 2)
        first, again = (family.draw(**settings) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert len(pipe.cache_stats.reused) == STEPS + index
        counts.append(len(pipe.cache_stats.cached_steps))
    assert pipe.graph_compilations == compilations
    assert counts[0] == 0 and counts == sorted(counts) and len(set(counts)) > 3


def test_prompts_of_other_lengths_share_a_graph(qwen):
    qwen.draw()
    compilations, drawn = qwen.ours.graph_compilations, []
    for length in (1, 30, 64):
        text = embeds(2, length=64)["prompt_embeds"][:, :length]
        drawn.append(qwen.draw(prompt_embeds=text, prompt_embeds_mask=ms.Tensor(np.ones((1, length)), ms.int64)))
    assert qwen.ours.graph_compilations == compilations
    assert min(np.abs(drawn[index] - drawn[index - 1]).max() for index in range(3)) > 0.01


NEGATIVE = embeds(3, length=4, kind="negative_")


def test_true_cfg_is_mindones_with_prompts_of_different_lengths(qwen):
    settings = {**NEGATIVE, "true_cfg_scale": 3.0}
    expected = drawn_by_mindone(qwen, **settings)
    np.testing.assert_allclose(qwen.draw(num_inference_steps=3, **settings), expected, atol=1e-4)
    qwen.draw(config=qwen.config, **settings)
    stats = qwen.ours.cache_stats
    assert stats.cached_steps and stats.uncond.cached_steps and len(stats.reused) == len(stats.uncond.reused) == STEPS
    assert stats.residual_diffs[1:] != stats.uncond.residual_diffs[1:] and 0 < stats.skipped < 1
    compilations = qwen.ours.graph_compilations
    qwen.draw(config=qwen.config, **embeds(4, length=20, kind="negative_"), true_cfg_scale=1.5)
    assert qwen.ours.graph_compilations == compilations
    qwen.draw(config=qwen.config, **NEGATIVE, true_cfg_scale=1.0)
    assert qwen.ours.cache_stats.uncond is None


@pytest.mark.parametrize("lengths", [(70, 4), (4, 70)])
def test_prompts_of_a_guidance_may_need_different_buckets(qwen, monkeypatch, lengths):
    """Operator by operator, so that nothing is compiled."""
    texts = {**embeds(0, length=lengths[0]), **embeds(1, length=lengths[1], kind="negative_")}
    settings = {**texts, "true_cfg_scale": 3.0, "num_inference_steps": 1}
    expected = drawn_by_mindone(qwen, **settings)
    monkeypatch.setattr(qwen.ours, "use_graph_mode", False)
    np.testing.assert_allclose(qwen.draw(**settings), expected, atol=1e-4)


def test_requests_of_different_sizes_do_not_see_each_other(family):
    def break_off(pipe, step, tensors):
        pipe._interrupt = step == 2
        return {}

    def answers():
        for width in (family.side, family.side * 3 // 2):
            latents = family.draw(config=family.config, width=width)
            assert family.ours.cache_stats.cached_steps
            yield latents, family.ours.cache_stats
            family.draw(config=family.config, **Watcher(break_off).settings(), **family.other, width=width)

    first, again = list(answers()), list(answers())
    for (latents, stats), (latents_again, stats_again) in zip(first, again):
        np.testing.assert_array_equal(latents_again, latents)
        assert stats_again == stats
    assert first[0][0].size * 3 == first[1][0].size * 2


def test_pictures_of_a_batch_are_each_alone(family):
    """Two prompts with a generator each; one prompt twice with latents that are given."""
    prompts = {name: ms.mint.cat((value, family.other[name])) for name, value in family.prompt.items()}
    pair = family.draw(**prompts, generator=[np.random.default_rng(seed) for seed in (5, 6)])
    alone = [family.draw(seed=5), family.draw(seed=6, **family.other)]
    np.testing.assert_allclose(pair, np.concatenate(alone), atol=1e-4)
    shape = family.ours.latents_shape(Given(pictures=2, height=family.side, width=family.side))
    latents = tensor(7, *shape)
    pair = family.draw(num_images_per_prompt=2, latents=latents)
    alone = [family.draw(latents=latents[index : index + 1]) for index in range(2)]
    np.testing.assert_allclose(pair, np.concatenate(alone), atol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


class Given:
    """Some of a call's arguments."""

    def __init__(self, **arguments):
        self.__dict__.update(arguments)


def test_each_picture_of_a_prompt_has_its_embeddings_and_its_mask(qwen):
    given = Given(pictures=4, max_sequence_length=512, prompt=None)
    given.__dict__.update(embeds(0, batch=2, mask=np.arange(TEXT) < [[7], [4]]))
    encoded = qwen.ours.encode(given, "")
    order = [0, 0, 1, 1]
    for name, source in (
        ("encoder_hidden_states", "prompt_embeds"),
        ("encoder_hidden_states_mask", "prompt_embeds_mask"),
    ):
        np.testing.assert_array_equal(encoded[name].asnumpy(), getattr(given, source).asnumpy()[order])


def test_prompts_of_a_list_are_each_alone_whatever_their_lengths(qwen):
    prompts = ["a red circle", "a huge purple diamond in the top left, before a dark and noisy background"]
    generators = [np.random.default_rng(seed) for seed in (5, 6)]
    pair = qwen.draw(prompt=prompts, generator=generators)
    alone = [qwen.draw(prompt=prompt, seed=5 + index) for index, prompt in enumerate(prompts)]
    np.testing.assert_allclose(pair, np.concatenate(alone), atol=1e-4)
    given = qwen.ours.encode_prompt(prompts[0])
    np.testing.assert_array_equal(qwen.draw(seed=5, prompt_embeds=given[0], prompt_embeds_mask=given[1]), alone[0])


def picture(seed, width, height):
    """Coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.slow
def test_flux2_draws_after_pictures_as_mindones(flux2):
    """The first one says the size of what is drawn."""
    settings = {"image": [picture(0, 66, 70), picture(1, 64, 64)], "height": None, "width": None, "output_type": "np"}
    expected = drawn_by_mindone(flux2, **settings)
    got = flux2.draw(num_inference_steps=3, **settings)
    assert got.shape == (1, 68, 64, 3)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    settings["image"] = [settings["image"][0], picture(2, 64, 64)]
    assert np.abs(flux2.draw(num_inference_steps=3, **settings) - got).max() > 0.01
    flux2.draw(**settings, config=flux2.config)
    assert flux2.ours.cache_stats.cached_steps


def test_results_come_as_mindones(family):
    pictures = family.draw(output_type="pil")
    assert isinstance(pictures[0], Image.Image) and pictures[0].size == (family.side, family.side)
    array = family.draw(output_type="np")
    np.testing.assert_array_equal(np.asarray(pictures[0]), np.round(array[0] * 255).astype(np.uint8))
    settings = {**family.prompt, "height": family.side, "width": family.side, "num_inference_steps": 2}
    whole, plain = (family.ours(**settings, output_type="latent", return_dict=each) for each in (True, False))
    assert type(whole) is family.ours.OUTPUT and type(plain) is tuple and len(plain) == 1
    assert whole.images.shape == plain[0].shape


def test_a_call_may_have_a_cache_of_its_own(family, monkeypatch):
    monkeypatch.setattr(family.ours, "cache_config", family.config)
    settings = {**family.prompt, "height": family.side, "width": family.side, "num_inference_steps": STEPS}

    def reused(**more):
        family.ours(**settings, generator=np.random.default_rng(0), output_type="latent", **more)
        return family.ours.cache_stats.cached_steps

    before = reused()
    assert before and reused(cache_config=CacheConfig(1.0)) == list(range(1, STEPS))
    assert reused(cache_config=None) == [] and reused() == before


EVERY = list(range(1, STEPS))
LIMITS = [
    ({"warmup_steps": 4}, EVERY[3:]),
    ({"max_cached_steps": 2}, [1, 2]),
    ({"max_consecutive_cache_hits": 2}, [1, 2, 4, 5, 7, 8]),
    ({"start": 0.3, "end": 0.6}, [3, 4, 5, 6]),
    ({"steps_computation_mask": (1, 1, 0, 1, 0, 0, 1, 1, 1, 0)}, [2, 4, 5, 9]),
]


@pytest.mark.parametrize("limits, cached", LIMITS, ids=lambda value: str(next(iter(value))))
def test_limits_windows_and_masks_mean_what_they_say(family, limits, cached):
    family.draw(config=CacheConfig(1.0, **limits))
    assert family.ours.cache_stats.cached_steps == cached


RULES = {
    "order 1": lambda threshold: CacheConfig(threshold, taylorseer_derivative=1),
    "F2B1 and order 2": lambda threshold: CacheConfig(
        threshold, Fn_compute_blocks=2, Bn_compute_blocks=1, taylorseer_derivative=2
    ),
    "static": lambda threshold: CacheConfig(gate="static", schedule="fora", schedule_interval=3),
    "easycache": lambda threshold: CacheConfig(gate="easycache", easycache_threshold=threshold, warmup_steps=3),
}


@pytest.mark.parametrize("rule", further.after(1, RULES))
def test_rules_and_forecasts_run_and_reuse(family, rule):
    config, plain = RULES[rule](family.threshold), family.draw()
    got = family.draw(config=config)
    stats, compilations = family.ours.cache_stats, family.ours.graph_compilations
    assert 0 < len(stats.cached_steps) < STEPS and not stats.reused[0] and 0 < stats.skipped < 1
    assert 1e-4 < np.abs(got - plain).mean() / np.abs(plain).mean() < 0.3
    np.testing.assert_allclose(family.draw(config=config.switched_off()), plain, atol=1e-4)
    assert family.ours.graph_compilations == compilations
    if rule == "static":
        assert stats.computed_steps == [0, 3, 6, 9]


STACKS = CacheConfig(0.15, span="stacks", residual_diff_threshold_single=0.1)
SINGLE = CacheConfig(0.15, span="single")


@pytest.mark.parametrize("config", [STACKS, SINGLE], ids=["stacks", "single"])
def test_a_span_of_a_stack_is_one_of_flux2(flux2, config):
    plain, got = flux2.draw(), flux2.draw(config=config)
    gates = flux2.ours.cache_stats.gates
    assert [gate.name for gate in gates] == (["double", "single"] if config is STACKS else ["fbcache"])
    assert all(gate.cached_steps and gate.computed_steps for gate in gates)
    assert 1e-4 < np.abs(got - plain).mean() / np.abs(plain).mean() < 0.3
    np.testing.assert_allclose(flux2.draw(config=config.switched_off()), plain, atol=1e-4)


@pytest.mark.parametrize("config", [STACKS, SINGLE], ids=["stacks", "single"])
def test_a_span_of_a_stack_is_refused_by_name_for_qwen_image(qwen, config):
    named = f"span '{config.span}' finds nothing to skip in 4 double and 0 single blocks"
    with pytest.raises(ValueError, match=named):
        qwen.draw(config=config)
    with pytest.raises(ValueError, match=named):
        apply_cache_on_pipe(qwen.mindones, config)


def test_operator_by_operator_gives_the_graphs_picture(family, monkeypatch):
    config = CacheConfig(1.0, warmup_steps=2, max_consecutive_cache_hits=1)
    expected = family.draw(config=config, num_inference_steps=5)
    stats = family.ours.cache_stats
    monkeypatch.setattr(family.ours, "use_graph_mode", False)
    np.testing.assert_allclose(family.draw(config=config, num_inference_steps=5), expected, atol=1e-4)
    assert family.ours.cache_stats.cached_steps == stats.cached_steps == [2, 4]


def test_our_own_pipelines_just_take_a_config(family):
    pipe = of(type(family.ours), family.ours)
    assert apply_cache_on_pipe(pipe, family.config) is pipe and pipe.cache_config == family.config
    assert pipe.transformer is family.ours.transformer
    remove_cache_from_pipe(pipe)
    assert pipe.cache_config is None and pipe.transformer is family.ours.transformer


def test_a_pipeline_may_be_made_of_mindones_and_the_other_way_round(family):
    kind = type(family.ours)
    apply_cache_on_pipe(family.mindones, family.config)
    ours = kind.from_pipe(family.mindones)
    assert ours.cache_config == family.config and ours.transformer is family.ours.transformer
    remove_cache_from_pipe(family.mindones)
    theirs = type(family.mindones).from_pipe(family.ours)
    assert type(theirs) is type(family.mindones) and theirs.transformer is family.ours.transformer


class Doubled(QwenDoubleStreamAttnProcessor2_0):
    """An attention processor of the user's."""

    def __call__(self, *streams, **more):
        image, text = super().__call__(*streams, **more)
        return image * 2, text


def test_what_is_the_users_own_runs_uncached_with_a_warning(qwen, monkeypatch, caplog):
    few = {"num_inference_steps": 2}
    cached = qwen.draw(**few)
    monkeypatch.setattr(qwen.ours.transformer.transformer_blocks[1].attn.processor, "__class__", Doubled)
    with graph_mode(False):
        expected = qwen.draw(qwen.mindones, **few)
    got = qwen.draw(config=qwen.config, **few)
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got - cached).max() > 0.01 and qwen.ours.cache_stats is None
    assert "block 1 has the attention processor Doubled: this call runs without the cache" in caplog.text
    with pytest.raises(ValueError, match="attention processor Doubled"):
        apply_cache_on_pipe(qwen.mindones)


class Halved(FlowMatchEulerDiscreteScheduler):
    """A scheduler of the user's."""

    def step(self, model_output, *more, **named):
        return super().step(model_output * 0.5, *more, **named)


def test_with_a_scheduler_of_the_users_it_draws_as_mindones(family, monkeypatch, caplog):
    few = {"num_inference_steps": 2, "output_type": "np"}
    for pipe in (family.ours, family.mindones):
        monkeypatch.setitem(pipe.__dict__, "scheduler", Halved.from_config(pipe.scheduler.config))
    with graph_mode(False):
        expected = family.draw(family.mindones, **few)
    np.testing.assert_allclose(family.draw(config=family.config, **few), expected, atol=1e-6)
    assert "scheduler Halved has a step of its own: this call runs without the cache" in caplog.text


def lora(*layers):
    """A random LoRA's state dict for layers of 64 outputs, {name: inputs}."""
    rng, tensors = np.random.default_rng(0), {}
    for layer, inputs in layers:
        for part, shape in {"lora_A": (4, inputs), "lora_B": (64, 4)}.items():
            name = f"transformer.{layer}.{part}.weight"
            tensors[name] = ms.Parameter(ms.Tensor(rng.normal(0, 0.3, shape), ms.float32), name=name)
    return tensors


LORAS = {
    "qwen": lora(("transformer_blocks.0.attn.to_q", 64), ("transformer_blocks.1.img_mlp.net.2", 256)),
    "flux2": lora(("transformer_blocks.0.attn.to_q", 64), ("single_transformer_blocks.0.attn.to_out", 256)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
def test_a_lora_acts_at_its_scale_until_it_is_unloaded(name, request):
    family = request.getfixturevalue(name)
    transformer = qwen_transformer(2) if name == "qwen" else flux2_transformer(1, 1)
    pipes = [
        quiet(type(pipe)(**{**pipe.components, "transformer": transformer})) for pipe in (family.ours, family.mindones)
    ]
    small = replace(family, ours=pipes[0], mindones=pipes[1])

    def draw(**settings):
        return small.draw(num_inference_steps=3, **settings)

    plain = draw()
    pipes[0].load_lora_weights(dict(LORAS[name]), adapter_name="one")
    whole = draw()
    np.testing.assert_allclose(whole, drawn_by_mindone(small), atol=1e-4)
    half = draw(attention_kwargs={"scale": 0.5})
    np.testing.assert_array_equal(draw(), whole)
    pipes[0].set_adapters("one", 0.5)
    np.testing.assert_allclose(half, drawn_by_mindone(small), atol=1e-4)
    assert min(np.abs(half - other).max() for other in (plain, whole)) > 0.05
    pipes[0].unload_lora_weights()
    np.testing.assert_array_equal(draw(), plain)
    assert pipes[0].graph_compilations == 4


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


KINDS = {
    "flux": (FluxPipeline, "FluxTransformer2DModel"),
    "qwenimage": (QwenImagePipeline, "QwenImageTransformer2DModel"),
    "flux2": (Flux2Pipeline, "Flux2Transformer2DModel"),
}


@pytest.mark.parametrize("asked, given", permutations(KINDS, 2))
def test_a_checkpoint_of_another_family_is_named_before_anything_is_loaded(checkpoints, monkeypatch, asked, given):
    monkeypatch.setattr(mindone.diffusers.DiffusionPipeline, "from_pretrained", None)
    (ours, wanted), (theirs, there), folder = KINDS[asked], KINDS[given], checkpoints[given]
    with pytest.raises(OSError) as error:
        ours.from_pretrained(folder)
    said = f"checkpoint {folder} has a {there}, for {theirs.__name__}; {ours.__name__} takes a {wanted}"
    assert one_line(error) == said


@pytest.fixture
def copies(checkpoints, tmp_path):
    """Gives a copy of a checkpoint that a test may change."""
    return lambda name: shutil.copytree(checkpoints[name], tmp_path / name)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_transformer_that_no_family_has_is_named(copies):
    copy = copies("qwenimage")
    rewrite(copy / "model_index.json", transformer=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(OSError, match="has a WanTransformer3DModel") as error:
        QwenImagePipeline.from_pretrained(copy)
    assert one_line(error)
    with pytest.raises(OSError, match="WanTransformer3DModel; the cache is for mindone's FluxTransformer2D") as error:
        check_checkpoint(copy)
    assert one_line(error)


@pytest.mark.parametrize(
    "name, changes, named",
    [
        ("qwenimage", {"num_layers": 7}, "transformer: its weights lack transformer_blocks.6.* and .* more"),
        ("qwenimage", {"num_layers": 5}, "its weights have, but its config does not, transformer_blocks.5"),
        ("qwenimage", {"num_attention_heads": 4}, "cannot be loaded"),
        ("flux2", {"num_single_layers": 6}, "transformer: its weights lack single_transformer_blocks.5.* and .* more"),
        ("flux2", {"joint_attention_dim": 8}, "cannot be loaded"),
    ],
)
def test_weights_that_do_not_fit_are_named(copies, name, changes, named):
    copy = copies(name)
    rewrite(copy / "transformer" / "config.json", **changes)
    with pytest.raises(ValueError, match=named) as error:
        KINDS[name][0].from_pretrained(copy, vae=None, text_encoder=None, tokenizer=None)
    assert one_line(error)


@pytest.mark.parametrize(
    "name, file",
    [
        ("qwenimage", "tokenizer/merges.txt"),
        ("qwenimage", "text_encoder/model.safetensors"),
        ("flux2", "tokenizer/tokenizer.json"),
        ("flux2", "vae/config.json"),
    ],
)
def test_a_missing_file_is_named(copies, name, file):
    copy = copies(name)
    (copy / file).unlink()
    with pytest.raises(OSError, match=file.split("/")[0]) as error:
        KINDS[name][0].from_pretrained(copy)
    assert one_line(error)


SHAPES = {
    "qwen": [
        ({"latents": tensor(0, 1, 16, 16)}, "latents must be .* of 1 x 16 x 64, not .* 1 x 16 x 16"),
        ({"latents": tensor(0, 1, 1, 16, 8, 8)}, "latents must be .* of 1 x 16 x 64"),
        ({"prompt_embeds": tensor(0, 1, TEXT, 32)}, "prompt_embeds must be .* of 1 x any x 64"),
        ({"prompt_embeds_mask": ms.Tensor(np.ones((1, 6)))}, "prompt_embeds_mask must be .* of 1 x 7, not .* 1 x 6"),
        (
            {"prompt_embeds_mask": ms.Tensor(np.ones((1, TEXT, 1)))},
            "prompt_embeds_mask must be .* of 1 x 7, not .* 1 x 7 x 1",
        ),
        ({"prompt_embeds_mask": ms.Tensor(np.ones((2, TEXT)))}, "prompt_embeds_mask are for 2 prompts"),
        ({"prompt_embeds_mask": None}, "prompt_embeds_mask. also have to be passed"),
        ({**embeds(0, length=4, kind="negative_"), "negative_prompt_embeds_mask": None}, "negative_prompt_embeds_mask"),
        ({"height": 72}, "height must be a positive multiple of 16"),
        ({"attention_kwargs": {"colour": 1}, "config": CacheConfig()}, "attention_kwargs colour are not supported"),
        ({"attention_kwargs": {"colour": 1}, "config": None}, "attention_kwargs colour are not supported"),
        ({"sigmas": []}, "sigmas must be 1 to 1000 numbers, not 0"),
        ({"max_sequence_length": 2000}, "cannot be greater than 1024"),
    ],
    "flux2": [
        ({"latents": tensor(0, 1, 16, 16)}, "latents must be .* of 1 x 16 x 4 x 4, not .* 1 x 16 x 16"),
        ({"prompt_embeds": tensor(0, 1, TEXT, 32)}, "prompt_embeds must be .* of 1 x any x 64"),
        ({"width": 18}, "width must be a positive multiple of 4"),
        ({"guidance_scale": None}, "guidance_scale"),
        ({"attention_kwargs": {"colour": 1}, "config": CacheConfig()}, "attention_kwargs colour are not supported"),
        ({"attention_kwargs": {"colour": 1}, "config": None}, "attention_kwargs colour are not supported"),
        ({"prompt": "a red circle"}, "text_encoder is None, so prompt cannot be read; give prompt_embeds"),
    ],
}


@pytest.mark.parametrize("name, settings, named", [(name, *case) for name, cases in SHAPES.items() for case in cases])
def test_what_cannot_be_drawn_is_refused_before_anything_runs(name, settings, named, request, monkeypatch):
    family = request.getfixturevalue(name)
    monkeypatch.setattr(family.ours, "_denoise", None)
    with pytest.raises(ValueError, match=named) as error:
        family.draw(**settings)
    assert one_line(error)


def test_an_image_cannot_be_read_without_an_autoencoder(flux2, monkeypatch):
    monkeypatch.setitem(vars(flux2.ours), "vae", None)
    with pytest.raises(ValueError, match="vae is None, so image cannot be read"):
        flux2.draw(image=Image.new("RGB", (64, 64)), output_type="latent")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"true_cfg_scale": 3.0}, "true_cfg_scale 3.0 is ignored: there is no negative_prompt"),
        ({**NEGATIVE, "true_cfg_scale": 1.0}, "negative_prompt is ignored: true_cfg_scale is 1.0, not above 1"),
        ({"guidance_scale": 2.0, "true_cfg_scale": 1.0}, "guidance_scale 2.0 is ignored: the model takes none"),
        ({"true_cfg_scale": 1.0}, None),
    ],
)
def test_half_of_a_guidance_is_ignored_with_a_warning(qwen, caplog, settings, said):
    expected = qwen.draw(true_cfg_scale=1.0)
    caplog.clear()
    np.testing.assert_array_equal(qwen.draw(**settings), expected)
    assert said in caplog.text if said else not caplog.text


def test_layers_that_a_text_encoder_has_not_are_refused():
    encoder = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=4)))
    check_layers(encoder, (0, 2, 4))
    with pytest.raises(ValueError, match=r"text_encoder_out_layers must be 0 to 4, .* not \(10, 20, 30\)"):
        check_layers(encoder, (10, 20, 30))
