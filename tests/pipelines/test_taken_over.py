"""What the loop and the cached step take over is mindone's; what is the user's is run as it is, or refused."""

import copy
import threading
from types import MethodType, SimpleNamespace

import mindone.diffusers
import numpy as np
import pytest
from mindone.diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from narrow import make_narrow
from tqdm import tqdm

import mindspore as ms

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe, remove_cache_from_pipe
from FBCache_ms.models import foreign_transformer
from FBCache_ms.models.mindones import foreign_scheduler
from FBCache_ms.pipelines import whole_loop
from FBCache_ms.pipelines.cached_transformer import adapters_scaled, turn
from FBCache_ms.pipelines.whole_loop import is_watched
from FBCache_ms.runtime import kept_graphs
from FBCache_ms.runtime.device import graph_mode

PROMPT, STEPS = "a big red circle in the center, blue background", 4
CONFIG = CacheConfig(0.99, warmup_steps=1)


def draw(pipe, **settings):
    """The latents of a short generation, as an array."""
    settings = {"num_inference_steps": STEPS, "height": 64, "width": 64, "max_sequence_length": 32, **settings}
    return pipe(PROMPT, output_type="latent", generator=np.random.default_rng(0), **settings)[0].asnumpy()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Ours and mindone's pipeline with the same parts."""
    pipe = FluxPipeline.from_pretrained(str(make_narrow(tmp_path_factory.mktemp("checkpoint") / "narrow", 2, 2)))
    return {FluxPipeline: pipe, mindone.diffusers.FluxPipeline: of(mindone.diffusers.FluxPipeline, pipe)}


def of(kind, pipe):
    """A pipeline of that kind with a pipeline's parts."""
    other = kind(**{name: part for name, part in pipe.components.items() if part is not None})
    other.set_progress_bar_config(disable=True)
    return other


def fresh(pipe):
    """The pipeline with a scheduler of its own, and no bar."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


@pytest.fixture
def pipe(loaded):
    return fresh(loaded[FluxPipeline])


@pytest.fixture
def mindone_pipe(loaded):
    """mindone's own pipeline, in GRAPH_MODE."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield fresh(loaded[mindone.diffusers.FluxPipeline])
    ms.set_context(mode=mode)


class Damped(FlowMatchEulerDiscreteScheduler):
    """Half of every step."""

    def step(self, model_output, timestep, sample, **rest):
        return super().step(model_output * 0.5, timestep, sample, **rest)


def damp(scheduler):
    """The same by an attribute."""
    step = scheduler.step
    scheduler.step = lambda model_output, *rest, **named: step(model_output * 0.5, *rest, **named)
    return scheduler


@pytest.mark.parametrize("when", ["before", "after a call", "by an attribute"])
def test_a_step_of_the_users_scheduler_is_run(pipe, mindone_pipe, when, caplog):
    if when == "after a call":
        draw(pipe)
    for each in (pipe, mindone_pipe):
        each.scheduler = (
            damp(each.scheduler) if when == "by an attribute" else Damped.from_config(each.scheduler.config)
        )
    np.testing.assert_allclose(draw(pipe), draw(mindone_pipe), atol=1e-5)
    assert pipe.cache_stats is None and "has a step of its own" in caplog.text


def test_an_applied_cache_runs_the_users_scheduler(pipe, mindone_pipe):
    for each in (pipe, mindone_pipe):
        each.scheduler = Damped.from_config(each.scheduler.config)
    apply_cache_on_pipe(mindone_pipe, CacheConfig(0))
    np.testing.assert_allclose(draw(mindone_pipe), draw(pipe), atol=1e-5)
    remove_cache_from_pipe(mindone_pipe)


def test_a_transformer_with_its_own_construct_is_run(pipe, mindone_pipe, caplog):
    transformer = pipe.transformer

    def halved(self, **inputs):
        return (FluxTransformer2DModel.construct(self, **inputs)[0] * 0.5,)

    plain = draw(pipe, cache_config=None)
    transformer.construct = MethodType(halved, transformer)
    try:
        pipe.use_graph_mode = False
        ours = draw(pipe)
        ms.set_context(mode=ms.PYNATIVE_MODE)
        np.testing.assert_array_equal(ours, draw(mindone_pipe))
        assert np.abs(ours - plain).max() > 0.1 and "has a construct of its own" in caplog.text
        with pytest.raises(ValueError, match="has a construct of its own"):
            apply_cache_on_pipe(mindone_pipe, CONFIG)
    finally:
        del transformer.construct
        pipe.use_graph_mode = True
    np.testing.assert_array_equal(draw(pipe, cache_config=None), plain)


