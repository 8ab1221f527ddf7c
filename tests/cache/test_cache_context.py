import numpy as np
import pytest
import references as ref
from replay import Streams, replay

import mindspore as ms
from mindspore import ops

from FBCache_ms import CacheConfig, CacheContext
from FBCache_ms.cache.stats import NOT_COMPARED, CacheStats, GateStats
from FBCache_ms.rules.arithmetic import finite_differences, relative_difference, weighted_sum
from FBCache_ms.rules.forecasts import FORECASTS
from FBCache_ms.rules.schedules import MAX_STEPS

SHAPE = (1, 4, 3)


@pytest.fixture(autouse=True)
def both_kinds(installed):
    """Each of these tests is of the equations that Ascend runs, and of the kernels in their places on a CPU."""


def single(value):
    return ms.Tensor(value, ms.float32)


def forecast_from(values, nodes, x, order, rule="taylor"):
    """The forecast at x from values seen at the nodes, one after the other."""
    derivatives = single(np.zeros((order + 1, *SHAPE)))
    last = (single(0.0),) * (order + 1)
    for index, (node, value) in enumerate(zip(nodes, values)):
        gaps = FORECASTS[rule].gaps(single(node), last)
        filled = ms.Tensor(min(index, order + 1), ms.int32)
        derivatives = finite_differences(single(np.full(SHAPE, value)), derivatives, filled, gaps)
        last = (single(node), *last[:-1])
    weights = FORECASTS[rule].weights(single(x), last, 0.5, 1.0)
    return weighted_sum(weights, derivatives).asnumpy()


def test_a_generation_that_goes_on_elsewhere_keeps_its_tallies_and_computes_first():
    first, other = (CacheContext(1, 4, 3, config=CacheConfig(0.1, max_cached_steps=5), branches=2) for _ in range(2))
    for buffer in first.tallied:
        ops.assign(buffer.value, single([[3, 2, 0.5], [1, 0, 0.25]]))
    other.go_on(first.trace())
    for buffer in other.tallied:
        np.testing.assert_array_equal(buffer.value.asnumpy(), [[3, np.inf, 0.5], [1, np.inf, 0.25]])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_taylorseers_forecasts_are_the_closed_forms(order, gap):
    """From values y at t = 0, gap, 2 gap, ...: every order divides by the newest gap, weights are k^i / i!."""
    values = [2.0, -1.0, 5.0, 4.0, 7.0]
    a, b, c, d = values[-1], values[-2], values[-3], values[-4]
    differences = [a, (a - b) / gap, (a - 2 * b + c) / gap**2, (a - 3 * b + 3 * c - d) / gap**3]
    nodes = [gap * index for index in range(len(values))]
    for k in (1, 2, 5):
        closed = sum(weight * D for weight, D in zip((1, k, k**2 / 2, k**3 / 6), differences[: order + 1]))
        forecast = forecast_from(values, nodes, nodes[-1] + k, order)
        np.testing.assert_allclose(forecast, np.full(SHAPE, closed), rtol=1e-5)


