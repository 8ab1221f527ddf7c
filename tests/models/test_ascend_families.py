"""Qwen-Image and FLUX.2 as an Ascend NPU would get them: compiled in bfloat16 and STRICT syntax, and read back.

One structure of each is compiled at the published model's depth, the others are shallow.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ascend_graphs import DEPTHS, GRAPHS
from mindir import BFLOAT16, FLOAT64, MindIR

from FBCache_ms.cache.gates import plan
from FBCache_ms.config import CacheConfig

SHALLOW = {"qwenimage": (6, 0), "flux2": (3, 4)}
FULL_DEPTH = "qwenimage_loop_true_CFG_last_blocks", "flux2_loop"
STACKS = ("doubles", "singles")
RUNS = {
    "qwenimage_loop": ((0,), STACKS),
    "qwenimage_loop_true_CFG_last_blocks": ((*range(24), *range(-24, 0)), STACKS),
    "qwenimage_loop_TeaCache": ((), STACKS),
    "qwenimage_loop_EasyCache": ((), STACKS),
    "qwenimage_step_true_CFG": ((0,), STACKS),
    "flux2_loop": ((0,), STACKS),
    "flux2_loop_last_blocks": ((0, 1, 2, -2, -1), STACKS),
    "flux2_loop_double_gate": ((0, "first single"), (0, "singles"), ("doubles", "first single"), STACKS),
    "flux2_loop_EasyCache": ((), STACKS),
    "flux2_step": ((0,), STACKS),
}
"""Which blocks run on each way through a graph's gates; those below 0 count from the last one."""

PARAMETERS = [pytest.param(name, marks=pytest.mark.release) for name in RUNS]

ENDS = {"qwenimage": ("img_in.weight", "proj_out.weight"), "flux2": ("x_embedder.weight", "proj_out.weight")}
"""The products that a computed step begins and ends with."""

SCRIPT = """
import ast, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ascend_graphs import export

names, depth = ast.literal_eval(sys.argv[2])
list(export(names, Path(), True, depth))
"""


def depth(name):
    family = GRAPHS[name].family
    return DEPTHS[family] if name in FULL_DEPTH else SHALLOW[family]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the .mindir file of a structure; those of one family and depth are written by one process."""
    files, benchmarks = {}, Path(__file__).parents[2] / "benchmarks"

    def file(name):
        if name not in files:
            graph = GRAPHS[name]
            alone = name in FULL_DEPTH or "teacache" in graph.tag
            like = [each for each in RUNS if GRAPHS[each].family == graph.family and depth(each) == depth(name)]
            names = [name] if alone else [each for each in like if "teacache" not in GRAPHS[each].tag]
            folder = tmp_path_factory.mktemp("mindir")
            command = [sys.executable, "-c", SCRIPT, str(benchmarks), repr((names, depth(name)))]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            files.update({each: MindIR(folder / f"{each}.mindir") for each in names})
        return files[name]

    return file


def numbers_of(blocks, doubles, singles):
    """The blocks' numbers, doubles and singles counted together."""
    parts = {"doubles": range(doubles), "singles": range(doubles, doubles + singles), "first single": [doubles]}
    return frozenset(
        number
        for block in blocks
        for number in (parts[block] if isinstance(block, str) else [block % (doubles + singles)])
    )


def block_of(weight, doubles):
    """The number of the block that a weight belongs to, None for one of another layer."""
    stack, _, rest = weight.partition(".")
    first = {"transformer_blocks": 0, "single_transformer_blocks": doubles}.get(stack)
    return None if first is None else first + int(rest.partition(".")[0])


def test_every_structure_of_these_families_is_compiled():
    others = {name: graph for name, graph in GRAPHS.items() if graph.family in SHALLOW}
    assert set(RUNS) == {name for name, graph in others.items() if graph.quantize is None and graph.ranks == 1}


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_way_through_the_graph_runs_its_blocks_once_and_no_other(exported, name):
    graph, (doubles, singles), found = GRAPHS[name], depth(name), set()
    for path in exported(name).paths():
        products = Counter({weight: count for (_, weight), count in path.items() if weight and "weight" in weight})
        products = Counter({weight: count for weight, count in products.items() if "norm_" not in weight})
        numbers = frozenset(block_of(weight, doubles) for weight in products) - {None}
        ends = [products[weight] for weight in ENDS[graph.family]]
        whole_model = "easycache" in graph.tag and ends == [0, 0]
        if not whole_model and ends != [1, 1]:
            continue
        if whole_model and numbers:
            continue
        of_blocks = {weight: count for weight, count in products.items() if block_of(weight, doubles) is not None}
        probe = "transformer_blocks.0.img_mod.1.weight" if "teacache" in graph.tag else None
        assert all(count == 1 for weight, count in of_blocks.items() if weight != probe)
        if probe:
            numbers = frozenset(block_of(weight, doubles) for weight in of_blocks if weight != probe)
        attentions = sum(count for (operator, _), count in path.items() if operator == "FlashAttentionScore")
        assert attentions == len(numbers)
        found.add(numbers)
    assert found == {numbers_of(blocks, doubles, singles) for blocks in RUNS[name]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_graph_has_its_loops_and_nothing_that_an_npu_cannot_run(exported, name):
    graph, net = GRAPHS[name], exported(name)
    one_gate = len(plan(CacheConfig.from_tag(graph.tag))) == 1
    assert len(net.loops) == (1 + one_gate if graph.kind == "loop" else 0)
    assert {dtype for dtype, _ in net.tensors}.isdisjoint(FLOAT64)
    assert all(size >= 0 for _, sizes in net.tensors for size in sizes)
    assert any(dtype == BFLOAT16 for dtype, _ in net.tensors)
    assert not [operator for operator in net.operators if operator.startswith(("Py", "Print", "TensorDump", "Host"))]
