"""Exports the denoise loop and the step as an Ascend NPU would get them, and says what their compilation takes.

    .venv/bin/python benchmarks/ascend_graphs.py

mindone's own cells, bfloat16, STRICT syntax, as many blocks as the published model, narrow; nothing of the CPU
backend's stand-ins. Each graph is compiled in a process of its own, all in turn, three times, and written as MINDIR.
Seconds are those of ms.export, memory is the process's greatest. Ends with status 1 if the plain loop takes more than
1.2 times what the transformer without a cache takes; with --lazy_inline, where equal blocks share a graph, it does not.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Optional
from unittest.mock import patch

from FBCache_ms.config import PRESETS
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, quiet
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.runtime.parallel import share
from FBCache_ms.runtime.quantize import QuantizeConfig, quantize

DEPTHS = {"flux": (19, 38), "flux2": (8, 48), "qwenimage": (60, 0)}
"""How many double and single blocks the published models have, by family."""

TOKENS, TEXT, STEPS, HEAD = 64, 32, 28, 16
LONGEST = 1.2


@dataclass(frozen=True)
class Graph:
    """One structure.

    Args:
        kind: "loop", "step", or "transformer" for mindone's own without a cache.
        tag: of its CacheConfig.
        branches: 2 for true CFG.
        batch: latents per call.
        guidance: whether the model has a guidance embedding (dev) or not (schnell); Flux's alone.
        family: of the model, by the name of its file.
        quantize: the quant_type of its blocks' weights, None for bfloat16.
        ranks: how many devices share the picture's tokens.
        cfg_parallel: whether as many others have the negative prompt.
        scheme: what the devices exchange in attention.
    """

    kind: str
    tag: str = "F1B0_W0_R0.12"
    branches: int = 1
    batch: int = 1
    guidance: bool = True
    family: str = "flux"
    quantize: Optional[str] = None
    ranks: int = 1
    cfg_parallel: bool = False
    scheme: str = "gather"


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
    "loop_table": Graph("loop", PRESETS["fitted_8_of_28"]),
    "loop_Spectrum": Graph("loop", PRESETS["spectrum"]),
    "loop_MeanCache": Graph("loop", PRESETS["meancache"], branches=2),
    "loop_SpeCa": Graph("loop", PRESETS["speca"]),
    "loop_EasyCache": Graph("loop", "F0B0_W3_R0.12,gate=easycache"),
    "loop_DuCa": Graph("loop", PRESETS["duca"]),
    "step_ToCa_true_CFG_batch_2": Graph("step", PRESETS["toca"], branches=2, batch=2),
    "loop_CG_Taylor": Graph("loop", "F2B1_W0_T1O1_R0.12,gate=cg_taylor"),
    "loop_DiCache": Graph(
        "loop", "F1B0_W0_T1O1_R0.12,gate=dicache,forecast=dicache,batch_reduction=max,downsample_factor=2"
    ),
    "loop_true_CFG": Graph("loop", "F1B0_W0_T1O1_R0.12", branches=2),
    "step": Graph("step"),
    "step_true_CFG_double_gate": Graph("step", "F1B0_W0_T1O2_R0.12,span=stacks", branches=2),
    "qwenimage_loop": Graph("loop", family="qwenimage"),
    "qwenimage_loop_true_CFG_last_blocks": Graph("loop", "F24B24_W2MC1_T1O1_R0.8", branches=2, family="qwenimage"),
    "qwenimage_loop_TeaCache": Graph("loop", "F0B0_W0_R0.12,gate=teacache", family="qwenimage"),
    "qwenimage_loop_EasyCache": Graph("loop", "F0B0_W3_R0.12,gate=easycache", branches=2, family="qwenimage"),
    "qwenimage_step_true_CFG": Graph("step", "F1B0_W0_T1O2_R0.12", branches=2, family="qwenimage"),
    "flux2_loop": Graph("loop", "F1B0_W0_T1O1_R0.12", family="flux2"),
    "flux2_loop_last_blocks": Graph("loop", "F3B2_W0_T1O1_R0.12", batch=2, family="flux2"),
    "flux2_loop_double_gate": Graph("loop", "F1B0_W0_R0.12,span=stacks", family="flux2"),
    "flux2_loop_EasyCache": Graph("loop", "F0B0_W3_R0.12,gate=easycache", family="flux2"),
    "flux2_step": Graph("step", family="flux2"),
    "loop_int8_weight_only": Graph("loop", "F1B0_W0_T1O1_R0.12", quantize="int8_weight_only"),
    "loop_int8": Graph("loop", "F1B0_W0_T1O1_R0.12", quantize="int8"),
    "qwenimage_loop_int8": Graph("loop", branches=2, family="qwenimage", quantize="int8"),
    "flux2_loop_int8": Graph("loop", family="flux2", quantize="int8"),
    "loop_2_ranks": Graph("loop", "F1B0_W0_T1O1_R0.12", ranks=2),
    "loop_4_ranks_cfg_parallel": Graph("loop", "F1B0_W0_T1O1_R0.12", ranks=2, cfg_parallel=True),
    "loop_8_ranks": Graph("loop", "F1B0_W0_T1O1_R0.12", ranks=8),
    "loop_4_ranks_true_CFG_int8": Graph("loop", "F1B0_W0_R0.12", branches=2, quantize="int8", ranks=4),
    "qwenimage_loop_4_ranks": Graph("loop", "F1B0_W0_R0.12", branches=2, family="qwenimage", ranks=4),
    "loop_2_ranks_Ulysses": Graph("loop", "F1B0_W0_T1O1_R0.12", ranks=2, scheme="ulysses"),
    "qwenimage_loop_2_ranks_Ulysses": Graph("loop", branches=2, family="qwenimage", ranks=2, scheme="ulysses"),
    "flux2_loop_2_ranks_Ulysses": Graph("loop", family="flux2", ranks=2, scheme="ulysses"),
    "flux2_loop_4_ranks": Graph("loop", "F1B0_W0_R0.12", family="flux2", ranks=4),
}
"""What is compiled, by name."""


@lru_cache(maxsize=None)
def transformer(family, guidance, quantized, number, scheme, doubles, singles):
    """mindone's transformer in bfloat16, with so many blocks of either kind, of two heads and 16 channels.

    ``quantized`` is the quant_type of the blocks' weights, None for bfloat16; ``number`` devices share a picture
    by a ``scheme``.
    """
    import mindone.diffusers as mindones

    import mindspore as ms

    common = {"attention_head_dim": HEAD, "num_attention_heads": 2, "joint_attention_dim": 64, "num_layers": doubles}
    with numpy_for_mint():
        if family == "flux":
            model = mindones.FluxTransformer2DModel(
                **common,
                in_channels=16,
                num_single_layers=singles,
                pooled_projection_dim=64,
                guidance_embeds=guidance,
                axes_dims_rope=(HEAD // 4, HEAD * 3 // 8, HEAD * 3 // 8),
            )
        elif family == "flux2":
            model = mindones.Flux2Transformer2DModel(
                **common, in_channels=16, num_single_layers=singles, axes_dims_rope=4 * (HEAD // 4,)
            )
        else:
            model = mindones.QwenImageTransformer2DModel(
                **common, in_channels=16, out_channels=4, axes_dims_rope=(HEAD // 4, HEAD * 3 // 8, HEAD * 3 // 8)
            )
    model.to(ms.bfloat16)
    if quantized is not None:
        quantize(model, QuantizeConfig(quantized))
    if number > 1:
        share(model, ranks(number, scheme))
    return model


@lru_cache(maxsize=None)
def ranks(number, scheme="gather"):
    """The first of so many devices that share a picture, without the others."""
    from FBCache_ms.models.gathered import SCHEMES

    with other_ranks(number):
        return SCHEMES[scheme](number, 0, "hccl_world_group")


def other_ranks(number):
    """Makes MindSpore believe in a group of so many devices."""
    stack = ExitStack()
    from mindspore.ops.operations import comm_ops

    for name, stand_in in {
        "get_group_size": lambda *group, **named: number,
        "get_rank": lambda *group, **named: 0,
        "_get_group": lambda group: group,
    }.items():
        stack.enter_context(patch.object(comm_ops, name, stand_in))
    return stack


@contextmanager
def numpy_for_mint():
    """NumPy in the places of those of mint's functions, without a CPU kernel, that mindone's models call when made."""
    import numpy as np

    import mindspore as ms
    from mindspore import mint

    def empty(*size, dtype=None):
        return ms.Tensor(np.zeros(size[0] if isinstance(size[0], tuple) else size), dtype or ms.float32)

    stand_ins = {
        "arange": lambda *limits: ms.Tensor(np.arange(*limits), ms.int64),
        "empty": empty,
        "ones_like": lambda tensor: ms.Tensor(np.ones(tensor.shape), tensor.dtype),
        "outer": lambda one, other: ms.Tensor(np.outer(one.asnumpy(), other.asnumpy()), other.dtype),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(mint, name, stand_in))
        yield


def model_inputs(graph, leading):
    """The inputs of a Graph's model by name, those that a branch has of its own with ``leading`` axes before them."""
    import numpy as np

    import mindspore as ms

    batch, floats = (graph.batch,), {"dtype": ms.float32}

    def zeros(*shape, dtype=ms.bfloat16):
        return ms.Tensor(np.zeros(shape), dtype)

    text, tokens = TEXT // graph.ranks, TOKENS // graph.ranks
    inputs = {"encoder_hidden_states": zeros(*leading, *batch, text, 64)}
    if graph.family == "flux":
        inputs["pooled_projections"] = zeros(*leading, *batch, 64)
        inputs.update(img_ids=zeros(tokens, 3), txt_ids=zeros(text, 3))
    else:
        inputs["rotary"] = zeros(text + tokens, HEAD, **floats), zeros(text + tokens, HEAD, **floats)
    if graph.family == "qwenimage":
        inputs["encoder_hidden_states_mask"] = zeros(*leading, *batch, TEXT, **floats)
    elif graph.guidance:
        inputs["guidance"] = zeros(*batch, **floats)
    return inputs


