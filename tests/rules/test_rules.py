"""Every rule in graph mode against its reference, on random streams."""

import numpy as np
import pytest
import references as ref
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from replay import DOUBLES, SINGLES, Streams, replay, text_kept

from FBCache_ms import CacheConfig
from FBCache_ms.config import OPTIONS
from FBCache_ms.rules.when import GATES, gates_where

BLOCKS = DOUBLES + SINGLES
quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
lengths, seeds, changes = st.integers(1, 24), st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 0.3])
thresholds = st.sampled_from([0, 0.05, 0.1, 0.2, 0.4, 0.7, 1])
limits = st.integers(-1, 5)

pytestmark = pytest.mark.usefixtures("strict_graph_mode")


def decided(margin):
    """Leaves out what rounding decides."""
    assume(min(margin, default=1) > 1e-4)


def traces(config, streams, **options):
    return [list(gate.reused) for gate in replay(config, streams, **options)[1].gates]


@quick
@given(lengths, seeds, changes, thresholds, st.integers(0, 6), st.integers(1, 3), limits, limits, st.data())
@pytest.mark.parametrize("first, last", [(1, 0), (3, 2)])
def test_dbcache(first, last, steps, seed, change, threshold, warmup, interval, M, MC, data):
    streams, margin = Streams(seed, steps, change), []
    mask = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=steps, max_size=steps))
    limit = data.draw(st.sampled_from([0, 0.3, 1.0]))
    interval = interval if warmup else 1
    config = CacheConfig(
        threshold,
        warmup_steps=warmup,
        warmup_interval=interval,
        max_cached_steps=M,
        max_consecutive_cache_hits=MC,
        max_accumulated_residual_diff=limit,
        steps_computation_mask=mask,
        Fn_compute_blocks=first,
        Bn_compute_blocks=last,
    )
    expected = ref.dbcache(streams.span(0, first), threshold, margin, warmup, interval, mask, False, M, MC, limit)
    decided(margin)
    (reused,) = traces(config, streams, cut=data.draw(st.integers(0, steps)))
    assert reused == expected
    assert not reused[0]
    assert M < 0 or sum(reused) <= M
    runs = "".join("x" if hit else " " for hit in reused).split()
    assert MC < 0 or max(map(len, runs), default=0) <= MC
    assert not any(hit for step, hit in enumerate(reused) if step in range(0, warmup, interval))
    assert mask is None or not any(hit and forced for hit, forced in zip(reused, mask))


@quick
@given(st.data(), lengths, seeds, thresholds, st.floats(0, 1), st.floats(0, 1), limits, st.floats(0, 1.2))
def test_comfyuis_window_and_run_length(data, steps, seed, threshold, start, end, most, mu):
    """The window is told in shares of the sampling and tested on the shifted noise levels, equally spaced or not."""
    streams, margin, (start, end) = Streams(seed, steps, 0.1), [], sorted((start, end))
    t = np.linspace(1, 1 / steps, steps)
    if data.draw(st.booleans()):
        t = np.sort(np.random.default_rng(seed).uniform(0.01, 1, steps))[::-1]
    sigmas = [ref.flux_shift(mu, level) for level in t]
    config = CacheConfig(threshold, start=start, end=end, max_consecutive_cache_hits=most)
    expected = ref.comfyui(streams.span(0, 1), sigmas, mu, threshold, margin, start, end, most)
    decided(margin)
    (reused,) = traces(config, streams, progress=1 - t)
    assert reused == expected


@quick
@given(lengths, seeds, changes, st.sampled_from([0, 0.25, 0.4, 0.6, 0.8, 3]), st.booleans())
def test_teacache(steps, seed, change, threshold, flux):
    streams, margin = Streams(seed, steps, change), []
    polynomial = ref.FLUX_POLYNOMIAL if flux else (1.0, 0.05)
    config = CacheConfig(gate="teacache", teacache_threshold=threshold, teacache_coefficients=polynomial)
    expected = ref.teacache(streams.modulated[:steps], threshold, margin, polynomial)
    decided(margin)
    assert traces(config, streams) == [expected]


