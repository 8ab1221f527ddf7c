"""The unmodified Ascend path, bfloat16 and FlashAttentionScore, compiled without an Ascend: in a process of its own,
since this one has the CPU's stand-ins in place."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import numpy as np
import mindspore as ms
from mindone.diffusers import FluxTransformer2DModel
from FBCache_ms import CacheContext, FluxDenoiseLoop
from FBCache_ms.pipeline_flux import CachedStep

ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
kind, branches, order, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
transformer = FluxTransformer2DModel(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
).to(ms.bfloat16)
half = lambda *shape: ms.Tensor(np.zeros(shape), ms.bfloat16)
single = lambda value: ms.Tensor(value, ms.float32)
whole = lambda value: ms.Tensor(value, ms.int32)
context = CacheContext(1, 64, 128, order, branches, ms.bfloat16)
if kind == "loop":
    net = FluxDenoiseLoop(transformer, context)
    inputs = (
        half(1, 64, 16), half(branches, 1, 32, 64), half(branches, 1, 64), half(32, 3), half(64, 3), single([3.5]),
        single(2.0), single(np.zeros(1000)), single(np.zeros(1001)), whole(0), whole(28), single(0.12), whole(0),
    )
else:
    net = CachedStep(transformer, context)
    inputs = (half(1, 64, 16), half(1, 32, 64), half(1, 64), half(1), half(64, 3), half(32, 3), single([3.5]))
ms.export(net, *inputs, file_name=path, file_format="MINDIR")
assert "FBCache_ms.backend.cpu" not in sys.modules
"""


@pytest.mark.parametrize("kind, branches, order", [("loop", 1, 2), ("loop", 2, 0), ("step", 2, 1)])
def test_loop_and_step_compile_for_ascend_with_each_block_once(tmp_path, kind, branches, order):
    path = tmp_path / "loop.mindir"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(branches), str(order), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.read_bytes().count(b"FlashAttentionScore-op") == 2 + 3
