"""Loops with int8 weights as an Ascend NPU would get them: compiled in bfloat16 and STRICT syntax, and read back.

FLUX.1's are compiled at its 19 double and 38 single blocks, the others shallow; with --full_depth all are not.
"""

import subprocess
import sys
from pathlib import Path

import further
import pytest
from ascend_graphs import DEPTHS, GRAPHS
from mindir import FLOAT64, MindIR

SHALLOW = {"flux": (3, 4), "qwenimage": (4, 0), "flux2": (3, 4)}
NAMES = [name for name, graph in GRAPHS.items() if graph.quantize and graph.ranks == 1]

LAYERS = {"flux": {"double": 14, "single": 6}, "qwenimage": {"double": 14}, "flux2": {"double": 12, "single": 2}}
"""Linear layers of a block."""

MODULATION = {"flux": {"double": 2, "single": 1}, "qwenimage": {"double": 2}, "flux2": {"double": 0, "single": 0}}
"""Those of them that make the modulation, whose inputs stay as they are."""

NOT_RUN = {"flux": 0, "qwenimage": 3, "flux2": 0}
"""Those that only the text stream behind the last block would need."""

FIRST = {"flux": "x_embedder.weight", "qwenimage": "img_in.weight", "flux2": "x_embedder.weight"}

WEIGHT_ONLY, BOTH, ROUND = "WeightQuantBatchMatmul", "QuantBatchMatmul", "DynamicQuantExt"

SCRIPT = """
import ast, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ascend_graphs import export

name, depth = ast.literal_eval(sys.argv[2])
list(export([name], Path(), True, depth))
"""


@pytest.fixture(scope="module", params=further.after(["loop_int8"], NAMES))
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


def test_a_step_runs_int8_products_for_its_blocks_and_no_others(exported):
    graph, (doubles, singles), net = exported
    layers, modulation, found = LAYERS[graph.family], MODULATION[graph.family], {}
    for path in net.paths():
        if path["Dense", FIRST[graph.family]] != 1:
            continue
        assert not any(operator == "Dense" and "transformer_blocks." in (weight or "") for operator, weight in path)
        attentions = sum(count for (operator, _), count in path.items() if operator == "FlashAttentionScore")
        found[attentions] = [
            sum(count for (operator, weight), count in path.items() if operator == name and is_weight(weight))
            for name in (WEIGHT_ONLY, BOTH, ROUND)
        ]
    assert set(found) == {1, doubles + singles}
    every = doubles * layers["double"] + singles * layers.get("single", 0) - NOT_RUN[graph.family]
    modulating = doubles * modulation["double"] + singles * modulation.get("single", 0)
    weight_only, both, rounded = found[doubles + singles]
    if graph.quantize == "int8_weight_only":
        assert (weight_only, both, rounded) == (every, 0, 0)
    else:
        assert (weight_only, both) == (modulating, every - modulating)
        # What several layers read is rounded once for all of them.
        assert 0 < rounded < both


def is_weight(name):
    """Whether an operator's input is a weight, or has no name."""
    return name is None or name.endswith(".weight")


def test_nothing_is_there_that_an_npu_cannot_run(exported):
    _, _, net = exported
    assert {dtype for dtype, _ in net.tensors}.isdisjoint(FLOAT64)
    assert all(size >= 0 for _, sizes in net.tensors for size in sizes)
    assert not [operator for operator in net.operators if operator.startswith(("Py", "Print", "TensorDump", "Host"))]