@quick
@given(lengths, seeds, changes, thresholds)
@pytest.mark.parametrize("order", [1, 2])
def test_cg_taylor(order, steps, seed, change, threshold):
    assume(threshold > 0)
    streams, margin = Streams(seed, steps, change), []
    expected = ref.cg_taylor(streams.span(0, 1), threshold, order, margin)
    decided(margin)
    assert traces(CacheConfig(threshold, order, gate="cg_taylor"), streams) == [expected]


@quick
@given(lengths, seeds, changes, thresholds, st.integers(0, 6))
def test_dicache(steps, seed, change, threshold, warmup):
    assume(threshold > 0)
    streams, margin = Streams(seed, steps, change), []
    expected = ref.dicache(streams.span(0, 1), threshold, margin, warmup)
    decided(margin)
    assert traces(CacheConfig(threshold, gate="dicache", warmup_steps=warmup), streams) == [expected]


@quick
@given(lengths, seeds, changes, st.sampled_from([0, 0.05, 0.2, 0.4, 2]), st.integers(0, 6))
def test_easycache(steps, seed, change, threshold, warmup):
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(gate="easycache", easycache_threshold=threshold, warmup_steps=warmup)
    latents = streams.latents[:steps].astype(float)
    expected, velocities = ref.easycache(latents, latents + streams.span(0, BLOCKS), threshold, margin, warmup)
    decided(margin)
    outputs, stats = replay(config, streams)
    assert list(stats.reused) == (expected if threshold else [False] * steps)
    np.testing.assert_allclose(outputs, velocities, rtol=1e-4, atol=1e-4) if threshold else None


@quick
@given(
    lengths, seeds, changes, st.sampled_from([0.1, 1, 4]), st.sampled_from([0.1, 1]), st.sampled_from([0, 0.5]), limits
)
@pytest.mark.parametrize("gate", ["speca", "speca_next"])
def test_speca(gate, steps, seed, change, threshold, decay, floor, most):
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(
        gate=gate,
        taylorseer_derivative=2,
        speca_threshold=threshold,
        speca_decay=decay,
        speca_floor=floor,
        max_consecutive_cache_hits=most,
    )
    latents = streams.latents[:steps]
    inputs, outputs = latents + streams.span(0, BLOCKS - 1), latents + streams.span(0, BLOCKS)
    numbers = 2, threshold, decay, floor, most if most >= 0 else steps, gate == "speca_next"
    expected = ref.speca(inputs, outputs, streams.span(BLOCKS - 1, BLOCKS), *numbers, margin)
    decided(margin)
    drawn, stats = replay(config, streams)
    assert len(stats.gates) == 1 and list(stats.reused) == expected
    computed = []
    for step in range(steps):
        if not expected[step]:
            computed.append((step, outputs[step]))
        behind = ref.taylor(computed, step, 2) if expected[step] else outputs[step]
        scale = max(1, np.abs(behind).max())
        np.testing.assert_allclose(drawn[step] / scale, behind / scale, atol=2e-4)


@quick
@given(lengths, seeds, changes, thresholds, st.sampled_from([0.25, 0.6, 2]))
@pytest.mark.parametrize("gate", ["fbcache_and_teacache", "fbcache_or_teacache"])
def test_fbcache_with_teacache(gate, steps, seed, change, threshold, tea_threshold):
    assume(threshold > 0)
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(threshold, gate=gate, teacache_threshold=tea_threshold)
    rule = ref.both if gate == "fbcache_and_teacache" else ref.either
    expected = rule(streams.span(0, 1), streams.modulated[:steps], threshold, tea_threshold, margin)
    decided(margin)
    assert traces(config, streams) == ([expected] if rule is ref.both else list(expected))