def test_a_construct_put_on_behind_an_applied_cache_is_run(mindone_pipe, caplog):
    apply_cache_on_pipe(mindone_pipe, CONFIG)
    transformer, seen = mindone_pipe.transformer.original, []

    def spied(self, *inputs, **named):
        seen.append(1)
        return FluxTransformer2DModel.construct(self, *inputs, **named)

    ms.set_context(mode=ms.PYNATIVE_MODE)
    mindone_pipe.transformer.construct = MethodType(spied, transformer)
    try:
        draw(mindone_pipe)
    finally:
        del transformer.construct
        remove_cache_from_pipe(mindone_pipe)
    assert len(seen) == STEPS and "without the cache" in caplog.text


@pytest.mark.parametrize("part", ["transformer", "time_text_embed", "hook"])
def test_a_transformer_is_mindones_only_as_a_whole(pipe, part):
    transformer = pipe.transformer

    class Mine(type(transformer.time_text_embed)):
        def construct(self, *inputs):
            return super().construct(*inputs)

    class MyTransformer(FluxTransformer2DModel):
        def construct(self, *inputs):
            return super().construct(*inputs)

    assert foreign_transformer(transformer) is None
    if part == "transformer":
        transformer = SimpleNamespace()
        assert "Unsupported model SimpleNamespace" in foreign_transformer(transformer)
        config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
        mine = MyTransformer(**{**config, "num_layers": 1, "num_single_layers": 1})
        assert foreign_transformer(mine) == "transformer MyTransformer has a construct of its own"
    elif part == "hook":
        handle = transformer.register_forward_hook(lambda *seen: None)
        assert "forward hooks" in foreign_transformer(transformer)
        handle.remove()
        assert foreign_transformer(transformer) is None
    else:
        plain = transformer.time_text_embed
        width, pooled = transformer.inner_dim, transformer.config.pooled_projection_dim
        transformer.time_text_embed = Mine(width, pooled)
        assert "time_text_embed Mine" in foreign_transformer(transformer)
        transformer.time_text_embed = plain


def test_what_is_no_scheduler_of_mindones_is_named():
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert "samples stochastically" in foreign_scheduler(stochastic)
    assert "SimpleNamespace is no FlowMatch" in foreign_scheduler(SimpleNamespace())
    assert foreign_scheduler(FlowMatchEulerDiscreteScheduler()) is None


@pytest.mark.slow
def test_a_callback_sees_the_pipeline_as_it_is_in_mindone(pipe, mindone_pipe):
    def watch(pipe, step, timestep, tensors):
        parts = type(pipe.transformer).__name__, type(pipe.scheduler).__name__, type(pipe.vae).__name__
        position = pipe.scheduler.step_index, float(pipe._current_timestep), float(timestep), pipe.num_timesteps
        seen.append((step, *parts, *position, timestep.shape, pipe.guidance_scale, pipe.joint_attention_kwargs))
        return tensors

    traces = []
    for each in (pipe, mindone_pipe):
        seen = []
        draw(each, callback_on_step_end=watch)
        traces.append(seen)
    assert traces[0] == traces[1] and len(traces[0]) == STEPS
    assert pipe.scheduler.step_index == mindone_pipe.scheduler.step_index == STEPS


