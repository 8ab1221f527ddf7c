"""Numbers that are fitted by what comes of them in the end, by Levenberg and Marquardt's method."""

import numpy as np

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1, 10)
"""The shares of their own curvature by which the numbers are held back; all are tried, and the best one counts."""

LEAST_CURVATURE = 1e-4
"""Of a number, as a share of the mean: one that changes next to nothing does not run away."""


def levenberg_marquardt(deviations, point, widths):
    """The points to try next, a list of arrays, by one step of the method (Marquardt 1963).

    Each minimises |d + S (p - point)|^2 and a damping times every number's curvature; d are the deviations at
    ``point``, S their slopes.

    Args:
        deviations: (P + 1, R), what is to become small: at ``point``, then with each of its numbers moved.
        point: (P,).
        widths: (P,), how far each number was moved.
    """
    slopes = (deviations[1:] - deviations[0]) / widths[:, None]
    normal, gradient = slopes @ slopes.T, slopes @ deviations[0]
    curvature = np.diag(normal) + LEAST_CURVATURE * np.trace(normal) / len(normal)
    return [point - np.linalg.solve(normal + damping * np.diag(curvature), gradient) for damping in DAMPINGS]


class Factors:
    """The weights of a table's forecast, from a factor for each order in each run of reused steps.

    A weight is the factor times TaylorSeer's own, k^i / i! at k steps from the computed one. An order that a run cannot
    have yet, since too few steps were computed, has none.

    Args:
        mask: of 0 and 1, a step each, the first of them computed.
        orders: K, how many differences are weighted.
    """

    def __init__(self, mask, orders):
        runs, distances, run, distance = [], [], -1, 0
        for computed in mask:
            run, distance = (run + 1, 0) if computed else (run, distance + 1)
            if not computed:
                runs.append(run)
                distances.append(distance)
        powers = np.array(distances, float)[:, None] ** np.arange(orders)
        self.taylor = powers / np.cumprod([1, *range(1, orders)])
        places = [(run, order) for run in sorted(set(runs)) for order in range(min(run + 1, orders))]
        self.orders = np.array([order for _, order in places])
        # At -1 stands a factor of 0.
        self.places = np.array(
            [[places.index((run, order)) if order <= run else -1 for order in range(orders)] for run in runs]
        )

    @property
    def start(self):
        """TaylorSeer's of order 1, (P,)."""
        return (self.orders < 2).astype(float)

    @property
    def widths(self):
        """How far a factor is moved for its derivative: the newest residual's is the more sensible one, (P,)."""
        return np.where(self.orders == 0, 0.003, 0.03)

    def weights(self, factors):
        """The forecast_weights of a CacheConfig, to six digits: fewer would show in the derivatives."""
        weights = np.append(factors, 0.0)[self.places] * self.taylor
        return tuple(float(f"{weight:.6g}") for weight in weights.ravel())


RIDGE = 1e-5
"""What keeps the step-by-step fit's weights small, as a share of the mean square of what they weight."""


def stepwise_weights(products, mask, orders):
    """The forecast_weights that forecast each reused step best from the last K computed ones of an uncached run.

    For step s and the computed steps A before it: W_s = (G_AA + RIDGE mean(diag G_AA) I)^-1 G_As (L2P), told in
    TaylorSeer's differences of these values.

    Args:
        products: G, (N, N), the steps' inner products with each other.
        mask: of 0 and 1, a step each, the first of them computed.
        orders: K.
    """
    weights, computed = [], []
    for step, is_computed in enumerate(mask):
        if is_computed:
            computed.append(step)
            continue
        nodes = computed[: -orders - 1 : -1]
        among = products[np.ix_(nodes, nodes)]
        among = among + RIDGE * np.trace(among) / len(nodes) * np.eye(len(nodes))
        of_values = np.linalg.solve(among, products[nodes, step])
        of_differences = np.linalg.solve(differences_of_values(nodes).T, of_values)
        weights += [*of_differences, *(orders - len(nodes)) * [0.0]]
    return tuple(float(f"{weight:.6g}") for weight in weights)


def differences_of_values(nodes):
    """The matrix that makes TaylorSeer's differences of the values at some steps, the newest first, (K, K)."""
    older = np.zeros((0, len(nodes)))
    for index in reversed(range(len(nodes))):
        newest = np.eye(len(nodes))[[index]]
        for order in range(len(nodes) - 1 - index):
            difference = (newest[order] - older[order]) / (nodes[index] - nodes[index + 1])
            newest = np.concatenate([newest, difference[None]])
        older = newest
    return older