@pytest.mark.parametrize("k, gap", [(1, 1), (2, 3), (4, 2)])
def test_taylorseer_of_order_2_misses_a_parabola_by_k_times_the_gap_and_newton_does_not(k, gap):
    nodes = [0, gap, 2 * gap, 3 * gap]
    x, values = nodes[-1] + k, [node**2 for node in nodes]
    np.testing.assert_allclose(forecast_from(values, nodes, x, 2) - x**2, np.full(SHAPE, -k * gap), rtol=1e-5)
    np.testing.assert_allclose(forecast_from(values, nodes, x, 2, "newton"), np.full(SHAPE, x**2), rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_newton_is_exact_on_polynomials_at_any_gaps(order):
    rng = np.random.default_rng(order)
    polynomial, nodes = rng.normal(size=order + 1), np.cumsum(rng.integers(1, 5, order + 2))
    x = nodes[-1] + 3
    forecast = forecast_from(np.polyval(polynomial, nodes), nodes, x, order, "newton")
    np.testing.assert_allclose(forecast, np.full(SHAPE, np.polyval(polynomial, x)), rtol=1e-3)


def test_hicache_weights_are_the_published_ones():
    s, k = 0.3, 2.0
    weights = FORECASTS["hicache"].weights(single(5.0), (single(5.0 - k), single(0.0), single(0.0)), s, 1.0)
    expected = [1, 2 * s**2 * k, s**2 * (4 * s**2 * k**2 - 2) / 2]
    np.testing.assert_allclose([float(weight) for weight in weights], expected, rtol=1e-5)


@pytest.mark.parametrize("nodes", [(0, 1, 2), (0, 3, 4), (2, 5, 9)])
def test_foca_with_consistent_slopes_is_newton_of_order_2(nodes):
    """Why it has no row of its own: with the slopes of the parabola through the last three values, the second-order
    backward differentiation formula and Heun's corrector both give that parabola."""
    values, x = np.random.default_rng(0).normal(size=3), nodes[-1] + 2.0
    parabola = np.polyfit(nodes, values, 2)
    slope = np.polyder(parabola)
    h, k = nodes[2] - nodes[1], x - nodes[2]
    r = k / h
    predicted = ((1 + r) ** 2 * values[2] - r**2 * values[1] + k * (1 + r) * np.polyval(slope, x)) / (1 + 2 * r)
    corrected = values[2] + k / 2 * (np.polyval(slope, nodes[2]) + np.polyval(slope, x))
    newton = forecast_from(values, nodes, x, 2, "newton")
    for each in (predicted, corrected):
        np.testing.assert_allclose(newton, np.full(SHAPE, each), rtol=1e-5)


def test_an_order_ramps_up_with_the_computed_steps(strict_graph_mode):
    streams = Streams(0, 8, 0)
    streams.image[:] = 1
    streams.image[:, 1] = 3.0 * np.arange(24).reshape(-1, 1, 1, 1)
    for computed, expected in ((1, 0.0), (2, 3.0 * 3), (3, 3.0 * 4)):
        outputs, stats = replay(CacheConfig(0.5, 3, warmup_steps=computed), streams)
        assert stats.computed_steps == list(range(computed))
        added = outputs[computed + 1] - streams.latents[computed + 1]
        np.testing.assert_allclose(added, np.full_like(added, expected + 6), rtol=1e-5)


def test_the_threshold_is_exclusive(strict_graph_mode):
    streams = Streams(0, 2, 0)
    streams.image[0, 0], streams.image[1, 0] = 1, 1.5
    assert not replay(CacheConfig(0.5), streams)[1].reused[1]
    assert replay(CacheConfig(0.5001), streams)[1].reused[1]


def test_the_difference_is_taken_against_the_last_computed_step(strict_graph_mode):
    streams = Streams(0, 6, 0)
    streams.image[:, 0] = 1 + 0.1 * np.arange(24).reshape(-1, 1, 1, 1)
    stats = replay(CacheConfig(0.25), streams)[1]
    np.testing.assert_allclose(stats.residual_diffs[1:4], [0.1, 0.2, 0.3], rtol=1e-5)
    assert stats.cached_steps[:2] == [1, 2] and stats.computed_steps[:2] == [0, 3]


def test_a_zero_reference_computes(strict_graph_mode):
    streams = Streams(0, 6, 0)
    streams.image[:] = 0
    assert not any(replay(CacheConfig(1.0), streams)[1].reused)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_the_relative_difference_is_a_ratio_of_two_means_in_float32(reduction):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 5, 7)).astype(np.float32) for _ in range(2))
    ratio = relative_difference(ms.Tensor(a), ms.Tensor(b), reduction).asnumpy()
    np.testing.assert_allclose(ratio, ref.d(a, b, reduction), rtol=1e-5)
    assert ratio.dtype == np.float32


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seq_len": 0}, "seq_len"),
        ({"inner_dim": -1}, "inner_dim"),
        ({"branches": 3}, "branches"),
        ({"taylorseer_derivative": 1, "config": CacheConfig(0.1, 2)}, "taylorseer_derivative"),
        ({"taylorseer_derivative": -1}, "taylorseer_derivative"),
        ({"config": CacheConfig(Bn_compute_blocks=1)}, "text_len"),
        ({"config": CacheConfig(span="stacks")}, "text_len"),
        ({"config": CacheConfig(gate="teacache")}, "steps"),
        ({"config": CacheConfig(end=0.5)}, "steps"),
        ({"config": CacheConfig(taylorseer_derivative=1, forecast_coordinate="sigma"), "steps": 4}, "sigmas"),
        (
            {
                "config": CacheConfig(taylorseer_derivative=1, forecast_coordinate="sigma"),
                "steps": 3,
                "sigmas": [1, 0.6, 0.6, 0],
            },
            "steps 1 and 2 have 0.6",
        ),
        (
            {
                "config": CacheConfig.named("meancache").changed(meancache_steps=(1,)),
                "steps": 28,
                "sigmas": [1.0] * 28 + [0],
                "channels": 1,
            },
            "divides by distances",
        ),
    ],
)
def test_a_context_that_cannot_be_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        CacheContext(**{"batch_size": 1, "seq_len": 2, "inner_dim": 3, **arguments})