def build(graph, model):
    """The cell of a Graph around a transformer, and its inputs."""
    import numpy as np

    import mindspore as ms

    from FBCache_ms import CacheConfig, CacheContext
    from FBCache_ms.cache.gates import step_tables
    from FBCache_ms.cache.loop import DenoiseLoop
    from FBCache_ms.pipelines.cached_transformer import CachedStep, graph_input

    def floats(*shape):
        return ms.Tensor(np.zeros(shape), ms.float32)

    config, sigmas = CacheConfig.from_tag(graph.tag), np.linspace(1, 0, STEPS)
    tokens = TOKENS // graph.ranks
    context = CacheContext(
        graph.batch,
        tokens,
        model.inner_dim,
        branches=graph.branches,
        mindspore_dtype=ms.bfloat16,
        config=config,
        text_len=TEXT // graph.ranks,
        steps=STEPS,
        sigmas=sigmas,
        channels=16,
        stacks=model.cached_model.stacks,
        over_ranks=None if graph.ranks == 1 else ranks(graph.ranks).mean,
    )
    latents, timestep = floats(graph.batch, tokens, 16).to(ms.bfloat16), floats(graph.batch).to(ms.bfloat16)
    if graph.kind == "loop":
        inputs = graph_input(model_inputs(graph, (graph.branches,)))
        bounds = ms.Tensor(0, ms.int32), ms.Tensor(STEPS, ms.int32)
        numbers = map(ms.Tensor, step_tables(config, STEPS, sigmas))
        cell = DenoiseLoop(model.cached_model, context, ranks(2) if graph.cfg_parallel else None)
        return cell, (latents, inputs, ms.Tensor(2.0, ms.float32), floats(1000), floats(1001), *bounds, *numbers)
    inputs = model_inputs(graph, ())
    if graph.kind == "step":
        constants = {"controlnet_blocks_repeat": False} if graph.family == "flux" else {}
        return CachedStep(model, context), (latents, timestep, graph_input(inputs), constants)
    text, pooled, image_ids, text_ids, guidance = inputs.values()
    return model, (latents, text, pooled, timestep, image_ids, text_ids, guidance)


def export(names, folder, lazy_inline=False, depth=None):
    """Writes graphs as NAME.mindir; yields for each the seconds and the process's greatest memory so far, in bytes.

    With lazy_inline equal blocks share a graph. ``depth`` is how many double and single blocks there are, those of the
    published model for None.
    """
    import mindspore as ms

    from FBCache_ms import Device
    from FBCache_ms.models import family

    ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
    # Before the first one is compiled: after that MindSpore runs nothing on a CPU where lazy_inline is in use.
    models = {}
    for name in names:
        graph = GRAPHS[name]
        how = graph.family, graph.guidance, graph.quantize, graph.ranks, graph.scheme
        models[name] = transformer(*how, *(depth or DEPTHS[graph.family]))
        # Its file gives mindone's class a cached_model.
        family(models[name])
    cells = {name: build(GRAPHS[name], model) for name, model in models.items()}
    for name, (cell, inputs) in cells.items():
        Device("Ascend", "bfloat16", lazy_inline=lazy_inline).prepare(cell, models[name])
        begin = time.perf_counter()
        with other_ranks(GRAPHS[name].ranks):
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
