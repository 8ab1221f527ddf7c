"""The search for the steps to compute: where it begins, how it moves, and what a mask is worth without drawing."""

import math
import random
from functools import lru_cache

import numpy as np

HEAT = 0.3
"""At the beginning a move that makes the error greater by this, in its logarithm, is accepted once in e times."""

TRIES = 20
"""So many moves are tried for each evaluation, since a move may lead to a mask that has been evaluated."""

POWERS = (0.8, 1, 1.4)
"""Masks to begin with have steps at i^p: below 1 the end of the sampling gets more of them, above 1 its beginning."""

POWER = 1.5
"""Of Estimate. On the embedded checkpoint the logarithms of estimate and error correlate by 0.91 over 78 masks of 6 to
12 computed steps. With 2 they do by 0.92, but the masks of the least estimate are worse: 10 of 28 steps gave 52.0 dB
over three prompts, with 1.5 60.1 dB."""


def starts(steps, computed):
    """Masks to begin with, a set: the computed steps at equal distances of i^p, the last step among them or not."""
    masks = set()
    for power in POWERS:
        for last in (steps - 1, steps * (computed - 1) / computed):
            places = np.round(last * np.linspace(0, 1, computed) ** power).astype(int)
            # Steps that fall together move apart, and none beyond the end.
            order = np.arange(computed)
            places = np.maximum.accumulate(places - order) + order
            places = np.minimum(places, steps - computed + order)
            masks.add(tuple(np.isin(np.arange(steps), places).astype(int).tolist()))
    return masks


def moved(mask, rng):
    """The mask with one of its computed steps elsewhere, a near place likelier than a far one; never the first step."""
    step = rng.choice([place for place, computed in enumerate(mask) if computed and place > 0])
    free = [place for place, computed in enumerate(mask) if not computed]
    (place,) = rng.choices(free, [1 / (place - step) ** 2 for place in free])
    changed = list(mask)
    changed[step], changed[place] = 0, 1
    return tuple(changed)


def anneal(error, masks, evaluations, seed=0):
    """Simulated annealing on the logarithm of an error: {mask: its error} of all masks that were tried.

    Args:
        error: a function of a mask, a tuple of 0 and 1; its value is positive, infinite at worst.
        masks: those to begin with, all of the same number of computed steps.
        evaluations: how many masks are tried; those to begin with are in any case.
        seed: of the moves.
    """
    rng, errors = random.Random(seed), {}

    def measured(mask):
        if mask not in errors:
            errors[mask] = error(mask)
        return errors[mask]

    current = min(sorted(masks), key=measured)
    for _ in range(TRIES * evaluations):
        if len(errors) >= evaluations:
            break
        heat = HEAT * (1 - len(errors) / evaluations)
        candidate = moved(current, rng)
        if measured(candidate) <= measured(current) * math.exp(heat * rng.expovariate(1)):
            current = candidate
    return errors