@quick
@given(lengths, seeds, changes, thresholds, thresholds)
def test_the_double_gate(steps, seed, change, double, single):
    """Each stack decides by its own probe, the single one's on text and image, and refreshes at its own misses."""
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(double, span="stacks", residual_diff_threshold_single=single)
    # Nunchaku knows no threshold of 1 that lets everything pass.
    expected = [
        ref.dbcache(streams.span(0, 1), min(double, 0.999999), margin),
        ref.dbcache(streams.both(DOUBLES, DOUBLES + 1), min(single, 0.999999), margin),
    ]
    decided(margin)
    outputs, stats = replay(config, streams)
    assert [list(gate.reused) for gate in stats.gates] == expected
    residuals = [streams.span(1, DOUBLES), streams.span(DOUBLES + 1, BLOCKS)]
    image = streams.latents[:steps] + streams.span(0, 1) + streams.span(DOUBLES, DOUBLES + 1)
    for reused, residual in zip(expected, residuals):
        last = np.maximum.accumulate([0 if hit else step for step, hit in enumerate(reused)])
        image = image + residual[last]
    np.testing.assert_allclose(outputs, image, rtol=1e-4, atol=1e-4)


@quick
@given(lengths, seeds, changes, thresholds)
@pytest.mark.parametrize(
    "reduction, factor, probe", [("max", 1, "residual"), ("mean", 2, "residual"), ("mean", 1, "hidden")]
)
def test_what_is_compared(reduction, factor, probe, steps, seed, change, threshold):
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(threshold, batch_reduction=reduction, downsample_factor=factor, probe=probe)
    probes = streams.span(0, 1) + (streams.latents[:steps] if probe == "hidden" else 0)
    expected = ref.dbcache(probes[..., ::factor], threshold, margin, reduction=reduction)
    decided(margin)
    assert traces(config, streams) == [expected]


def test_one_samples_change_decides_by_max_and_not_by_mean():
    streams = Streams(0, 2, 0.0)
    streams.image[1, 0, 1] *= 1.2
    decisions = [traces(CacheConfig(0.15, batch_reduction=reduction), streams)[0][1] for reduction in ("mean", "max")]
    assert decisions == [True, False]


SCHEDULES = {
    "taylorseer": lambda steps, n: [step < 3 or (step - 2) % n == 0 for step in range(steps)],
    "fora": lambda steps, n: [step % n == 0 for step in range(steps)],
}


@quick
@given(lengths, seeds, st.integers(1, 8))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("span", ["blocks", "single"])
def test_a_static_schedule_asks_nothing(span, schedule, steps, seed, interval):
    streams = Streams(seed, steps)
    config = CacheConfig(gate="static", schedule=schedule, schedule_interval=interval, span=span)
    outputs, stats = replay(config, streams)
    computed = SCHEDULES[schedule](steps, interval)
    assert stats.computed_steps == [step for step in range(steps) if computed[step]]
    assert set(stats.residual_diffs) <= {None}
    last = np.maximum.accumulate([step if computed[step] else 0 for step in range(steps)])
    start = DOUBLES if span == "single" else 0
    image = streams.latents[:steps] + streams.span(0, start) + streams.span(start, BLOCKS)[last]
    np.testing.assert_allclose(outputs, image, rtol=1e-4, atol=1e-4)


@quick
@given(st.data(), lengths, seeds)
def test_a_static_mask_asks_nothing(data, steps, seed):
    mask = data.draw(st.lists(st.integers(0, 1), min_size=steps, max_size=steps))
    config = CacheConfig(gate="static", steps_computation_mask=mask)
    expected = ref.dbcache(Streams(seed, steps).span(0, 1), 0, [], mask=mask, static=True)
    assert traces(config, Streams(seed, steps)) == [expected]


FORECASTS = {
    "taylor": lambda computed, x, order: ref.taylor(computed, x, order),
    "hicache": lambda computed, x, order: ref.hicache(computed, x, order, 0.3),
    "newton": lambda computed, x, order: ref.newton(computed, x, order),
}