def test_noise_levels_that_a_callback_changes_are_the_next_steps(pipe, mindone_pipe):
    def later(pipe, step, timestep, tensors):
        if step == 1:
            pipe.scheduler.sigmas = ms.Tensor(pipe.scheduler.sigmas.asnumpy() * 0.9)
        return {}

    ours, theirs = (draw(each, callback_on_step_end=later) for each in (pipe, mindone_pipe))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda pipe: setattr(pipe, "scheduler", Damped.from_config(pipe.scheduler.config)), "scheduler"),
        (lambda pipe: pipe.__dict__.update(scheduler=copy.copy(pipe.scheduler)), "another scheduler"),
    ],
)
def test_what_a_callback_cannot_change_is_refused(pipe, change, named):
    def callback(pipe, step, timestep, tensors):
        change(pipe)
        return {}

    with pytest.raises(ValueError, match=f"callback_on_step_end .*{named}"):
        draw(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize("returned", [None, {"latents": 1}, {"latents": ms.Tensor(np.zeros((1, 3, 16)), ms.float32)}])
def test_what_a_callback_returns_is_checked(pipe, returned):
    with pytest.raises(ValueError, match="callback_on_step_end"):
        draw(pipe, callback_on_step_end=lambda *told: returned)


def test_a_pipeline_is_not_called_by_its_own_callback(pipe):
    with pytest.raises(ValueError, match="FluxPipeline is drawing"):
        draw(pipe, callback_on_step_end=lambda pipe, *told: draw(pipe))


def test_a_progress_bar_of_the_users_moves_each_step(pipe, monkeypatch):
    bars = []

    class Bar(tqdm):
        moves = 0

        def update(self, *by):
            assert not by
            self.moves += 1

    def bar(iterable=None, total=None):
        bars.append(Bar(total=total, disable=True))
        return bars[-1]

    assert not is_watched(pipe)
    monkeypatch.setitem(pipe.__dict__, "progress_bar", bar)
    draw(pipe)
    assert len(bars) == 1 and bars[0].total == bars[0].moves == STEPS
    assert vars(pipe)["progress_bar"] is bar and is_watched(pipe)


def test_a_watched_loop_runs_in_pieces_of_about_equal_time(pipe, monkeypatch):
    pieces = []
    monkeypatch.setattr(whole_loop, "PIECE_SECONDS", 0.5)
    monkeypatch.setattr(pipe, "progress_bar", lambda total: tqdm(total=total, disable=True), raising=False)
    plain = draw(pipe, num_inference_steps=10)
    loop = pipe._loops.last

    def run(inputs, latents, start, stop, wait=True):
        latents = type(loop).run(loop, inputs, latents, start, stop, wait)
        loop.step_seconds = seconds
        pieces.append(stop - start)
        return latents

    monkeypatch.setitem(loop.__dict__, "run", run)
    for seconds, expected in ((0.1, [5, 5]), (0.2, [5, 3, 2]), (3.0, [3] + [1] * 7), (0.001, [1, 9])):
        pieces.clear()
        np.testing.assert_array_equal(draw(pipe, num_inference_steps=10), plain)
        # The first of these drawings goes by what a step took.
        if seconds != 0.1:
            assert pieces == expected
        loop.step_seconds = seconds


def adapter():
    """A LoRA of rank 4 on the first block's queries."""
    rng, state = np.random.default_rng(0), {}
    for part, shape in {"lora_A": (4, 128), "lora_B": (128, 4)}.items():
        name = f"transformer.transformer_blocks.0.attn.to_q.{part}.weight"
        state[name] = ms.Parameter(ms.Tensor(rng.normal(0, 1, shape), ms.float32), name=name)
    return state


@pytest.fixture
def adapted(pipe):
    pipe.load_lora_weights(adapter(), adapter_name="mine")
    yield pipe
    pipe.unload_lora_weights()


def test_an_adapters_scale_is_taken_back_whatever_happens(adapted):
    before, kwargs = draw(adapted), {"scale": 0.5}

    def stop(*told):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(adapted, joint_attention_kwargs=kwargs, callback_on_step_end=stop)
    assert kwargs == {"scale": 0.5}
    np.testing.assert_array_equal(draw(adapted), before)
    assert np.abs(draw(adapted, joint_attention_kwargs=kwargs) - before).max() > 1e-3
    np.testing.assert_array_equal(draw(adapted), before)


def test_a_strength_that_is_set_while_adapters_are_scaled_stays(adapted):
    layer = adapted.transformer.transformer_blocks[0].attn.to_q
    with adapters_scaled(0.5, adapted.transformer, None):
        assert layer.scaling == {"mine": 0.5}
        layer.set_scale("mine", 3.0)
    assert layer.scaling == {"mine": 3.0}


@pytest.mark.slow
def test_adapters_that_a_callback_sets_act_from_the_next_step_on(adapted, monkeypatch):
    def off(pipe, step, timestep, tensors):
        if step == 1:
            pipe.set_adapters(["mine"], [0.0])
        return tensors

    on = draw(adapted, cache_config=None)
    changed = draw(adapted, cache_config=None, callback_on_step_end=off)
    adapted.set_adapters(["mine"], [1.0])
    pieces = [draw(adapted, cache_config=None, num_inference_steps=STEPS, callback_on_step_end=lambda *told: {})]
    np.testing.assert_array_equal(pieces[0], on)
    assert np.abs(changed - on).max() > 1e-3
    for kept in (kept_graphs.KEPT_GRAPHS, 1):
        adapted.set_adapters(["mine"], [1.0])
        monkeypatch.setattr(adapted._loops, "most", kept)
        draw(adapted, cache_config=CONFIG, num_inference_steps=6, callback_on_step_end=off)
        assert adapted.cache_stats.reused == (False, True, False, True, True, True)


def test_adapters_that_a_callback_sets_act_under_an_applied_cache(adapted, mindone_pipe):
    mindone_pipe.set_adapters(["mine"], [1.0])
    apply_cache_on_pipe(mindone_pipe, CONFIG)

    def off(pipe, step, timestep, tensors):
        if step == 1:
            pipe.set_adapters(["mine"], [0.0])
        return tensors

    on = draw(mindone_pipe)
    changed = draw(mindone_pipe, callback_on_step_end=off)
    assert np.abs(changed - on).max() > 1e-3
    assert mindone_pipe.transformer.cache_stats.reused == (False, True, False, True)
    remove_cache_from_pipe(mindone_pipe)


def test_adapters_that_a_callback_sets_act_on_both_branches_with_texts_of_two_lengths(adapted, mindone_pipe):
    rng, transformer = np.random.default_rng(0), mindone_pipe.transformer
    call = {
        "hidden_states": ms.Tensor(rng.normal(size=(1, 16, 16)), ms.float32),
        "pooled_projections": ms.Tensor(rng.normal(size=(1, transformer.config.pooled_projection_dim)), ms.float32),
        "img_ids": ms.Tensor(np.zeros((16, 3)), ms.float32),
        "guidance": ms.Tensor([3.5], ms.float32),
    }
    texts = {
        name: ms.Tensor(rng.normal(size=(1, length, transformer.config.joint_attention_dim)), ms.float32)
        for name, length in {"cond": 8, "uncond": 4}.items()
    }
    apply_cache_on_pipe(mindone_pipe, CacheConfig(0.99, warmup_steps=100))
    cached = mindone_pipe.transformer
    mindone_pipe.scheduler.set_timesteps(4, mu=1.0)
    for strength in (1.0, 0.0):
        mindone_pipe.set_adapters(["mine"], [strength])
        for name, text in texts.items():
            ids = ms.Tensor(np.zeros((text.shape[1], 3)), ms.float32)
            call |= {"encoder_hidden_states": text, "txt_ids": ids, "timestep": ms.Tensor([0.5 + strength / 4])}
            with cached.cache_context(name):
                got = cached(**call, return_dict=False)[0].asnumpy()
            with graph_mode(False):
                want = transformer(**call, return_dict=False)[0].asnumpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        cached.end_step()
    remove_cache_from_pipe(mindone_pipe)


@pytest.mark.slow
def test_threads_take_turns(pipe):
    want, got = {seed: draw(pipe, latents=noise(seed)) for seed in (1, 2)}, {}
    threads = [
        threading.Thread(target=lambda seed=seed: got.update({seed: draw(pipe, latents=noise(seed))})) for seed in want
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for seed in want:
        np.testing.assert_array_equal(got[seed], want[seed])


def noise(seed):
    return ms.Tensor(np.random.default_rng(seed).standard_normal((1, 64, 16)), ms.float32)


def test_a_thread_that_another_one_overtakes_is_told(mindone_pipe):
    apply_cache_on_pipe(mindone_pipe, CONFIG)

    def overtake(pipe, step, timestep, tensors):
        other = threading.Thread(target=pipe.scheduler.set_timesteps, kwargs={"num_inference_steps": 4, "mu": 1.0})
        other.start()
        other.join()
        return {}

    with pytest.raises(ValueError, match="Invalid cache state: another thread"):
        draw(mindone_pipe, callback_on_step_end=overtake)
    remove_cache_from_pipe(mindone_pipe)


def test_turns_are_given_back():
    with pytest.raises(KeyError):
        with turn("one"):
            raise KeyError
    with turn("one"), turn("two"):
        pass


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("part", ["scheduler", "transformer"])
def test_a_copy_of_a_part_under_an_applied_cache_is_one_of_mindones(mindone_pipe, make, part):
    plain = getattr(mindone_pipe, part)
    apply_cache_on_pipe(mindone_pipe, CONFIG)
    copied = make(getattr(mindone_pipe, part))
    remove_cache_from_pipe(mindone_pipe)
    assert type(copied) is type(plain) and copied is not plain


def test_an_applied_cache_decides_as_the_loop_where_timesteps_ascend(pipe, mindone_pipe):
    for each in (pipe, mindone_pipe):
        each.scheduler = FlowMatchEulerDiscreteScheduler.from_config(each.scheduler.config, invert_sigmas=True)
    apply_cache_on_pipe(mindone_pipe, CONFIG)
    for _ in range(2):
        np.testing.assert_array_equal(draw(mindone_pipe), draw(pipe, cache_config=CONFIG))
        assert mindone_pipe.transformer.cache_stats == pipe.cache_stats and pipe.cache_stats.cached_steps == [1, 2, 3]
    remove_cache_from_pipe(mindone_pipe)


OWN = [1, 0.98, 0.96, 0.94, 0.9, 0.85, 0.7, 0.5, 0.3, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sigmas, cached",
    [(OWN, [6, 7]), (list(np.linspace(1, 0.1, 10)), [3, 4, 5, 6]), (None, [3, 4, 5, 6])],
)
def test_a_window_means_the_same_in_the_loop_and_in_an_applied_cache(pipe, mindone_pipe, sigmas, cached):
    """The window's edges, 0.3 and 0.6, belong to it."""
    config = CacheConfig(1, start=0.3, end=0.6)
    apply_cache_on_pipe(mindone_pipe, config)
    for each in (pipe, mindone_pipe):
        draw(each, sigmas=sigmas, num_inference_steps=10, **({"cache_config": config} if each is pipe else {}))
    assert pipe.cache_stats.cached_steps == mindone_pipe.transformer.cache_stats.cached_steps == cached
    remove_cache_from_pipe(mindone_pipe)


def test_a_window_counts_from_the_whole_schedule_where_a_picture_is_given(loaded, mindone_pipe):
    plain = fresh(of(mindone.diffusers.FluxImg2ImgPipeline, mindone_pipe))
    apply_cache_on_pipe(plain, CacheConfig(1, start=0.6))
    image = np.zeros((1, 64, 64, 3), np.float32)
    draw(plain, image=image, strength=0.8, num_inference_steps=10)
    assert plain.transformer.cache_stats.cached_steps == [4, 5, 6, 7]
    remove_cache_from_pipe(plain)


@pytest.mark.usefixtures("compiled_parts")
def test_models_that_nobody_has_changed_are_compiled_once(pipe, monkeypatch):
    dropped = []
    monkeypatch.setattr(kept_graphs, "drop_graphs", dropped.append)
    for _ in range(2):
        pipe(PROMPT, height=64, width=64, num_inference_steps=2, max_sequence_length=32)
    assert dropped == []


@pytest.mark.usefixtures("compiled_parts")
def test_a_dtype_goes_there_and_back(pipe):
    before = draw(pipe, cache_config=None)
    pipe.to(ms.float16)
    try:
        with pytest.raises(ValueError, match="transformer is in Float16"):
            draw(pipe)
    finally:
        pipe.to(ms.float32)
    for _ in range(2):
        assert np.abs(draw(pipe, cache_config=None) - before).max() < 0.01
