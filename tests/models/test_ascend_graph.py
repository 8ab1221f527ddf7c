"""The unmodified Ascend path, bfloat16 and FlashAttentionScore, compiled without an Ascend, in processes of their own,
since this one has the CPU's stand-ins in place; and read back.

One structure is compiled at FLUX.1's 19 double and 38 single blocks, the others at 3 and 4; with --full_depth all.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import further
import pytest
from ascend_graphs import DEPTHS, GRAPHS
from mindir import BFLOAT16, FLOAT64, MindIR

import mindspore as ms

from FBCache_ms.cache.gates import every_gate, plan
from FBCache_ms.config import CacheConfig
from FBCache_ms.rules.when import GATES

DOUBLE_STACK, SINGLE_STACK, SINGLE_0 = "the double stack", "the single stack", "the first single block"
ALL = (DOUBLE_STACK, SINGLE_STACK)
PLAIN = ((0,), ALL)
STACKS = ((0, SINGLE_0), (0, SINGLE_STACK), (DOUBLE_STACK, SINGLE_0), ALL)
RUNS = {
    "loop": PLAIN,
    "loop_no_gate": (ALL,),
    "loop_order_1_last_blocks": ((0, 1, 2, -2, -1), ALL),
    "loop_order_2_schnell": PLAIN,
    "loop_order_3_batch_2": PLAIN,
    "loop_double_gate": STACKS,
    "loop_single_stack": ((DOUBLE_STACK,), ALL),
    "loop_TeaCache": ((), ALL),
    "loop_TeaCache_and_FBCache": PLAIN,
    "loop_TeaCache_or_FBCache": ((), (0,), ALL),
    "loop_static": ((), ALL),
    "loop_table": ((), ALL),
    "loop_Spectrum": ((), ALL),
    "loop_MeanCache": ((), ALL),
    "loop_EasyCache": ((), ALL),
    "loop_SpeCa": ((), ALL),
    "loop_DuCa": ((), ALL),
    "loop_CG_Taylor": ((0, 1, -1), ALL),
    "loop_DiCache": PLAIN,
    "loop_true_CFG": PLAIN,
    "step": PLAIN,
    "step_true_CFG_double_gate": STACKS,
    "step_ToCa_true_CFG_batch_2": ((), ALL),
}
"""Which blocks run on each way through a graph's gates; -1 is the last one.

Where chosen tokens are refreshed, one more way runs all blocks without their attention.
"""

PRODUCTS = {"double": 14, "single": 6}
"""Matrix products of a block: a double one has two modulations, eight of attention, four of its MLPs; a single one a
modulation, three of attention, two of its MLP."""

REFRESHED = {"double": 6, "single": 3}
"""Those of a block that is refreshed: its modulations and its MLPs."""

TEXT_END = 2
"""Those of a double block that only the text stream behind it needs: its MLP."""

BY_STREAM = ("proj_mlp", "proj_out")
"""The layers of a single block that run once a stream where it is divided."""

BEFORE_THE_LOOP = "context_embedder", "time_text_embed.text_embedder", "time_text_embed.guidance_embedder"
"""Layers that run once a generation."""

TEACACHE_PROBE = "transformer_blocks.0.norm1.linear.weight"
FULL_DEPTH = ("loop",)
SHALLOW = (3, 4)
SHARED, WRITTEN_OUT = "shared", "written out"
CASES = [(name, SHARED) for name in RUNS] + [("loop", WRITTEN_OUT)]
"""With lazy_inline, where equal blocks share a graph; and once without, as is the default, which takes much longer."""

PARAMETERS = further.after([("loop", SHARED)], CASES)

SCRIPT = """
import ast, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ascend_graphs import export