@quick
@given(st.data(), st.integers(2, 24), seeds)
@pytest.mark.parametrize("order", [1, 4])
def test_spectrum_is_a_ridge_regression_on_all_computed_steps(order, data, steps, seed):
    streams = Streams(seed, steps)
    mask = [1] + data.draw(st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1))
    config = CacheConfig(
        taylorseer_derivative=order, gate="static", steps_computation_mask=mask, forecast="spectrum", spectrum_ridge=0.5
    )
    outputs, _ = replay(config, streams)
    residual, computed = streams.span(0, BLOCKS), []
    for step in range(steps):
        if mask[step]:
            computed.append((step, residual[step]))
        expected = residual[step] if mask[step] else ref.spectrum(computed, step, steps, order, 0.5)
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(outputs[step] / scale, (streams.latents[step] + expected) / scale, atol=2e-4)


@quick
@given(st.integers(2, 24), seeds, thresholds)
def test_spectrum_under_a_gate_is_a_regression_on_what_the_gate_has_computed(steps, seed, threshold):
    streams = Streams(seed, steps)
    config = CacheConfig(threshold, taylorseer_derivative=2, forecast="spectrum", spectrum_ridge=0.5)
    outputs, stats = replay(config, streams)
    first, residual, computed = streams.span(0, 1), streams.span(1, BLOCKS), []
    for step in range(steps):
        if not stats.reused[step]:
            computed.append((step, residual[step]))
        expected = ref.spectrum(computed, step, steps, 2, 0.5) if stats.reused[step] else residual[step]
        scale = max(1, np.abs(expected).max())
        behind = streams.latents[step] + first[step] + expected
        np.testing.assert_allclose(outputs[step] / scale, behind / scale, atol=2e-4)


@quick
@given(st.data(), st.integers(2, 24), seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_meancache_follows_the_mean_velocity_of_the_last_steps(data, steps, seed, spans):
    streams = Streams(seed, steps)
    mask = [1] + data.draw(st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1))
    config = CacheConfig(
        taylorseer_derivative=3,
        gate="static",
        steps_computation_mask=mask,
        forecast="meancache",
        meancache_steps=spans,
    )
    sigmas = np.linspace(1, 0, steps + 1) ** 1.5
    outputs, stats = replay(config, streams, sigmas)
    assert list(stats.reused) == [not computed for computed in mask]
    expected = ref.meancache(streams.latents[:steps] + streams.span(0, BLOCKS), mask, sigmas, spans)
    np.testing.assert_allclose(outputs, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@quick
@given(st.data(), st.integers(2, 24), seeds)
@pytest.mark.parametrize("span, order", [("blocks", 0), ("model", 2)])
def test_what_the_span_gives_is_forecast_in_the_place_of_what_it_adds(span, order, data, steps, seed):
    streams = Streams(seed, steps)
    mask = [1] + data.draw(st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1))
    config = CacheConfig(
        taylorseer_derivative=order,
        gate="static",
        steps_computation_mask=mask,
        span=span,
        forecast_target="output",
    )
    outputs, _ = replay(config, streams)
    behind, computed = streams.latents[:steps] + streams.span(0, BLOCKS), []
    for step in range(steps):
        if mask[step]:
            computed.append((step, behind[step]))
        expected = behind[step] if mask[step] else ref.taylor(computed, step, order)
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(outputs[step] / scale, expected / scale, atol=2e-4)


@quick
@given(st.data(), st.integers(2, 24), seeds)
@pytest.mark.parametrize(
    "forecast, order",
    [("taylor", 0), ("taylor", 1), ("taylor", 2), ("taylor", 3), ("hicache", 3), ("newton", 1), ("newton", 3)],
)
def test_a_reused_step_adds_the_forecast_of_the_span(forecast, order, data, steps, seed):
    streams = Streams(seed, steps)
    mask = [1] + data.draw(st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1))
    options = {"hicache_sigma": 0.3} if forecast == "hicache" else {}
    coordinate = "step" if forecast == "hicache" or order == 0 else data.draw(st.sampled_from(["step", "sigma"]))
    config = CacheConfig(
        taylorseer_derivative=order,
        gate="static",
        steps_computation_mask=mask,
        forecast=forecast,
        forecast_coordinate=coordinate,
        **options,
    )
    sigmas = np.linspace(1, 0, steps, endpoint=False) ** 2
    x = np.arange(steps, dtype=float) if coordinate == "step" else sigmas.astype(np.float32).astype(float)
    outputs, _ = replay(config, streams, sigmas)
    residual, computed = streams.span(0, BLOCKS), []
    for step in range(steps):
        if mask[step]:
            computed.append((x[step], residual[step]))
        expected = residual[step] if mask[step] else FORECASTS[forecast](computed, x[step], order)
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(outputs[step] / scale, (streams.latents[step] + expected) / scale, atol=2e-4)


