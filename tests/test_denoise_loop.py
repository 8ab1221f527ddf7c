"""The whole loop, whose reuses run in a loop of their own, decides and draws as a graph for each step does."""

import mindone.diffusers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrow import make_narrow

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe

STEPS = 9
TAGS = (
    "F1B0_W0_R0.3",
    "F1B0_W0_T1O1_R0.3",
    "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.3",
    "F1B0_W0_R0.3,gate=fbcache_or_teacache,teacache_threshold=0.2",
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


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Our own pipeline, mindone's with the cached step, and a prompt's embeddings."""
    whole = FluxPipeline.from_pretrained(str(make_narrow(tmp_path_factory.mktemp("loop") / "narrow", 2, 2)))
    stepwise = mindone.diffusers.FluxPipeline(**whole.components)
    prompt = whole.encode_prompt("a red circle", max_sequence_length=32)[:2]
    for pipe in (whole, stepwise):
        pipe.set_progress_bar_config(disable=True)
    return whole, stepwise, prompt


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