class Estimate:
    """What a mask is worth, without drawing: from the velocities of the uncached run.

    A reused step's velocity is taken to be the polynomial through the last computed ones. The estimate is the sum of
    the norms of what it is off by, each weighted with the step's stride in the noise level sigma and with
    (1 - sigma)^POWER: the earlier a deviation comes in, the more of it the model takes back. Since it is a sum over
    the steps, dynamic programming finds its minimum.

    Args:
        path: (N + 1, ...), the latents before, between and behind the uncached run's steps.
        sigmas: (N + 1,), the noise levels.
        order: of the polynomials; above 2 they are taken to be parabolas, for the time it takes.
        by_sigma: whether they are in the noise level, not in the step.
    """

    def __init__(self, path, sigmas, order, by_sigma=False):
        strides = np.diff(sigmas)
        velocities = np.diff(path.reshape(len(path), -1).astype(float), axis=0) / strides[:, None]
        self.products = velocities @ velocities.T / velocities.shape[1]
        self.weights, self.order = np.abs(strides) * (1 - sigmas[1:]) ** POWER, min(order, 2)
        self.coordinates = (sigmas[:-1] if by_sigma else np.arange(len(strides))).tolist()

    def costs(self, nodes):
        """The estimate up to each step behind the last of the computed steps ``nodes``, none behind it computed."""
        costs = [0.0]
        for step in range(nodes[-1] + 1, len(self.weights)):
            places = [*nodes, step]
            off = [*lagrange([self.coordinates[node] for node in nodes], self.coordinates[step]), -1]
            square = off @ self.products[np.ix_(places, places)] @ off
            costs.append(costs[-1] + self.weights[step] * math.sqrt(max(square, 0)))
        return costs

    def best(self, computed):
        """The mask of the least estimate with so many computed steps, the first one among them."""
        steps, costs = len(self.weights), lru_cache(None)(self.costs)

        @lru_cache(None)
        def rest(nodes, left):
            """The least estimate behind the computed steps ``nodes``, and the ``left`` computed steps that give it."""
            here = costs(nodes)
            if left == 0:
                return here[-1], ()
            tails = {
                step: rest((*nodes, step)[-self.order - 1 :], left - 1)
                for step in range(nodes[-1] + 1, steps - left + 1)
            }
            step = min(tails, key=lambda step: here[step - nodes[-1] - 1] + tails[step][0])
            return here[step - nodes[-1] - 1] + tails[step][0], (step, *tails[step][1])

        places = (0, *rest((0,), computed - 1)[1])
        return tuple(int(step in places) for step in range(steps))


PEAKS = 5
"""The power of an error in MeanCache's sum, which keeps the greatest ones small."""


class ShortestPath:
    """MeanCache's schedule: the path from the first step to the end with the least sum of errors^5 (arXiv 2601.19961).

    A path goes over the computed steps. The error of a way from step t to s is the mean absolute difference between
    the mean velocity over it, on the uncached run, and the one that MeanCache expects from t on, at the best K.

    Args:
        path: (N + 1, ...), the latents before, between and behind the uncached run's steps.
        sigmas: (N + 1,), the noise levels.
        most: the greatest K.
    """

    def __init__(self, path, sigmas, most):
        self.path, self.sigmas, self.most = path.reshape(len(path), -1).astype(float), sigmas, most

    def mean_velocity(self, start, stop):
        """From step ``start`` to ``stop``."""
        return (self.path[stop] - self.path[start]) / (self.sigmas[stop] - self.sigmas[start])

    def way(self, start, stop):
        """The least error of a way between two computed steps, and the K that gives it; none without reused steps."""
        if stop == start + 1:
            return 0.0, None
        errors, sigmas = (
            {1: np.abs(self.mean_velocity(start, start + 1) - self.mean_velocity(start, stop)).mean()},
            self.sigmas,
        )
        for span in range(2, min(self.most, start) + 1):
            before = start - span
            slope = self.mean_velocity(before, start) - self.mean_velocity(before, before + 1)
            expected = slope * (sigmas[stop] - sigmas[start]) / (sigmas[start] - sigmas[before])
            expected = expected + self.mean_velocity(start, start + 1)
            errors[span] = np.abs(expected - self.mean_velocity(start, stop)).mean()
        span = min(errors, key=errors.get)
        return errors[span], span

    def best(self, computed):
        """The mask with so many computed steps, the first one among them, and the K of each run of reused steps."""
        steps, way = len(self.path) - 1, lru_cache(None)(self.way)

        @lru_cache(None)
        def rest(start, left):
            """The least sum from a computed step on, and the ``left`` computed steps behind it that give it."""
            if left == 0:
                return way(start, steps)[0] ** PEAKS, ()
            tails = {step: rest(step, left - 1) for step in range(start + 1, steps - left + 1)}
            step = min(tails, key=lambda step: way(start, step)[0] ** PEAKS + tails[step][0])
            return way(start, step)[0] ** PEAKS + tails[step][0], (step, *tails[step][1])

        places = (0, *rest(0, computed - 1)[1])
        spans = [way(start, stop)[1] for start, stop in zip(places, (*places[1:], steps))]
        return tuple(int(step in places) for step in range(steps)), tuple(filter(None, spans))


def lagrange(nodes, x):
    """The weights of the values at ``nodes`` in the polynomial through them, at x."""
    return [math.prod((x - other) / (node - other) for other in nodes if other != node) for node in nodes]