@quick
@given(st.data(), st.integers(2, 24), seeds, st.booleans())
@pytest.mark.parametrize("order", [1, 2])
def test_a_reused_step_adds_its_own_row_of_a_table(order, data, steps, seed, windowed):
    """The rows are those of the steps that are reused, whatever else lets them be computed."""
    streams = Streams(seed, steps)
    mask = [1] + data.draw(st.lists(st.integers(0, 1), min_size=steps - 1, max_size=steps - 1))
    warmup = data.draw(st.integers(0, steps)) if windowed else 0
    mask = [int(computed or step < warmup) for step, computed in enumerate(mask)]
    weights = np.random.default_rng(seed).uniform(-2, 2, (steps - sum(mask), order + 1))
    config = CacheConfig(
        taylorseer_derivative=order,
        gate="static",
        steps_computation_mask=mask,
        warmup_steps=warmup,
        forecast="table",
        forecast_weights=weights.ravel() if weights.size else None,
    )
    outputs, stats = replay(config, streams)
    assert list(stats.reused) == [not computed for computed in mask]
    residual, computed, rows = streams.span(0, BLOCKS), [], iter(weights)
    for step in range(steps):
        if mask[step]:
            computed.append((step, residual[step]))
        expected = residual[step] if mask[step] else ref.table(computed, order, next(rows))
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(outputs[step] / scale, (streams.latents[step] + expected) / scale, atol=2e-4)


@quick
@given(lengths, seeds, changes, st.sampled_from([0.1, 0.3, 0.8]))
@pytest.mark.parametrize("probe", ["residual", "hidden"])
def test_dicaches_forecast(probe, steps, seed, change, threshold):
    """Its ratio is that of what the first block adds, whatever the gate looks at."""
    streams, margin = Streams(seed, steps, change), []
    config = CacheConfig(threshold, 1, gate="dicache", forecast="dicache", probe=probe)
    changes, residual, computed, seen = streams.span(0, 1), streams.span(1, BLOCKS), [], []
    expected = ref.dicache(changes + (streams.latents[:steps] if probe == "hidden" else 0), threshold, margin)
    decided(margin)
    outputs, stats = replay(config, streams)
    assert list(stats.reused) == expected
    for step in range(steps):
        if expected[step]:
            added = ref.dicache_alignment(computed, seen, changes[step])
        else:
            computed, seen, added = [*computed, (step, residual[step])], [*seen, changes[step]], residual[step]
        np.testing.assert_allclose(outputs[step], streams.latents[step] + changes[step] + added, rtol=1e-3, atol=1e-3)


@quick
@given(st.integers(2, 24), seeds, st.sampled_from([0.1, 0.3]))
def test_last_blocks_run_on_the_forecast_of_both_streams(steps, seed, threshold):
    """The blocks here add what they are told, so the text stream shows in no output but in its own buffer."""
    streams = Streams(seed, steps)
    config = CacheConfig(threshold, Fn_compute_blocks=3, Bn_compute_blocks=2)
    outputs, stats = replay(config, streams)
    last = np.maximum.accumulate([0 if hit else step for step, hit in enumerate(stats.reused)])
    outside = streams.span(0, 3) + streams.span(BLOCKS - 2, BLOCKS)
    image = streams.latents[:steps] + outside + streams.span(3, BLOCKS - 2)[last]
    np.testing.assert_allclose(outputs, image, rtol=1e-4, atol=1e-4)
    text = streams.text[last[-1], 3 : BLOCKS - 2].sum(0)
    np.testing.assert_allclose(text_kept(config), text[None], rtol=1e-4, atol=1e-4)