names, lazy_inline, *depth = ast.literal_eval(sys.argv[2])
list(export(names, Path(), lazy_inline, depth))
"""


def is_plain(graph):
    """Whether this file reads a structure: of dense weights, on one device."""
    return graph.quantize is None and graph.ranks == 1


def depth(name, config):
    """How many double and single blocks a structure is compiled with."""
    return DEPTHS["flux"] if name in FULL_DEPTH or config.getoption("full_depth") else SHALLOW


class Exported:
    """The .mindir file of each case, written when it is first asked for, with all others of one process."""

    def __init__(self, folder, config):
        self.folder, self.config, self.files = folder, config, {}

    def process(self, case):
        """What tells the process that writes a case."""
        name, kind = case
        # Every MindSpore but 2.7.0 crashes where it compiles a TeaCache gate after any other graph.
        alone = name if "teacache" in GRAPHS[name].tag and ms.__version__ != "2.7.0" else None
        return alone, kind, *depth(name, self.config)

    def __getitem__(self, case):
        if case not in self.files:
            _, kind, *blocks = process = self.process(case)
            names = [name for name, other in CASES if self.process((name, other)) == process]
            folder = self.folder.mktemp("mindir")
            benchmarks = Path(__file__).parents[2] / "benchmarks"
            command = [sys.executable, "-c", SCRIPT, str(benchmarks), repr((names, kind == SHARED, *blocks))]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            self.files.update({(name, kind): folder / f"{name}.mindir" for name in names})
        return self.files[case]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pytestconfig):
    return Exported(tmp_path_factory, pytestconfig)


def numbers_of(blocks, doubles, singles):
    """The blocks' numbers, doubles and singles counted together."""
    stacks = {DOUBLE_STACK: range(doubles), SINGLE_STACK: range(doubles, doubles + singles), SINGLE_0: [doubles]}
    return {
        number
        for block in blocks
        for number in (stacks[block] if isinstance(block, str) else [block % (doubles + singles)])
    }


def unfinished(name, numbers, blocks):
    """The block whose text stream is not finished where these run: the last, unless a gate looks at its text."""
    probes_text = any(gate.probes_text for gate in every_gate(plan(CacheConfig.from_tag(GRAPHS[name].tag))))
    return {max(numbers)} if numbers and max(numbers) < blocks - 1 and not probes_text else set()


def divided_blocks(name, doubles, singles):
    """The blocks that are unfinished on any way through the graph."""
    ways = (numbers_of(blocks, doubles, singles) for blocks in RUNS[name])
    return set().union(*(unfinished(name, numbers, doubles + singles) for numbers in ways))


def block_of(weight, doubles):
    """The number of the block that a weight belongs to, None for one of another layer."""
    stack, _, rest = weight.partition(".")
    first = {"transformer_blocks": 0, "single_transformer_blocks": doubles}.get(stack)
    return None if first is None else first + int(rest.partition(".")[0])


def test_every_structure_is_compiled():
    dense = {name for name, graph in GRAPHS.items() if graph.family == "flux" and is_plain(graph)}
    assert set(RUNS) == dense - {"transformer"}


