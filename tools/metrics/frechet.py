"""Prints torch-fidelity's Frechet distances of features that NumPy draws, which test_quality.py compares with.

tools/metrics/venv/bin/python tools/metrics/frechet.py
"""

from importlib.metadata import version

import numpy as np

CASES = ((500, 300, 16), (40, 30, 100), (2, 2, 3))
"""How many features of either set, and of how many dimensions."""


def draw(number, other, size):
    """Two sets of features (N, D): correlated, with means of their own."""
    rng = np.random.default_rng((number, other, size))
    mixing = rng.normal(size=(2, size, size))
    first = rng.normal(size=(number, size)) @ mixing[0]
    return first, rng.normal(size=(other, size)) @ mixing[1] + rng.normal(size=size)


if __name__ == "__main__":
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    print("torch-fidelity", version("torch-fidelity"), "numpy", np.__version__)
    for case in CASES:
        first, second = ({"mu": part.mean(0), "sigma": np.cov(part, rowvar=False)} for part in draw(*case))
        print(case, repr(fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]))
