"""Requests in any order, however they end, give what each gives alone in a fresh process."""

import multiprocessing
import random

import numpy as np
import pytest
from alone import ENDS, FINISHED, REQUESTS, alone, answer, cached_step, whole_loop
from narrow import make_narrow

processes = multiprocessing.get_context("forkserver")
# Imported once, so that a start does not take the time of all imports.
processes.set_forkserver_preload(["FBCache_ms.pipelines.flux", "mindone.transformers"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_narrow(tmp_path_factory.mktemp("interleaving") / "narrow")


@pytest.mark.parametrize(
    "make", [pytest.param(whole_loop, marks=pytest.mark.slow), pytest.param(cached_step, marks=pytest.mark.release)]
)
def test_requests_do_not_see_each_other(folder, make):
    with processes.Pool(1, maxtasksperchild=1) as pool:
        expected = dict(zip(REQUESTS, pool.starmap(alone, [(make, folder, name) for name in REQUESTS], chunksize=1)))
    assert all(stats.cached_steps for _, stats in expected.values())

    order = random.Random(0)
    requests = [(name, end) for name in REQUESTS for end in (*ENDS, FINISHED)]
    order.shuffle(requests)
    pipe = make(folder)
    for name, end in requests:
        got = answer(pipe, name, end)
        if end == FINISHED:
            np.testing.assert_array_equal(got[0], expected[name][0], err_msg=name)
            assert got[1] == expected[name][1]
    graphs = pipe.graph_compilations if make is whole_loop else len(pipe.transformer.steps)
    assert graphs == (3 if make is whole_loop else 2)
