import subprocess
import sys
from pathlib import Path
from types import MethodType

import mindone.diffusers
import numpy as np
import pytest
from narrow import make_narrow, run_step
from PIL import Image

import mindspore as ms
from mindspore import ops

from FBCache_ms import (
    CacheConfig,
    CacheContext,
    FluxDenoiseLoop,
    FluxPipeline,
    apply_cache_on_pipe,
    remove_cache_from_pipe,
)
from FBCache_ms.cache.gates import step_tables
from FBCache_ms.models.transformer_flux_withFBCache import FBCache_transformer_construct
from FBCache_ms.pipelines.cached_transformer import CachedStep
from FBCache_ms.pipelines.whole_loop import is_watched
from FBCache_ms.runtime.checkpoint import TINY_FLUX

PROMPT = "a big red circle in the center, blue background"
OTHER = "a small green square on the left, black background"


def noise(seed=0, batch=1, tokens=64):
    return ms.Tensor(np.random.default_rng(seed).standard_normal((batch, tokens, 16)), ms.float32)


def draw(pipe, prompt=PROMPT, **settings):
    """Pictures as arrays, in few steps unless told otherwise."""
    settings = {"num_inference_steps": 12, "height": 64, "width": 64, "max_sequence_length": 32, **settings}
    if "generator" not in settings:
        settings.setdefault("latents", noise(tokens=settings["height"] * settings["width"] // 64))
    return pipe(prompt, **{"output_type": "np", **settings})[0]


DOUBLES = SINGLES = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded checkpoint's first blocks: its streams are as smooth, and it compiles in a fraction of the time."""
    return str(make_narrow(tmp_path_factory.mktemp("checkpoint") / "narrow", DOUBLES, SINGLES))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    """Our pipeline, with the default cache."""
    pipe = FluxPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mindone_pipe(checkpoint):
    """mindone's own pipeline on the same checkpoint."""
    pipe = mindone.diffusers.FluxPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def graph_mode():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


CONFIG = CacheConfig(0.3, 1)


def parts_of(pipe):
    """A Flux pipeline's components, for another pipeline."""
    optional = ("image_encoder", "feature_extractor")
    return {name: part for name, part in pipe.components.items() if name not in optional}


@pytest.mark.slow
def test_a_generation_does_not_depend_on_what_ran_before(pipe, checkpoint, tmp_path):
    """The same call in a process of its own gives the same bits."""
    draw(pipe, OTHER, cache_config=CacheConfig(0.9, 1), num_inference_steps=20)
    draw(pipe, cache_config=CacheConfig(0.2, 2))
    draw(pipe, OTHER, cache_config=CONFIG, height=64, width=96, num_inference_steps=3)
    draw(pipe, cache_config=None)
    here = draw(pipe, cache_config=CONFIG)
    decisions = pipe.cache_stats
    script = (
        "import sys\nsys.path.append('pipelines')\nimport numpy as np, test_pipeline as t\n"
        "from conftest import FluxPipeline\nFluxPipeline.COMPILES_PARTS = False\n"
        f"pipe = FluxPipeline.from_pretrained({checkpoint!r})\n"
        f"image = t.draw(pipe, cache_config=t.CONFIG)\nnp.save({str(tmp_path / 'there.npy')!r}, image)\n"
        "print(pipe.cache_stats.cached_steps)"
    )
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    np.testing.assert_array_equal(here, np.load(tmp_path / "there.npy"))
    assert done.stdout.strip().splitlines()[-1] == str(decisions.cached_steps)
    assert decisions.cached_steps


def test_one_compilation_serves_every_prompt_seed_threshold_and_step_count(pipe, strict_graph_mode):
    pipe, reused = FluxPipeline(**parts_of(pipe)), set()
    pipe.set_progress_bar_config(disable=True)
    for index, threshold in enumerate((0, 0.05, 0.1, 0.2, 0.4, 1.0)):
        config = CacheConfig(threshold, 1, warmup_steps=index % 3)
        draw(pipe, (PROMPT, OTHER)[index % 2], latents=noise(index), num_inference_steps=5 + index, cache_config=config)
        reused.add(len(pipe.cache_stats.cached_steps))
        assert not pipe.cache_stats.reused[0]
    assert pipe.graph_compilations == 1
    assert len(reused) > 2


def loop_inputs(steps):
    """The loop's arguments up to start, for random latents and prompt embeddings."""
    rng, sigmas = np.random.default_rng(0), np.append(np.linspace(1, 1 / steps, steps), 0)
    ids = np.indices((1, 8, 8)).reshape(3, -1).T
    arrays = rng.normal(size=(1, 64, 16)), rng.normal(size=(1, 1, 32, 64)), rng.normal(size=(1, 1, 64))
    others = np.zeros((32, 3)), ids, [3.5], 1.0, sigmas[:-1] * 1000, sigmas
    return [ms.Tensor(array, ms.float32) for array in (*arrays, *others)]


def test_the_loop_goes_on_where_a_piece_of_it_stopped(pipe, strict_graph_mode):
    loop = FluxDenoiseLoop(pipe.transformer, CacheContext(1, 64, 128, taylorseer_derivative=1))
    latents, *inputs = loop_inputs(28)
    numbers = tuple(map(ms.Tensor, step_tables(CacheConfig(0.3, 1), 28)))

    def run(latents, start, stop):
        return loop(latents, *inputs, ms.Tensor(start, ms.int32), ms.Tensor(stop, ms.int32), *numbers)

    whole = run(latents, 0, 28).asnumpy()
    stats = loop.cache.stats()
    pieces = run(run(latents, 0, 3), 3, 28).asnumpy()
    np.testing.assert_array_equal(whole, pieces)
    assert loop.cache.stats() == stats and stats.cached_steps
    assert len(loop.compile_cache) == 1


def double_gate(transformer, inputs, steps, double, single):
    """Nunchaku's two gates step by step on mindone's own blocks: the latents and both gates' decisions."""
    latents, embeds, pooled, text_ids, image_ids, guidance, _, timesteps, sigmas = inputs
    context = transformer.context_embedder(embeds[0])
    rotary = transformer.pos_embed(ops.concat((text_ids, image_ids)))
    kept, decisions = {}, {"double": [], "single": []}

    def through(cells, image, text, temb):
        for cell in cells:
            text, image = cell(image, text, temb, rotary)
        return image, text

    def gated(name, threshold, cells, image, text, temb, both):
        before = [text.asnumpy(), image.asnumpy()]
        image, text = through(cells[:1], image, text, temb)
        added = [after.asnumpy() - old for after, old in zip((text, image), before)]
        probe = np.concatenate(added, 1) if both else added[1]
        difference = np.abs(kept[name][0] - probe).mean() / np.abs(kept[name][0]).mean() if name in kept else np.inf
        decisions[name].append(bool(difference < threshold))
        if not decisions[name][-1]:
            last_image, last_text = through(cells[1:], image, text, temb)
            kept[name] = probe, last_image - image, last_text - text
        return image + kept[name][1], text + kept[name][2]

    for step in range(steps):
        temb = transformer.time_text_embed(timesteps[step : step + 1], guidance * 1000, pooled[0])
        image = transformer.x_embedder(latents)
        image, text = gated("double", double, transformer.transformer_blocks, image, context, temb, False)
        image, text = gated("single", single, transformer.single_transformer_blocks, image, text, temb, True)
        velocity = transformer.proj_out(transformer.norm_out(image, temb))
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    return latents.asnumpy(), decisions


def test_the_double_gate_goes_through_mindones_blocks_as_described(pipe, graph_mode):
    inputs, steps = loop_inputs(16), 16
    expected, decisions = double_gate(pipe.transformer, inputs, steps, 0.3, 0.2)
    config = CacheConfig(0.3, span="stacks", residual_diff_threshold_single=0.2)
    loop = FluxDenoiseLoop(pipe.transformer, CacheContext(1, 64, 128, config=config, text_len=32))
    bounds = ms.Tensor(0, ms.int32), ms.Tensor(steps, ms.int32)
    latents = loop(*inputs, *bounds, *map(ms.Tensor, step_tables(config, steps))).asnumpy()
    assert {gate.name: list(gate.reused) for gate in loop.cache.stats().gates} == decisions
    assert len(set(zip(decisions["double"], decisions["single"]))) >= 3
    np.testing.assert_allclose(latents, expected, atol=1e-3)


@pytest.mark.parametrize("repeat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_controlnet_residuals_go_to_mindones_blocks(pipe, graph_mode, repeat):
    transformer, rng = pipe.transformer, np.random.default_rng(0)
    latents, embeds, pooled, text_ids, image_ids, guidance, *_ = loop_inputs(1)

    def residuals(number):
        return [ms.Tensor(rng.normal(size=(1, 64, 128)), ms.float32) for _ in range(number)]

    arguments = {
        "hidden_states": latents,
        "encoder_hidden_states": embeds[0],
        "pooled_projections": pooled[0],
        "timestep": ms.Tensor([0.7], ms.float32),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "guidance": guidance,
        "controlnet_block_samples": residuals(2),
        "controlnet_single_block_samples": residuals(2),
        "controlnet_blocks_repeat": repeat,
    }
    step = CachedStep(transformer, CacheContext(1, 64, 128))
    np.testing.assert_allclose(run_step(step, **arguments), transformer(**arguments)[0].asnumpy(), atol=1e-4)


def test_a_timestep_that_repeats_is_no_new_generation_where_these_are_told_of(pipe, graph_mode):
    latents, embeds, pooled, text_ids, image_ids, guidance, *_ = loop_inputs(1)
    inputs = {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0], "guidance": guidance}
    inputs = {**inputs, "img_ids": image_ids, "txt_ids": text_ids}
    step = CachedStep(pipe.transformer, CacheContext(1, 64, 128))
    for _ in range(2):
        step.cache_context.forget()
        for _ in range(3):
            run_step(step, latents, ms.Tensor([1.0], ms.float32), **inputs)
        assert len(step.cache_context.stats().reused) == 3


def test_pieces_of_the_loop_are_the_whole_loop_bit_for_bit(pipe):
    whole = draw(pipe, cache_config=CONFIG, num_inference_steps=28)
    stats = pipe.cache_stats
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        assert float(pipe.scheduler.timesteps[step]) == float(timestep)
        return {}

    pieces = draw(pipe, cache_config=CONFIG, num_inference_steps=28, callback_on_step_end=watch)
    np.testing.assert_array_equal(whole, pieces)
    assert pipe.cache_stats == stats
    assert [step for step, _, _ in seen] == list(range(28))
    assert seen[0][1] == 1000 and seen[0][2] == ["latents"]
    assert pipe.num_timesteps == 28


def test_a_callback_may_replace_latents_and_interrupt(pipe):
    kept = {}

    def interfere(pipe, step, timestep, tensors):
        kept["latents"] = tensors["latents"] * 0.5
        pipe._interrupt = step == 3
        return {"latents": kept["latents"]}

    latents = draw(pipe, callback_on_step_end=interfere, output_type="latent")
    assert len(pipe.cache_stats.reused) == 4
    np.testing.assert_array_equal(latents.asnumpy(), kept["latents"].asnumpy())


def test_a_progress_bar_shows_each_step_when_asked_for(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    draw(pipe, num_inference_steps=5)
    pipe.set_progress_bar_config(disable=True)
    assert "5/5" in capfd.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_people(pipe, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(pipe, "_progress_bar_config", {})
    assert is_watched(pipe) is terminal


@pytest.mark.slow
def test_mindones_own_pipeline_takes_the_cached_step(pipe, mindone_pipe, graph_mode, monkeypatch):
    transformer = mindone_pipe.transformer
    context = CacheContext(batch_size=1, seq_len=64, inner_dim=128, taylorseer_derivative=1, branches=2, config=CONFIG)
    cached = MethodType(FBCache_transformer_construct, transformer)
    monkeypatch.setitem(transformer.__dict__, "construct", cached)
    monkeypatch.setitem(transformer.__dict__, "cache_context", context)
    cfg = {"true_cfg_scale": 2.0, "negative_prompt": OTHER}
    # Under true CFG the loop embeds both prompts at once, and a product of two rows is summed in another order.
    for settings, tolerance in (({}, 0), ({"num_inference_steps": 7}, 0), (cfg, 1e-5), ({}, 0)):
        stepwise = draw(mindone_pipe, **settings)
        whole = draw(pipe, cache_config=CONFIG, **settings)
        np.testing.assert_allclose(stepwise, whole, rtol=tolerance, atol=tolerance)
        assert context.stats().cached_steps == pipe.cache_stats.cached_steps != []
    with pytest.raises(ValueError, match="Invalid cache state"):
        draw(mindone_pipe, width=96)
    transformer.compile_cache.clear()


@pytest.mark.slow
def test_the_cache_goes_on_and_off_any_pipeline(pipe, mindone_pipe, graph_mode):
    plain = draw(mindone_pipe)
    transformer, scheduler = mindone_pipe.transformer, mindone_pipe.scheduler
    apply_cache_on_pipe(mindone_pipe, CONFIG)
    for width in (64, 96, 64):
        cached = draw(mindone_pipe, width=width)
        np.testing.assert_array_equal(cached, draw(pipe, width=width, cache_config=CONFIG))
        assert mindone_pipe.transformer.cache_stats.reused == pipe.cache_stats.reused
    remove_cache_from_pipe(mindone_pipe)
    remove_cache_from_pipe(mindone_pipe)
    assert mindone_pipe.transformer is transformer and mindone_pipe.scheduler is scheduler
    np.testing.assert_array_equal(plain, draw(mindone_pipe))


def test_an_applied_cache_knows_the_steps_of_the_generation(mindone_pipe, pipe, graph_mode):
    """TeaCache computes the last step, a window is a share of the steps: both need their number."""
    config = CacheConfig(gate="teacache", teacache_threshold=0.6, end=0.7, taylorseer_derivative=1, forecast="newton")
    config = config.changed(forecast_coordinate="sigma")
    apply_cache_on_pipe(mindone_pipe, config)
    for steps in (12, 7):
        stepwise = draw(mindone_pipe, num_inference_steps=steps)
        whole = draw(pipe, num_inference_steps=steps, cache_config=config)
        np.testing.assert_array_equal(stepwise, whole)
        assert mindone_pipe.transformer.cache_stats == pipe.cache_stats
        assert pipe.cache_stats.cached_steps and not pipe.cache_stats.reused[-1]
    remove_cache_from_pipe(mindone_pipe)


def test_an_applied_cache_forgets_a_generation_that_was_broken_off(mindone_pipe, graph_mode):
    """The next one starts at the timestep where the last one stopped, so only set_timesteps can tell."""
    apply_cache_on_pipe(mindone_pipe, CacheConfig(1.0, warmup_steps=1))
    sigmas = [1.0, 0.8, 0.6]

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {}

    draw(mindone_pipe, sigmas=[*sigmas, 0.4], num_inference_steps=4, callback_on_step_end=stop)
    draw(mindone_pipe, OTHER, sigmas=[0.6, 0.3], num_inference_steps=2)
    assert mindone_pipe.transformer.cache_stats.reused == (False, True)
    remove_cache_from_pipe(mindone_pipe)


def test_an_applied_cache_tells_unnamed_guidance_branches_apart(pipe, graph_mode):
    """mindone's image-to-image pipeline calls for both prompts and enters no cache_context."""
    plain = mindone.diffusers.FluxImg2ImgPipeline(**parts_of(pipe))
    plain.set_progress_bar_config(disable=True)
    apply_cache_on_pipe(plain, CONFIG)
    image = Image.new("RGB", (64, 64), "red")
    settings = {"true_cfg_scale": 2.0, "negative_prompt": OTHER, "strength": 0.8, "max_sequence_length": 32}
    plain(PROMPT, image=image, height=64, width=64, num_inference_steps=15, output_type="np", **settings)
    stats = plain.transformer.cache_stats
    assert len(stats.reused) == len(stats.uncond.reused) == 12
    assert stats.cached_steps and stats.uncond.cached_steps and not stats.reused[0] and not stats.uncond.reused[0]
    assert stats.residual_diffs != stats.uncond.residual_diffs
    remove_cache_from_pipe(plain)


def test_no_gate_in_the_graph_is_the_cache_switched_off(pipe):
    bare = draw(pipe, cache_config=CacheConfig(gate="none"))
    assert pipe.cache_stats.computed_steps == list(range(12)) and pipe.cache_stats.skipped == 0
    np.testing.assert_allclose(bare, draw(pipe, cache_config=None), atol=1e-5)


def test_the_cache_goes_off_for_a_call_of_another_length_than_its_mask(pipe):
    kept, pipe.cache_config = pipe.cache_config, CacheConfig(steps_computation_mask=(1, 0, 0, 1))
    try:
        draw(pipe, cache_config=None)
    finally:
        pipe.cache_config = kept
    assert pipe.cache_stats.cached_steps == []


def test_another_transformer_is_seen(pipe):
    mine = FluxPipeline(**parts_of(pipe))
    mine.set_progress_bar_config(disable=True)
    before = draw(mine, num_inference_steps=2)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    mine.transformer = mindone.diffusers.FluxTransformer2DModel(**{**config, "num_layers": 1, "num_single_layers": 1})
    assert np.abs(draw(mine, num_inference_steps=2) - before).max() > 0.01


def test_another_model_is_refused_by_name():
    class Pipe:
        transformer = mindone.diffusers.FlowMatchEulerDiscreteScheduler()

    with pytest.raises(ValueError, match="Unsupported model FlowMatchEulerDiscreteScheduler"):
        apply_cache_on_pipe(Pipe(), CONFIG)


def test_a_transformer_without_its_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match="FluxTransformer2DModel is no pipeline"):
        apply_cache_on_pipe(pipe.transformer, CONFIG)
    assert "transformer" not in vars(pipe.transformer)


def test_a_device_by_name_is_refused(pipe):
    for make, given in ((FluxPipeline.from_pretrained, str(TINY_FLUX)), (FluxPipeline.from_pipe, pipe)):
        with pytest.raises(TypeError, match="device must be a Device, as choose_device returns it, not 'CPU'"):
            make(given, device="CPU")


def test_the_caches_of_true_cfgs_branches_are_independent(pipe):
    """With the same prompt in both branches they decide alike; another negative prompt changes its own branch only
    where the latents differ, which they do not when guidance is 1 + tiny."""
    tiny = 1 + 1e-6
    draw(pipe, cache_config=CONFIG, true_cfg_scale=tiny, negative_prompt=PROMPT)
    same = pipe.cache_stats
    assert same.reused == same.uncond.reused
    np.testing.assert_allclose(same.residual_diffs[1], same.uncond.residual_diffs[1], rtol=1e-6)
    draw(pipe, cache_config=CONFIG, true_cfg_scale=tiny, negative_prompt=OTHER)
    other = pipe.cache_stats
    assert other.reused == same.reused
    np.testing.assert_allclose(np.array(other.residual_diffs[1:]), np.array(same.residual_diffs[1:]), rtol=1e-3)
    assert not np.allclose(np.array(other.uncond.residual_diffs[1:], float), np.array(same.residual_diffs[1:], float))
    draw(pipe, cache_config=CONFIG)
    assert pipe.cache_stats.uncond is None
    assert pipe.cache_stats.reused == same.reused


def test_several_images_and_prompts_come_in_one_call(pipe):
    images = draw(pipe, [PROMPT, OTHER], num_images_per_prompt=2, generator=np.random.default_rng(0), cache_config=None)
    assert images.shape == (4, 64, 64, 3)
    assert np.abs(images[0] - images[1]).max() > 0.01


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_a_batch_of_equals_is_the_single_one(pipe, reduction):
    config, one = CONFIG.changed(batch_reduction=reduction), noise()
    alone = draw(pipe, latents=one, cache_config=config)
    stats = pipe.cache_stats
    assert stats.cached_steps
    for prompts, images in ([PROMPT, PROMPT], 1), (PROMPT, 2):
        pair = draw(pipe, prompts, num_images_per_prompt=images, latents=one.tile((2, 1, 1)), cache_config=config)
        assert pipe.cache_stats.reused == stats.reused
        np.testing.assert_allclose(pair, np.concatenate([alone, alone]), atol=1e-4)


def test_latents_may_be_a_view_of_others(pipe):
    many = noise(batch=3)
    alone = draw(pipe, latents=ms.Tensor(many.asnumpy()[1:2]), num_inference_steps=2)
    np.testing.assert_array_equal(draw(pipe, latents=many[1:2], num_inference_steps=2), alone)


def test_results_come_as_mindones(pipe):
    pictures = pipe(PROMPT, num_inference_steps=2, generator=np.random.default_rng(0))
    assert isinstance(pictures, tuple) and isinstance(pictures[0][0], Image.Image) and pictures[0][0].size == (64, 64)
    output = pipe(PROMPT, num_inference_steps=2, generator=np.random.default_rng(0), return_dict=True)
    np.testing.assert_array_equal(np.asarray(output.images[0]), np.asarray(pictures[0][0]))
    assert draw(pipe, output_type="latent").shape == (1, 64, 16)
    assert type(pipe.transformer).__name__ == "FluxTransformer2DModel"


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_image_ids_are_mindones(dtype):
    ours, theirs = (kind._prepare_latent_image_ids(1, 3, 5, dtype) for kind in (FluxPipeline, FluxPipeline.MINDONES))
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == ((15, 3), dtype)
    np.testing.assert_array_equal(ours.float().asnumpy(), theirs.float().asnumpy())


def test_prompt_embeds_may_be_given(pipe):
    embeds, pooled, _ = pipe.encode_prompt(PROMPT, max_sequence_length=32)
    given = draw(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    np.testing.assert_array_equal(given, draw(pipe))


def test_a_model_without_guidance_embedding_runs(pipe, mindone_pipe, graph_mode):
    """schnell's kind; random weights, so the two pipelines' pictures are compared and not looked at."""
    config = {**pipe.transformer.config, "guidance_embeds": False, "num_layers": 1, "num_single_layers": 1}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    transformer = mindone.diffusers.FluxTransformer2DModel(**config)
    parts = {**parts_of(pipe), "transformer": transformer}
    ours, theirs = FluxPipeline(**parts), mindone.diffusers.FluxPipeline(**parts)
    for each in (ours, theirs):
        each.set_progress_bar_config(disable=True)
    images = draw(ours, cache_config=None, num_inference_steps=3)
    np.testing.assert_allclose(images, draw(theirs, num_inference_steps=3), atol=1e-5)
    assert np.isfinite(images).all()


def test_operator_by_operator_gives_the_graphs_picture(pipe):
    graph = draw(pipe, num_inference_steps=3, cache_config=CacheConfig(0.9, warmup_steps=1))
    stats = pipe.cache_stats
    pipe.use_graph_mode = False
    eager = draw(pipe, num_inference_steps=3, cache_config=CacheConfig(0.9, warmup_steps=1))
    pipe.use_graph_mode = True
    assert pipe.cache_stats.reused == stats.reused and any(stats.reused)
    np.testing.assert_allclose(eager, graph, atol=1e-4)


def test_other_schedulers_run_uncached(pipe, caplog):
    scheduler = pipe.scheduler
    pipe.scheduler = mindone.diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        scheduler.config, stochastic_sampling=True
    )
    try:
        assert draw(pipe, num_inference_steps=2).shape == (1, 64, 64, 3)
    finally:
        pipe.scheduler = scheduler
    assert pipe.cache_stats is None and "without the cache" in caplog.text


@pytest.mark.parametrize(
    "prompt, settings, named",
    [
        ([], {}, "prompt"),
        (PROMPT, {"height": 60}, "height"),
        (PROMPT, {"width": -64}, "width"),
        (PROMPT, {"num_inference_steps": 0}, "num_inference_steps"),
        (PROMPT, {"num_inference_steps": 1001}, "num_inference_steps"),
        (PROMPT, {"sigmas": []}, "sigmas must be 1 to 1000 numbers, not 0"),
        (PROMPT, {"max_sequence_length": 513}, "max_sequence_length"),
        ([PROMPT, OTHER], {"negative_prompt": [OTHER] * 3, "true_cfg_scale": 2.0}, "negative_prompt"),
        (PROMPT, {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        (PROMPT, {"joint_attention_kwargs": {"stg_scale": 1.0}}, "STG is not supported with FBCache yet"),
        (PROMPT, {"cache_config": CacheConfig(steps_computation_mask=(1, 0, 1))}, "3 steps, the generation has 12"),
        (PROMPT, {"cache_config": CacheConfig(Fn_compute_blocks=4, Bn_compute_blocks=2)}, "6 blocks to skip"),
    ],
)
def test_bad_input_is_refused_by_name(pipe, prompt, settings, named):
    with pytest.raises(ValueError, match=named):
        draw(pipe, prompt, **{"generator": np.random.default_rng(0), **settings})


def test_a_cache_config_of_another_type_is_refused_by_name(pipe):
    with pytest.raises(TypeError, match="cache_config"):
        draw(pipe, cache_config=0.1)
    with pytest.raises(TypeError, match="cache_config"):
        FluxPipeline.from_pretrained(str(TINY_FLUX), cache_config=0.1)
    with pytest.raises(TypeError, match="cache_config"):
        apply_cache_on_pipe(pipe, 0.1)


def test_a_failed_call_leaves_the_pipeline_as_it_was(pipe):
    transformer, scheduler = pipe.transformer, pipe.scheduler

    def fail(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipe, callback_on_step_end=fail)
    assert pipe.transformer is transformer and pipe.scheduler is scheduler
    assert draw(pipe).shape == (1, 64, 64, 3)


def test_a_dtype_that_the_cpu_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="mindspore_dtype Float16 is not supported on CPU; float32 and bfloat16 are"):
        FluxPipeline.from_pretrained(str(TINY_FLUX), mindspore_dtype=ms.float16)
