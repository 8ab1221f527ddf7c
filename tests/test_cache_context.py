import numpy as np
import pytest

import mindspore as ms
from mindspore import nn

from FBCache_ms import CacheConfig, CacheContext
from FBCache_ms.utils import finite_differences, relative_difference, taylor_forecast

SHAPE = (1, 4, 3)


class Replay(nn.Cell):
    """A generation without a transformer: probes and residuals (N, *SHAPE) are given, what is added comes back."""

    def __init__(self, cache):
        super().__init__(auto_prefix=False)
        self.cache = cache

    def construct(self, probes, residuals, added, start, stop, threshold, warmup):
        cache = self.cache
        cache.set_knobs(threshold, warmup)
        if start == 0:
            cache.reset()
        step = start
        while step < stop:
            probe, residual = probes[step], residuals[step]
            reuse, difference = cache.decide(probe)
            if reuse:
                residual = cache.forecast()
            else:
                cache.store(probe, residual)
            cache.end_step(reuse, difference)
            added[step] = residual
            step = step + 1
        return added


def replay(loop, probes, residuals, threshold, warmup=0, pieces=None):
    tensor = ms.Tensor
    added = tensor(np.zeros_like(residuals))
    for start, stop in pieces or [(0, len(probes))]:
        scalars = tensor(start, ms.int32), tensor(stop, ms.int32), tensor(threshold, ms.float32)
        added = loop(tensor(probes), tensor(residuals), added, *scalars, tensor(warmup, ms.int32))
    return added.asnumpy(), loop.cache.stats()


def reference(probes, residuals, threshold, warmup, order):
    """The rule in NumPy, from RULES: which steps are reused, their differences, and what is added at each step."""
    stored, last, differences = None, None, []
    reused, diffs, added = [], [], []
    for step, (probe, residual) in enumerate(zip(probes, residuals)):
        diff = None
        if stored is not None and step >= warmup and threshold > 0:
            with np.errstate(all="ignore"):
                diff = np.abs(stored - probe).mean() / np.abs(stored).mean()
        reuse = diff is not None and bool(diff < np.float32(threshold))
        if reuse:
            k = step - last
            residual = sum(k**i / np.prod(range(1, i + 1)) * d for i, d in enumerate(differences))
        else:
            new = [residual]
            for old in differences[:order]:
                new.append((new[-1] - old) / (step - last))
            stored, last, differences = probe, step, new
        reused.append(reuse)
        diffs.append(diff)
        added.append(residual)
    return reused, diffs, np.stack(added)


@pytest.fixture(scope="module")
def loops():
    return {order: Replay(CacheContext(*SHAPE, taylorseer_derivative=order)) for order in (0, 1, 2, 3)}


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_random_generations_follow_the_rule(loops, order, strict_graph_mode):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        steps, threshold, warmup = int(rng.integers(1, 20)), float(rng.uniform(0, 1)), int(rng.integers(0, 6))
        probes = np.cumsum(rng.normal(size=(20, *SHAPE)) * 0.3, 0).astype(np.float32)
        residuals = np.cumsum(rng.normal(size=(20, *SHAPE)), 0).astype(np.float32)
        cut = int(rng.integers(0, steps + 1))
        added, stats = replay(loops[order], probes, residuals, threshold, warmup, [(0, cut), (cut, steps)])
        reused, diffs, expected = reference(probes[:steps], residuals[:steps], threshold, warmup, order)
        if cut == 0:
            added, stats = replay(loops[order], probes, residuals, threshold, warmup, [(0, steps)])
        assert stats.reused == tuple(reused)
        assert [diff is None for diff in stats.residual_diffs] == [diff is None for diff in diffs]
        np.testing.assert_allclose(
            np.array(stats.residual_diffs, float), np.array(diffs, float), rtol=1e-5, atol=1e-6, equal_nan=True
        )
        np.testing.assert_allclose(added[:steps], expected, rtol=1e-4, atol=1e-4)
        assert int(loops[order].cache.total.asnumpy()) == sum(reused)
    assert len(loops[order].compile_cache) == 1


def test_a_step_computes_when_the_difference_is_no_number(loops, strict_graph_mode):
    ones = np.ones((20, *SHAPE), np.float32)
    probes = ones.copy()
    probes[1, 0, 0, 0], probes[3, 0, 0, 0] = np.nan, np.inf
    _, stats = replay(loops[0], probes, ones, 1.0)
    assert stats.reused[:5] == (False, False, False, False, False)
    assert np.isnan(stats.residual_diffs[1])
    assert all(stats.reused[5:])


def test_a_zero_reference_computes(loops, strict_graph_mode):
    zeros = np.zeros((20, *SHAPE), np.float32)
    assert not any(replay(loops[0], zeros, zeros, 1.0)[1].reused)


