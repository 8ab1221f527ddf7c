"""The whole loop decides and draws as a graph for each step does, its reuses in a loop of their own or not."""

from types import MethodType

import mindone.diffusers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrow import make_narrow

import mindspore as ms
from mindspore import ops

from FBCache_ms import CacheConfig, CacheContext, FluxDenoiseLoop, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.cache.gates import step_tables
from FBCache_ms.models.base import Model
from FBCache_ms.models.transformer_flux_withFBCache import FBCache_transformer_construct, FluxModel
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.device import graph_mode

STEPS = 9
TAGS = (
    "F1B0_W0_R0.3",
    "F1B0_W0_T1O1_R0.3",
    "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.3",
    pytest.param("F1B0_W0_R0.3,gate=fbcache_or_teacache,teacache_threshold=0.2", marks=pytest.mark.slow),
    "F1B0_W0_R0.3,span=stacks,residual_diff_threshold_single=0.3",
)
"""A structure each."""

LIMITS = st.fixed_dictionaries(
    {
        "residual_diff_threshold": st.sampled_from([0.0, 0.1, 0.2, 0.35, 0.6, 1.0]),
        "warmup_steps": st.integers(0, 4),
        "max_cached_steps": st.sampled_from([-1, 0, 1, 3]),
        "max_consecutive_cache_hits": st.sampled_from([-1, 1, 2]),
        "start": st.sampled_from([0.0, 0.3]),
        "end": st.sampled_from([0.8, 1.0]),
        "steps_computation_mask": st.sampled_from([None, (1, 1, 1, 0, 0, 0, 0, 0, 0), (1, 0, 0, 1, 0, 0, 1, 0, 0)]),
    }
)


@pytest.fixture(scope="module", params=["one loop", pytest.param("two loops", marks=pytest.mark.slow)])
def pipelines(request, tmp_path_factory):
    """Our own pipeline, mindone's with the cached step, and a prompt's embeddings."""
    whole = FluxPipeline.from_pretrained(str(make_narrow(tmp_path_factory.mktemp("loop") / "narrow", 2, 2)))
    stepwise = mindone.diffusers.FluxPipeline(**whole.components)
    prompt = whole.encode_prompt("a red circle", max_sequence_length=32)[:2]
    for pipe in (whole, stepwise):
        pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "two loops":
            patch.setattr(FluxModel, "hands_over_blocks", Model.hands_over_blocks)
        yield whole, stepwise, prompt


@pytest.mark.parametrize("tag", TAGS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=LIMITS, steps=st.integers(STEPS, STEPS + 3), seed=st.integers(0, 3))
def test_the_loop_is_its_steps_whatever_the_settings(pipelines, tag, limits, steps, seed):
    whole, stepwise, prompt = pipelines
    if "gate=teacache" in tag:
        limits = {name: value for name, value in limits.items() if name != "residual_diff_threshold"}
    if limits["steps_computation_mask"] is not None:
        steps = STEPS
    config = CacheConfig.from_tag(tag).changed(**limits)
    results = []
    for pipe in (whole, stepwise):
        apply_cache_on_pipe(pipe, config)
        drawn = pipe(
            prompt_embeds=prompt[0],
            pooled_prompt_embeds=prompt[1],
            height=64,
            width=64,
            num_inference_steps=steps,
            generator=np.random.default_rng(seed),
            output_type="latent",
        )[0]
        stats = pipe.cache_stats if pipe is whole else pipe.transformer.cache_stats
        results.append((drawn.asnumpy(), stats.reused, stats.residual_diffs))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    np.testing.assert_array_equal(results[0][2], results[1][2])


TOKENS, TEXT = 4, 3


def tensors(transformer):
    """Latents, embeddings, pooled ones and ids, (1, ...), for a call of the transformer."""
    rng, config = np.random.default_rng(0), transformer.config
    sizes = (TOKENS, config.in_channels), (TEXT, config.joint_attention_dim), (config.pooled_projection_dim,)
    ids = [np.zeros((length, 3)) for length in (TEXT, TOKENS)]
    return [ms.Tensor(each, ms.float32) for each in [rng.normal(size=(1, *size)) for size in sizes] + ids]


def test_the_loop_ends_with_its_timesteps(pipelines, strict_graph_mode):
    transformer, steps, config = pipelines[0].transformer, 4, CacheConfig(0.3)
    latents, embeds, pooled, *ids = tensors(transformer)
    loop = FluxDenoiseLoop(transformer, CacheContext(1, TOKENS, transformer.inner_dim, config=config))
    sigmas = np.linspace(1, 0, steps + 1)
    schedule = ms.Tensor(1000 * sigmas[:-1], ms.float32), ms.Tensor(sigmas, ms.float32)
    numbers = list(map(ms.Tensor, step_tables(config, steps)))

    def draw(stop):
        end = ms.Tensor(0, ms.int32), ms.Tensor(stop, ms.int32)
        scales = ms.Tensor([3.5], ms.float32), ms.Tensor(1.0, ms.float32)
        drawn = loop(latents, embeds[None], pooled[None], *ids, *scales, *schedule, *end, *numbers)
        return drawn.asnumpy(), loop.cache.stats().reused

    expected, reused = draw(steps)
    got, reused_again = draw(steps + 50)
    np.testing.assert_array_equal(got, expected)
    assert reused_again == reused and len(reused) == steps


def test_by_hand_no_step_lies_beyond_the_tables(pipelines, monkeypatch):
    transformer = pipelines[0].transformer
    latents, embeds, pooled, text_ids, image_ids = tensors(transformer)
    context = CacheContext(1, TOKENS, transformer.inner_dim, config=CacheConfig(1.0))
    monkeypatch.setitem(transformer.__dict__, "construct", MethodType(FBCache_transformer_construct, transformer))
    monkeypatch.setitem(transformer.__dict__, "cache_context", context)
    transformer.compile_cache.clear()

    def step(timestep):
        time, guidance = ms.Tensor([timestep], ms.float32), ms.Tensor([3.5], ms.float32)
        transformer(latents, embeds, pooled, time, image_ids, text_ids, guidance)
        return int(context.step.value.asnumpy())

    with graph_mode(True):
        assert [step(0.9), step(0.8)] == [1, 2]
        ops.assign(context.step.value, ms.Tensor(MAX_STEPS - 1, ms.int32))
        assert [step(0.7), step(0.6), step(0.5)] == [MAX_STEPS, 1, 2]
    transformer.compile_cache.clear()