@quick
@given(st.integers(2, 24), seeds, st.sampled_from([np.nan, np.inf]), st.integers(0, 1), st.data())
@pytest.mark.parametrize(
    "gate", [*gates_where(lambda gate: gate.rules and not any(rule.unasked for rule in gate.every_rule)), "max"]
)
def test_what_is_no_number_computes(gate, steps, seed, bad, sample, data):
    streams = Streams(seed, steps, 0.01)
    step = data.draw(st.integers(1, steps - 1))
    streams.image[step, 0, sample, 0, 0] = streams.modulated[step, sample, 0, 0] = bad
    if gate != "max" and GATES[gate].before_embedding:
        streams.latents[step, sample, 0, 0] = bad
    options = {"batch_reduction": "max", "residual_diff_threshold": 1.0}
    if gate != "max":
        rules = GATES[gate].every_rule
        greatest = {rule.threshold: OPTIONS[rule.threshold].allowed[1] or 1e6 for rule in rules}
        options = {"gate": gate, "taylorseer_derivative": max(rule.fewest_orders for rule in rules), **greatest}
    _, stats = replay(CacheConfig(**options), streams)
    assert not stats.reused[step]


@quick
@given(st.integers(2, 24), seeds, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_larger_threshold_reuses_no_later_for_the_first_time(steps, seed, one, other):
    streams, (low, high) = Streams(seed, steps, 0.1), sorted((one, other))
    first = [
        min((step for step, hit in enumerate(traces(CacheConfig(threshold), streams)[0]) if hit), default=steps)
        for threshold in (low, high)
    ]
    assert first[1] <= first[0]


def test_nothing_is_left_of_a_generation_that_went_wrong():
    streams, wrong = Streams(0, 20), Streams(1, 20)
    wrong.image[:] = np.nan
    config = CacheConfig(0.5, 2, Fn_compute_blocks=3, Bn_compute_blocks=2)
    before = replay(config, streams)
    replay(config.changed(residual_diff_threshold=1.0), wrong)
    after = replay(config, streams)
    assert before[1] == after[1]
    np.testing.assert_array_equal(before[0], after[0])


@quick
@given(st.integers(2, 24), seeds, st.floats(0.01, 0.5), st.integers(0, 6), st.floats(0, 0.5))
def test_magcache(steps, seed, threshold, most, retention):
    ratios = np.random.default_rng(seed).uniform(0.8, 1.2, steps)
    settings = {"magcache_threshold": threshold, "magcache_max_skips": most, "magcache_retention": retention}
    config = CacheConfig(gate="static", schedule="magcache", magcache_ratios=ratios, **settings)
    expected = ref.magcache(ratios, steps, threshold, most, retention)
    (reused,) = traces(config, Streams(seed, steps))
    assert [step for step in range(steps) if not reused[step]] == expected


def test_fifty_settings_of_one_structure_are_one_compilation():
    """replay asserts that the loop was compiled once."""
    rng, seen = np.random.default_rng(0), set()
    for index in range(50):
        config = CacheConfig(
            float(rng.uniform()),
            warmup_steps=int(rng.integers(1, 6)),
            warmup_interval=int(rng.integers(1, 4)),
            max_cached_steps=int(rng.integers(-1, 9)),
            max_consecutive_cache_hits=int(rng.integers(-1, 4)),
            max_accumulated_residual_diff=float(rng.uniform(0, 9)),
            start=float(rng.uniform(0, 0.5)),
            end=float(rng.uniform(0.5, 1)),
            schedule=[None, "taylorseer", "fora", "magcache"][index % 4],
        )
        seen.add(tuple(traces(config, Streams(index, 20, 0.1))[0]))
    assert len(seen) > 10
