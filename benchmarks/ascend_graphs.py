"""Exports the denoise loop and the step as an Ascend NPU would get them, and says what their compilation takes.

    .venv/bin/python benchmarks/ascend_graphs.py

mindone's own cells, bfloat16, STRICT syntax, FLUX.1's 19 double and 38 single blocks, narrow; nothing of the CPU
backend's stand-ins. Each graph is compiled in a process of its own, all in turn, three times, and written as MINDIR.
Seconds are those of ms.export, memory is the process's greatest. Ends with status 1 if the plain loop takes more than
1.2 times what the transformer without a cache takes; with --lazy_inline, where equal blocks share a graph, it does not.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, quiet
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish, spread

DOUBLES, SINGLES = 19, 38
TOKENS, TEXT, STEPS = 64, 32, 28
LONGEST = 1.2


@dataclass(frozen=True)
class Graph:
    """One structure.

    Args:
        kind: "loop", "step", or "transformer" for mindone's own without a cache.
        tag: of its CacheConfig.
        branches: 2 for true CFG.
        batch: latents per call.
        guidance: whether the model has a guidance embedding (dev) or not (schnell).
    """

    kind: str
    tag: str = "F1B0_W0_R0.12"
    branches: int = 1
    batch: int = 1
    guidance: bool = True


GRAPHS = {
    "transformer": Graph("transformer"),
    "loop": Graph("loop"),
    "loop_no_gate": Graph("loop", "F0B0_W0_R0.12,gate=none"),
    "loop_order_1_last_blocks": Graph("loop", "F3B2_W0_T1O1_R0.12"),
    "loop_order_2_schnell": Graph("loop", "F1B0_W0_T1O2_R0.12,derivatives_dtype=float32", guidance=False),
    "loop_order_3_batch_2": Graph("loop", "F1B0_W0_T1O3_R0.12", batch=2),
    "loop_double_gate": Graph("loop", "F1B0_W0_R0.12,span=stacks"),
    "loop_single_stack": Graph("loop", "F0B0_W0_T1O2_R0.12,gate=static,schedule=fora,forecast=hicache,span=single"),
    "loop_TeaCache": Graph("loop", "F0B0_W0_R0.12,gate=teacache"),
    "loop_TeaCache_and_FBCache": Graph("loop", "F1B0_W0_R0.12,gate=fbcache_and_teacache"),
    "loop_TeaCache_or_FBCache": Graph(
        "loop", "F1B0_W0_T1O2_R0.12,gate=fbcache_or_teacache,forecast=newton,forecast_coordinate=sigma"
    ),
    "loop_static": Graph("loop", "F0B0_W0_T1O1_R0.12,gate=static,schedule=taylorseer"),
    "loop_EasyCache": Graph("loop", "F0B0_W3_R0.12,gate=easycache"),
    "loop_CG_Taylor": Graph("loop", "F2B1_W0_T1O1_R0.12,gate=cg_taylor"),
    "loop_DiCache": Graph(
        "loop", "F1B0_W0_T1O1_R0.12,gate=dicache,forecast=dicache,batch_reduction=max,downsample_factor=2"
    ),
    "loop_true_CFG": Graph("loop", "F1B0_W0_T1O1_R0.12", branches=2),
    "step": Graph("step"),
    "step_true_CFG_double_gate": Graph("step", "F1B0_W0_T1O2_R0.12,span=stacks", branches=2),
}
"""What is compiled, by name."""


@lru_cache(maxsize=None)
def transformer(guidance, doubles, singles):
    """mindone's FluxTransformer2DModel in bfloat16, with so many blocks of either kind, 32 wide."""
    from mindone.diffusers import FluxTransformer2DModel

    import mindspore as ms

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).to(ms.bfloat16)


