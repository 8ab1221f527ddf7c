"""The unmodified Ascend path, bfloat16 and FlashAttentionScore, compiled without an Ascend: in a process of its own,
since this one has the CPU's stand-ins in place."""

import subprocess
import sys

import pytest

CASES = [
    ("loop", 1, "F1B0_W0_T1O2_R0.12"),
    ("loop", 2, "F1B0_W0_R0.12"),
    ("step", 2, "F1B0_W0_T1O1_R0.12"),
    ("loop", 1, "F2B1_W0_T1O1_R0.12,gate=cg_taylor"),
    ("loop", 1, "F1B0_W0_T1O1_R0.12,gate=dicache,forecast=dicache,batch_reduction=max,downsample_factor=2"),
    ("loop", 1, "F1B0_W0_R0.12,span=stacks"),
    ("loop", 1, "F1B0_W0_T1O2_R0.12,gate=fbcache_or_teacache,forecast=newton,forecast_coordinate=sigma"),
    ("loop", 2, "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=hicache,span=single"),
]
SCRIPT = """
import ast, sys
import numpy as np
import mindspore as ms
from mindone.diffusers import FluxTransformer2DModel
from FBCache_ms import CacheConfig, CacheContext, FluxDenoiseLoop
from FBCache_ms.pipeline_flux import CachedStep
from FBCache_ms.gates import knobs

ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
transformer = FluxTransformer2DModel(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
).to(ms.bfloat16)
half = lambda *shape: ms.Tensor(np.zeros(shape), ms.bfloat16)
single = lambda value: ms.Tensor(value, ms.float32)
whole = lambda value: ms.Tensor(value, ms.int32)
sigmas = np.linspace(1, 0, 28)
for index, (kind, branches, tag) in enumerate(ast.literal_eval(sys.argv[1])):
    config = CacheConfig.from_tag(tag)
    context = CacheContext(1, 64, 128, None, branches, ms.bfloat16, config, text_len=32, steps=28, sigmas=sigmas)
    if kind == "loop":
        net = FluxDenoiseLoop(transformer, context)
        inputs = (
            half(1, 64, 16), half(branches, 1, 32, 64), half(branches, 1, 64), half(32, 3), half(64, 3), single([3.5]),
            single(2.0), single(np.zeros(1000)), single(np.zeros(1001)), whole(0), whole(28),
            *map(ms.Tensor, knobs(config, 28, sigmas)),
        )
    else:
        net = CachedStep(transformer, context)
        inputs = (half(1, 64, 16), half(1, 32, 64), half(1, 64), half(1), half(64, 3), half(32, 3), single([3.5]))
    ms.export(net, *inputs, file_name=f"{index}.mindir", file_format="MINDIR")
assert "FBCache_ms.backend.cpu" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with a .mindir for each case."""
    folder = tmp_path_factory.mktemp("mindir")
    command = [sys.executable, "-c", SCRIPT, repr(CASES)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_loop_and_step_compile_for_ascend_with_each_block_once(exported, index):
    assert (exported / f"{index}.mindir").read_bytes().count(b"FlashAttentionScore-op") == 2 + 3
