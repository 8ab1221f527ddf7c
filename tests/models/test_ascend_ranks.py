"""Loops of a picture on several devices as an NPU gets them: compiled for a group that is not there, and read back.

FLUX.1's are compiled at its 19 double and 38 single blocks, the others shallow; with --full_depth all are not.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from ascend_graphs import DEPTHS, GRAPHS
from mindir import FLOAT64, MindIR

SHALLOW = {"flux": (3, 4), "qwenimage": (4, 0), "flux2": (3, 4)}
NAMES = [name for name, graph in GRAPHS.items() if graph.ranks > 1]
FIRST = {"flux": "x_embedder.weight", "qwenimage": "img_in.weight", "flux2": "x_embedder.weight"}

SCRIPT = """
import ast, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ascend_graphs import export

name, depth = ast.literal_eval(sys.argv[2])
list(export([name], Path(), True, depth))
"""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.release) for name in NAMES])
def exported(request, tmp_path_factory):
    """A Graph, its depth and its MindIR."""
    graph = GRAPHS[request.param]
    full = request.config.getoption("full_depth") or graph.family == "flux"
    depth = (DEPTHS if full else SHALLOW)[graph.family]
    folder, benchmarks = tmp_path_factory.mktemp("mindir"), Path(__file__).parents[2] / "benchmarks"
    command = [sys.executable, "-c", SCRIPT, str(benchmarks), repr((request.param, depth))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return graph, depth, MindIR(folder / f"{request.param}.mindir")


def test_a_block_a_decision_and_the_two_halves_exchange_as_often_as_they_have_to(exported):
    graph, depth, net = exported
    found = set()
    for path in net.paths():
        if path["Dense", FIRST[graph.family]] != 1:
            continue
        found.add(
            tuple(
                sum(count for (operator, _), count in path.items() if operator == name)
                for name in ("FlashAttentionScore", "AllGather", "AlltoAll")
            )
        )
    # A call that finds that it has to compute hands over no velocity yet, one that has computed does.
    halves = {1: (0, 1), sum(depth): (1, 2)} if graph.cfg_parallel else {1: (0,), sum(depth): (0,)}
    # A block's keys and values by one gathering, or its heads there and back.
    gathered, turned = (1, 0) if graph.scheme == "gather" else (0, 2)
    assert found == {
        (blocks, gathered * blocks + 1 + more, turned * blocks) for blocks, each in halves.items() for more in each
    }


def test_nothing_is_there_that_an_npu_cannot_run(exported):
    _, _, net = exported
    assert {dtype for dtype, _ in net.tensors}.isdisjoint(FLOAT64)
    assert all(size >= 0 for _, sizes in net.tensors for size in sizes)
    assert not [operator for operator in net.operators if operator.startswith(("Py", "Print", "TensorDump", "Host"))]