def test_nothing_is_left_of_a_generation_that_went_wrong(loops, strict_graph_mode):
    rng = np.random.default_rng(0)
    probes, residuals = (rng.normal(size=(20, *SHAPE)).astype(np.float32) for _ in range(2))
    before = replay(loops[2], probes, residuals, 0.9)
    replay(loops[2], np.full_like(probes, np.nan), np.full_like(probes, np.nan), 1.0)
    after = replay(loops[2], probes, residuals, 0.9)
    assert before[1] == after[1]
    np.testing.assert_array_equal(before[0], after[0])


def test_the_threshold_is_exclusive(loops, strict_graph_mode):
    probes = np.ones((20, *SHAPE), np.float32)
    probes[1:] *= 1.5
    assert not replay(loops[0], probes, probes, 0.5)[1].reused[1]
    assert replay(loops[0], probes, probes, 0.5001)[1].reused[1]


def test_the_difference_is_taken_against_the_last_computed_step(loops, strict_graph_mode):
    probes = np.stack([np.full(SHAPE, 1 + 0.1 * step, np.float32) for step in range(20)])
    _, stats = replay(loops[0], probes, probes, 0.25)
    np.testing.assert_allclose(stats.residual_diffs[1:4], [0.1, 0.2, 0.3], rtol=1e-5)
    assert stats.cached_steps[:2] == [1, 2] and stats.computed_steps[:2] == [0, 3]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_forecasts_are_the_closed_forms(order, gap):
    """From values y at t = 0, gap, 2 gap, ...: every order divides by the newest gap, weights are k^i / i!."""
    values = [2.0, -1.0, 5.0, 4.0, 7.0]
    derivatives = ms.Tensor(np.zeros((order + 1, *SHAPE)), ms.float32)
    for index, value in enumerate(values):
        filled, distance = ms.Tensor(min(index, order + 1), ms.int32), ms.Tensor(float(gap), ms.float32)
        derivatives = finite_differences(ms.Tensor(np.full(SHAPE, value), ms.float32), derivatives, filled, distance)
    a, b, c, d = values[-1], values[-2], values[-3], values[-4]
    differences = [a, (a - b) / gap, (a - 2 * b + c) / gap**2, (a - 3 * b + 3 * c - d) / gap**3]
    for k in (1, 2, 5):
        closed = sum(weight * D for weight, D in zip((1, k, k**2 / 2, k**3 / 6), differences[: order + 1]))
        forecast = taylor_forecast(derivatives, ms.Tensor(float(k), ms.float32)).asnumpy()
        np.testing.assert_allclose(forecast, np.full(SHAPE, closed), rtol=1e-5)


@pytest.mark.parametrize("k, gap", [(1, 1), (2, 3), (4, 2)])
def test_taylorseer_of_order_2_misses_a_parabola_by_k_times_the_gap(k, gap):
    derivatives = ms.Tensor(np.zeros((3, *SHAPE)), ms.float32)
    times = [0, gap, 2 * gap, 3 * gap]
    for index, t in enumerate(times):
        value = ms.Tensor(np.full(SHAPE, t**2), ms.float32)
        filled = ms.Tensor(min(index, 3), ms.int32)
        derivatives = finite_differences(value, derivatives, filled, ms.Tensor(float(gap), ms.float32))
    error = taylor_forecast(derivatives, ms.Tensor(float(k), ms.float32)).asnumpy() - (times[-1] + k) ** 2
    np.testing.assert_allclose(error, np.full(SHAPE, -k * gap), rtol=1e-5)


def test_an_order_ramps_up_with_the_computed_steps(loops, strict_graph_mode):
    line = np.stack([np.full(SHAPE, 3.0 * step, np.float32) for step in range(20)])
    probes = np.ones_like(line)
    for computed, expected in ((1, 0.0), (2, 3.0 * 3), (3, 3.0 * 4)):
        added, stats = replay(loops[3], probes, line, 0.5, warmup=computed, pieces=[(0, computed + 2)])
        assert stats.computed_steps == list(range(computed))
        np.testing.assert_allclose(added[computed + 1], np.full(SHAPE, expected), rtol=1e-6)


def test_the_relative_difference_is_a_ratio_of_two_means_in_float32():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 5, 7)).astype(np.float32) for _ in range(2))
    ratio = relative_difference(ms.Tensor(a), ms.Tensor(b)).asnumpy()
    np.testing.assert_allclose(ratio, np.abs(a - b).mean() / np.abs(a).mean(), rtol=1e-5)
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
    ],
)
def test_a_context_that_cannot_be_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        CacheContext(**{"batch_size": 1, "seq_len": 2, "inner_dim": 3, **arguments})


def test_buffers_have_the_shapes_of_the_design():
    context = CacheContext(batch_size=2, seq_len=5, inner_dim=3, taylorseer_derivative=2)
    assert context.first_residual.shape == (2, 5, 3)
    assert context.derivatives.shape == (3, 2, 5, 3)
    assert context.filled.shape == context.last.shape == context.run.shape == context.total.shape == ()


def test_a_context_of_one_branch_refuses_the_negative_prompt():
    with pytest.raises(ValueError, match="branches=2"):
        with CacheContext(1, 2, 3)("uncond"):
            pass
