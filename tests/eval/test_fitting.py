"""What is fitted in the closed loop: the method, the factors it moves, and what ranks and killed runs share."""

import threading

import numpy as np
import pytest
import references

from FBCache_ms.eval.shared.closed_loop import Ledger
from FBCache_ms.eval.shared.fitting import DAMPINGS, LEAST_CURVATURE, Factors, levenberg_marquardt, stepwise_weights


def test_a_step_of_the_method_solves_a_linear_problem():
    rng = np.random.default_rng(0)
    matrix, wanted, point, widths = rng.normal(size=(9, 3)), rng.normal(size=9), rng.normal(size=3), np.full(3, 0.1)
    points = [point, *(point + step for step in np.diag(widths))]
    tries = levenberg_marquardt(np.array([matrix @ each - wanted for each in points]), point, widths)
    normal = matrix.T @ matrix
    curvature = np.diag(normal) + LEAST_CURVATURE * np.trace(normal) / 3
    for damping, found in zip(DAMPINGS, tries):
        # Its minimum: no slope of the squares and the damping together.
        slope = matrix.T @ (matrix @ found - wanted) + damping * curvature * (found - point)
        np.testing.assert_allclose(slope, 0, atol=1e-9)


def test_the_method_finds_the_minimum_of_a_curved_valley():
    """Rosenbrock's function, whose minimum 0 lies at (1, 1)."""
    point, widths = np.array([-1.2, 1.0]), np.full(2, 1e-4)

    def deviation(p):
        return np.array([10 * (p[1] - p[0] ** 2), 1 - p[0]])

    for _ in range(100):
        points = [point, *(point + step for step in np.diag(widths))]
        tries = levenberg_marquardt(np.array(list(map(deviation, points))), point, widths)
        point = min([point, *tries], key=lambda p: np.square(deviation(p)).sum())
    np.testing.assert_allclose(point, 1, atol=1e-3)


def test_a_number_that_changes_nothing_stays():
    deviations = np.array([[1.0, 2.0], [1.1, 2.0], [1.0, 2.0]])
    for found in levenberg_marquardt(deviations, np.array([0.0, 5.0]), np.array([0.1, 0.1])):
        assert found[1] == 5


def test_factors_start_at_taylorseers_order_1_and_multiply_its_weights():
    # Runs of two, one and three reused steps; one, two and three differences are there.
    mask = (1, 0, 0, 1, 0, 1, 0, 0, 0)
    factors = Factors(mask, 3)
    assert factors.orders.tolist() == [0, 0, 1, 0, 1, 2]
    start = np.reshape(factors.weights(factors.start), (-1, 3)).tolist()
    assert start == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 2, 0], [1, 3, 0]]
    weights = np.reshape(factors.weights(np.array([2, 3, 4, 5, 6, 7.0])), (-1, 3)).tolist()
    assert weights == [[2, 0, 0], [2, 0, 0], [3, 4, 0], [5, 6, 3.5], [5, 12, 14], [5, 18, 31.5]]


def test_weights_have_six_digits():
    assert Factors((1, 0), 1).weights(np.array([1 / 3])) == (0.333333,)


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_the_step_by_step_fit_is_least_squares_on_the_last_values(orders):
    """Weighted sums of TaylorSeer's differences, as the loop keeps them, against the values themselves."""
    rng, mask = np.random.default_rng(0), (1, 0, 1, 1, 0, 0, 1, 0, 0)
    values = rng.normal(size=(len(mask), 40)).cumsum(0)
    rows = np.reshape(stepwise_weights(values @ values.T, mask, orders), (-1, orders))
    computed, reused = [], iter(rows)
    for step, is_computed in enumerate(mask):
        if is_computed:
            computed.append((step, values[step]))
            continue
        last = np.array([value for _, value in computed[-orders:]])
        expected = last.T @ np.linalg.lstsq(last.T, values[step], rcond=None)[0]
        found = references.table(computed, orders - 1, next(reused))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_draw_a_share_each_and_find_the_same(world, tmp_path):
    drawn, found = [], []

    def run(rank):
        ledger = Ledger(tmp_path, (rank, world))

        def draw(config):
            drawn.append((rank, config))
            return np.full(2, config)

        found.append(ledger.drawn("sum", draw, range(7), lambda arrays: float(np.sum(arrays))))
        found.append(ledger.found("rank", lambda: rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == sorted((config % world, config) for config in range(7))
    assert sorted(found) == world * [0] + world * [42.0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank.json", "sum.json"]


def test_a_killed_run_goes_on_with_what_it_had_drawn(tmp_path):
    class Killed(Exception):
        pass

    drawn = []

    def draw(config):
        if len(drawn) == 3:
            raise Killed
        drawn.append(config)
        return np.array(config)

    with pytest.raises(Killed):
        Ledger(tmp_path, (0, 1)).drawn("most", draw, range(5), lambda arrays: int(np.max(arrays)))
    more = []
    find = Ledger(tmp_path, (0, 1)).drawn
    assert find("most", lambda config: more.append(config) or np.array(config), range(5), lambda a: int(np.max(a))) == 4
    assert more == [3, 4]
    assert find("most", None, range(5), None) == 4


def test_what_is_no_number_is_found_as_none(tmp_path):
    assert Ledger(tmp_path, (0, 1)).found("error", lambda: np.inf) is None
