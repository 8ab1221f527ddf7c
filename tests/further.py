"""Parameters of tests whose further cases run with ``-m release`` alone."""

import pytest


def after(first, cases):
    """The cases of a parameter, for releases but for the first of them, or for those in a collection."""
    cases = list(cases)
    quick = cases[:first] if isinstance(first, int) else first
    return [case if case in quick else pytest.param(*in_tuple(case), marks=pytest.mark.release) for case in cases]


def in_tuple(case):
    """A case's values."""
    return case if isinstance(case, tuple) else (case,)