def test_a_context_refuses_a_config_of_another_structure():
    with pytest.raises(ValueError, match="CacheContext of its own"):
        CacheContext(1, 2, 3).configure(CacheConfig(0.1, 2))


def test_buffers_have_the_shapes_of_the_design():
    context = CacheContext(batch_size=2, seq_len=5, inner_dim=3, taylorseer_derivative=2)
    assert context.first_residual.shape == (2, 5, 3)
    assert context.derivatives.shape == (3, 2, 5, 3)
    assert context.filled.shape == ()


def test_only_what_a_rule_needs_is_allocated():
    """In tensors of the image stream: First-Block Cache 2, a static schedule 1, TaylorSeer's order each one more."""
    size = 1024 * 128 * 4
    for config, tensors in (
        (CacheConfig(), 2),
        (CacheConfig(taylorseer_derivative=2), 4),
        (CacheConfig.preset("fora"), 1),
        (CacheConfig.preset("delta_dit"), 1),
        (CacheConfig(gate="none"), 0),
        (CacheConfig.preset("teacache"), 2),
        (CacheConfig(gate="cg_taylor", taylorseer_derivative=1), 4),
        (CacheConfig(Bn_compute_blocks=1), 2 + 0.5),
        (CacheConfig(span="stacks"), 2 + 0.5 + 2 + 0.5),
    ):
        context = CacheContext(1, 1024, 128, config=config, text_len=512, steps=28)
        # Less than the text stream's half is left for tallies and tables.
        assert 0 <= context.nbytes / size - tensors < 0.25, str(config)


@pytest.mark.parametrize("settings", [{}, {"gate": "cg_taylor"}, {"forecast": "dicache"}, {"Bn_compute_blocks": 1}])
def test_differences_are_kept_in_float32_beside_a_bfloat16_model_and_references_are_not(settings):
    def dtypes(**more):
        config = CacheConfig(taylorseer_derivative=1, **settings, **more)
        context = CacheContext(1, 4, 6, mindspore_dtype=ms.bfloat16, config=config, text_len=2)
        return {buffer.value.name: buffer.value.dtype for buffer in context.buffers}

    model, wide = dtypes(), dtypes(derivatives_dtype="float32")
    kept = {name for name in model if name.endswith(("derivatives", "probes"))}
    assert {wide[name] for name in kept} == {ms.float32} and {model[name] for name in kept} == {ms.bfloat16}
    assert {name: dtype for name, dtype in wide.items() if name not in kept} == {
        name: dtype for name, dtype in model.items() if name not in kept
    }


def test_beside_a_float32_model_the_choice_changes_nothing(strict_graph_mode):
    streams, config = Streams(0, 12, 0.05), CacheConfig(0.4, 2)
    (outputs, stats), (others, other_stats) = (
        replay(each, streams) for each in (config, config.changed(derivatives_dtype="float32"))
    )
    assert stats.cached_steps and stats.reused == other_stats.reused
    np.testing.assert_array_equal(outputs, others)


def test_a_context_of_one_branch_refuses_the_negative_prompt():
    with pytest.raises(ValueError, match="branches=2"):
        with CacheContext(1, 2, 3)("uncond"):
            pass


def test_stats_print_as_a_small_table():
    gate = GateStats("fbcache", (False, True, True, False), (None, 0.05, 0.1, 0.2))
    other = GateStats("fbcache", (False, None, True, False), (None,) * 4)
    assert str(CacheStats((gate,), 0.375, CacheStats((other,)))).splitlines() == [
        "branch  gate     computed  reused  longest run  differences",
        "cond    fbcache  2         2       2            0.050 .. 0.200",
        "uncond  fbcache  2         1       1            -",
        "37.5% of the operations skipped",
    ]


def test_a_difference_that_is_no_number_is_told_as_none():
    context = CacheContext(1, 2, 4)
    differences = np.full(MAX_STEPS, NOT_COMPARED, np.float32)
    differences[:4] = np.nan, np.inf, -np.inf, 0.5
    ops.assign(context.gates[0].trace.value, ms.Tensor(np.stack((np.zeros_like(differences), differences))))
    ops.assign(context.step.value, ms.Tensor(5, ms.int32))
    stats = context.stats()
    assert stats.residual_diffs == (None, None, None, 0.5, None)
    assert "0.500 .. 0.500" in str(stats) and "nan" not in str(stats)
