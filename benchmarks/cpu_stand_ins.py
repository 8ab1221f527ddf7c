"""Times candidates for the CPU's stand-ins where they count: in the 28-step loop of the embedded checkpoint.

    .venv/bin/python benchmarks/cpu_stand_ins.py

For each candidate one loop is compiled; then all are run in turn, seven times. Printed are the median of each and its
ratio to the stand-in in use.
"""

import statistics
import time

import numpy as np
from mindone.diffusers import FluxTransformer2DModel

import mindspore as ms
from mindspore import mint, ops

from FBCache_ms import CacheContext, FluxDenoiseLoop
from FBCache_ms.backend import cpu
from FBCache_ms.checkpoint import TINY_FLUX

RUNS, STEPS = 7, 28


def gelu_kernel(input, *, approximate="none"):
    return ops.GeLU()(input)


def gelu_tanh(input, *, approximate="none"):
    return 0.5 * input * (1 + ops.tanh(0.7978845608028654 * (input + 0.044715 * input * input * input)))


def layer_norm_kernel(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    ones, zeros = ops.ones(normalized_shape, ms.float32), ops.zeros(normalized_shape, ms.float32)
    return ops.LayerNorm(-1, -1, eps)(input, ones, zeros)[0]


def layer_norm_matmul(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    mean = ops.fill(ms.float32, (input.shape[-1], 1), 1 / input.shape[-1])
    centred = input - ops.matmul(input, mean)
    return centred * ops.rsqrt(ops.matmul(centred * centred, mean) + eps)


def rms_norm_as_in_mindone(self, hidden_states):
    variance = mint.pow(hidden_states.to(ms.float32), 2).mean(-1, keepdim=True)
    return hidden_states * mint.rsqrt(variance + self.eps) * self.weight


CANDIDATES = {
    "as it is": None,
    "GELU: the CPU's kernel": (mint.nn.functional, "gelu", gelu_kernel),
    "GELU: spelled with tanh": (mint.nn.functional, "gelu", gelu_tanh),
    "LayerNorm: the CPU's kernel": (cpu, "layer_norm", layer_norm_kernel),
    "LayerNorm: means by matmul": (cpu, "layer_norm", layer_norm_matmul),
    "RMSNorm: as in mindone": (cpu.normalization.RMSNorm, "construct", rms_norm_as_in_mindone),
}


def inputs():
    rng, tokens = np.random.default_rng(0), np.indices((1, 8, 8)).reshape(3, -1).T
    sigmas = np.append(np.linspace(1, 1 / STEPS, STEPS), 0)

    def tensor(value, dtype=ms.float32):
        return ms.Tensor(value, dtype)

    return (
        tensor(rng.standard_normal((1, 64, 16))),
        tensor(rng.standard_normal((1, 1, 32, 64))),
        tensor(rng.standard_normal((1, 1, 64))),
        tensor(np.zeros((32, 3))),
        tensor(tokens),
        tensor([3.5]),
        tensor(1.0),
        tensor(sigmas[:-1] * 1000),
        tensor(sigmas),
        tensor(0, ms.int32),
        tensor(STEPS, ms.int32),
        tensor(0.0),
        tensor(0, ms.int32),
    )


def main():
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    cpu.install()
    transformer = FluxTransformer2DModel.from_pretrained(str(TINY_FLUX / "transformer"))
    arguments, loops = inputs(), {}
    for name, change in CANDIDATES.items():
        if change is not None:
            owner, attribute, candidate = change
            before = getattr(owner, attribute)
            setattr(owner, attribute, candidate)
        loops[name] = FluxDenoiseLoop(transformer, CacheContext(1, 64, 128))
        loops[name](*arguments).asnumpy()
        if change is not None:
            setattr(owner, attribute, before)
    seconds = {name: [] for name in loops}
    for _ in range(RUNS):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop(*arguments).asnumpy()
            seconds[name].append(time.perf_counter() - begin)
    base = statistics.median(seconds["as it is"])
    print(f"{'candidate':<30}{'median s':>10}{'ratio':>8}")
    for name, times in seconds.items():
        print(f"{name:<30}{statistics.median(times):>10.3f}{statistics.median(times) / base:>8.2f}")


if __name__ == "__main__":
    main()