@pytest.mark.parametrize("name, kind", PARAMETERS)
def test_each_way_through_the_graph_runs_its_blocks_once_and_no_other(exported, pytestconfig, name, kind):
    doubles, singles = depth(name, pytestconfig)
    divided = divided_blocks(name, doubles, singles)
    config = CacheConfig.from_tag(GRAPHS[name].tag)
    whole_model = config.span == "model"
    net, found, refreshed = MindIR(exported[name, kind]), set(), set()
    for path in net.paths():
        products = Counter({weight: count for (operator, weight), count in path.items() if operator == "Dense"})
        products = Counter({weight: count for weight, count in products.items() if weight and "weight" in weight})
        if whole_model and all(weight.startswith(BEFORE_THE_LOOP) for weight in products):
            found.add(frozenset())
        # One step: other ways lead past a loop, or through a reused step to the computed one after it.
        if (products["x_embedder.weight"], products["proj_out.weight"]) != (1, 1):
            continue
        if "fbcache_and_teacache" in GRAPHS[name].tag:
            # The first block and TeaCache's test share the product, whose weight then reaches it without a name.
            products[TEACACHE_PROBE] = 2
        products[TEACACHE_PROBE] -= "teacache" in GRAPHS[name].tag
        attended = sum(count for (operator, _), count in path.items() if operator == "FlashAttentionScore")
        if GATES[config.gate].verifies:
            # The last block runs once more, before the gate is asked.
            last = [weight for weight in products if block_of(weight, doubles) == doubles + singles - 1]
            products.subtract(last)
            attended -= 1
        products = +products
        numbers = {block_of(weight, doubles) for weight in products} - {None}
        cut = unfinished(name, numbers, doubles + singles)
        for weight, count in products.items():
            block = block_of(weight, doubles)
            twice = block in divided - cut and block >= doubles and any(layer in weight for layer in BY_STREAM)
            assert count == 1 + twice
        own = PRODUCTS if attended or not numbers else REFRESHED
        of_block = Counter(block_of(weight, doubles) for weight in products)
        del of_block[None]
        assert of_block == {
            block: own["single"] if block >= doubles else own["double"] - TEXT_END * (block in cut) for block in numbers
        }
        assert attended == (len(numbers) if own is PRODUCTS else 0)
        (found if own is PRODUCTS else refreshed).add(frozenset(numbers))
    assert found == {frozenset(numbers_of(blocks, doubles, singles)) for blocks in RUNS[name]}
    assert refreshed == ({frozenset(range(doubles + singles))} if config.refreshes else set())


@pytest.mark.parametrize("name, kind", PARAMETERS)
def test_the_graph_has_its_loop_and_branches_and_nothing_that_an_npu_cannot_run(exported, pytestconfig, name, kind):
    graph, net = GRAPHS[name], MindIR(exported[name, kind])
    blocks = depth(name, pytestconfig)
    # A divided block shares no graph with the others, and none does whose parts are kept.
    recorded = CacheConfig.from_tag(graph.tag).refreshes
    shared = sum(blocks) if recorded else 2 + len(divided_blocks(name, *blocks))
    assert net.operators["FlashAttentionScore"] == (shared if kind == SHARED else sum(blocks))
    # Under one gate reused steps have a loop of their own within the loop.
    one_gate = len(plan(CacheConfig.from_tag(graph.tag))) == 1
    assert len(net.loops) == (1 + one_gate if graph.kind == "loop" else 0)
    assert net.operators["Switch"] >= len(RUNS[name]) - 1
    assert {dtype for dtype, _ in net.tensors}.isdisjoint(FLOAT64)
    assert all(size >= 0 for _, sizes in net.tensors for size in sizes)
    assert (BFLOAT16, (graph.batch, 2, 96, 16)) in net.tensors
    assert not [operator for operator in net.operators if operator.startswith(("Py", "Print", "TensorDump", "Host"))]


@pytest.mark.parametrize("name", further.after(1, ["loop", "loop_order_1_last_blocks", "loop_DuCa"]))
def test_the_loop_of_reuses_is_handed_the_weights_of_the_blocks_that_it_runs(exported, pytestconfig, name):
    """Handing over those of the others would take longer than the reuse."""
    doubles, singles = depth(name, pytestconfig)
    handed = {block_of(weight, doubles) for weight in MindIR(exported[name, SHARED]).handed("reused_calls")} - {None}
    assert handed == numbers_of(RUNS[name][0], doubles, singles)


@pytest.mark.release
def test_a_reuse_of_the_whole_model_is_handed_no_weight_at_all(exported):
    """No block runs in it, no embedding, of the latents or of the time, and no head."""

    def weights(name):
        return {
            each
            for each in MindIR(exported[name, SHARED]).handed("reused_calls")
            if each.endswith((".weight", ".bias"))
        }

    assert weights("loop_EasyCache") == weights("loop_MeanCache") == set() != weights("loop_TeaCache")