def build(graph, model):
    """The cell of a Graph around a transformer, and its inputs."""
    import numpy as np

    import mindspore as ms

    from FBCache_ms import CacheConfig, CacheContext, FluxDenoiseLoop
    from FBCache_ms.cache.gates import step_tables
    from FBCache_ms.pipelines.cached_transformer import CachedStep

    def half(*shape):
        return ms.Tensor(np.zeros(shape), ms.bfloat16)

    def whole(number):
        return ms.Tensor(number, ms.int32)

    batch, ids = graph.batch, (half(TEXT, 3), half(TOKENS, 3))
    latents, embeds, pooled = half(batch, TOKENS, 16), (batch, TEXT, 64), (batch, 64)
    guidance = ms.Tensor(np.full(batch, 3.5), ms.float32) if graph.guidance else None
    config, sigmas = CacheConfig.from_tag(graph.tag), np.linspace(1, 0, STEPS)
    context = CacheContext(
        batch,
        TOKENS,
        model.inner_dim,
        branches=graph.branches,
        mindspore_dtype=ms.bfloat16,
        config=config,
        text_len=TEXT,
        steps=STEPS,
        sigmas=sigmas,
        channels=16,
    )
    if graph.kind == "loop":
        cell = FluxDenoiseLoop(model, context)
        numbers = (
            ms.Tensor(2.0, ms.float32),
            ms.Tensor(np.zeros(1000), ms.float32),
            ms.Tensor(np.zeros(1001), ms.float32),
        )
        inputs = (latents, half(graph.branches, *embeds), half(graph.branches, *pooled), *ids, guidance, *numbers)
        inputs += (whole(0), whole(STEPS), *map(ms.Tensor, step_tables(config, STEPS, sigmas)))
    else:
        inputs = {
            "encoder_hidden_states": half(*embeds),
            "pooled_projections": half(*pooled),
            "img_ids": ids[1],
            "txt_ids": ids[0],
            **({"guidance": guidance} if graph.guidance else {}),
        }
        if graph.kind == "step":
            constants = {"controlnet_blocks_repeat": False}
            cell, inputs = CachedStep(model, context), (latents, half(batch), ms.mutable(inputs), constants)
        else:
            cell, inputs = model, (latents, *list(inputs.values())[:2], half(batch), *list(inputs.values())[2:])
    return cell, inputs


def export(names, folder, lazy_inline=False, doubles=DOUBLES, singles=SINGLES):
    """Writes graphs as NAME.mindir; yields for each the seconds and the process's greatest memory so far, in bytes.

    With lazy_inline equal blocks share a graph.
    """
    import mindspore as ms

    from FBCache_ms import Device

    ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
    # Before the first one is compiled: after that MindSpore runs nothing on a CPU where lazy_inline is in use.
    models = {name: transformer(GRAPHS[name].guidance, doubles, singles) for name in names}
    cells = {name: build(GRAPHS[name], model) for name, model in models.items()}
    for name, (cell, inputs) in cells.items():
        Device("Ascend", "bfloat16", lazy_inline=lazy_inline).prepare(cell, models[name])
        begin = time.perf_counter()
        ms.export(cell, *inputs, file_name=str(folder / name), file_format="MINDIR")
        yield time.perf_counter() - begin, getrusage(RUSAGE_SELF).ru_maxrss * 1024
    if "FBCache_ms.runtime.cpu.stand_ins" in sys.modules:
        raise RuntimeError("the CPU's stand-ins are in the way of the Ascend path")


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "ascend_graphs", description=__doc__)
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), choices=GRAPHS, metavar="NAME", help="which")
    parser.add_argument("--lazy_inline", action="store_true", help="equal blocks share a graph")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/ascend_graphs", "tables and graphs")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


ALONE = """
import json, sys
from pathlib import Path
from ascend_graphs import export

name, lazy_inline, folder = json.loads(sys.argv[1])
print(json.dumps(*export([name], Path(folder), lazy_inline)))
"""


def measure(name, lazy_inline, folder):
    """Seconds and bytes of one compilation, in a process of its own."""
    given = json.dumps([name, lazy_inline, str(folder.resolve())])
    command = [sys.executable, "-c", ALONE, given]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name} does not compile: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """The program; returns its exit status, 1 for a loop that takes too long to compile."""
    args = parse_arguments(argv)
    quiet()
    measured = {name: [] for name in args.graphs}

    def work():
        from tqdm import tqdm

        with tqdm(total=args.runs * len(measured)) as bar:
            for _ in range(args.runs):
                for name, figures in measured.items():
                    figures.append(measure(name, args.lazy_inline, args.save_path))
                    bar.update()
        rows, figures = [], []
        for name, runs in measured.items():
            seconds, memory = ([run[place] for run in runs] for place in (0, 1))
            figures.append({"graph": name, "seconds": seconds, "bytes": memory})
            bare = [run[0] for run in measured.get("transformer", [])]
            rows.append(
                {
                    "Graph": name,
                    "`--cache`": f"`{GRAPHS[name].tag}`" if GRAPHS[name].kind != "transformer" else "-",
                    f"Compilation, Median of {args.runs} Runs (s)": spread(seconds, 1),
                    "Transformer (s)": spread(bare, 1) if bare else "-",
                    "Over the Transformer": (
                        f"{statistics.median(seconds) / statistics.median(bare):.2f}x" if bare else "-"
                    ),
                    "Peak Memory (MB)": f"{statistics.median(memory) / 1e6:.0f}",
                }
            )
        text = markdown(rows)
        publish(args.save_path, "ascend_graphs", text, rows, figures, args.into)

    status = exit_status("ascend_graphs", work)
    if status or args.lazy_inline or not {"transformer", "loop"} <= set(measured):
        return status
    bare, loop = (statistics.median(run[0] for run in measured[name]) for name in ("transformer", "loop"))
    return int(loop > LONGEST * bare)


if __name__ == "__main__":
    sys.exit(main())
