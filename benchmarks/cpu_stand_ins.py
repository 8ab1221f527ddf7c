"""Times candidates for the CPU's stand-ins where they count: in the 28-step loop of the embedded checkpoint.

    .venv/bin/python benchmarks/cpu_stand_ins.py

These are the stand-ins of MindSpore's own operators, which run where there is no C++ compiler. For each candidate one
loop is compiled; then all are run in turn. Printed are the median of each, its ratio to the stand-in in
use, and how far its latents lie from that one's.
"""

import statistics
import sys
import time

import numpy as np
from mindone.diffusers import FluxTransformer2DModel

import mindspore as ms
from mindspore import mint, ops

from FBCache_ms import CacheConfig, CacheContext, FluxDenoiseLoop
from FBCache_ms.cache.gates import step_tables
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.runtime.checkpoint import TINY_FLUX
from FBCache_ms.runtime.cpu import install, stand_ins
from FBCache_ms.runtime.cpu import kernels as cpu_kernels

STEPS = 28
IN_USE = "as it is"


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
    "GELU: the CPU's kernel": (mint.nn.functional, "gelu", gelu_kernel),
    "GELU: spelled with tanh": (mint.nn.functional, "gelu", gelu_tanh),
    "LayerNorm: the CPU's kernel": (stand_ins, "layer_norm", layer_norm_kernel),
    "LayerNorm: means by matmul": (stand_ins, "layer_norm", layer_norm_matmul),
    "RMSNorm: as in mindone": (stand_ins.normalization.RMSNorm, "construct", rms_norm_as_in_mindone),
}
"""Owner, attribute and candidate by name."""


def inputs(steps):
    """What a loop of so many steps, none of them reused, takes."""
    rng, tokens = np.random.default_rng(0), np.indices((1, 8, 8)).reshape(3, -1).T
    sigmas = np.append(np.linspace(1, 1 / steps, steps), 0)

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
        tensor(steps, ms.int32),
        *map(ms.Tensor, step_tables(CacheConfig(0.0), steps, sigmas)),
    )


def compiled(transformer, arguments, candidates):
    """{name: a loop that was compiled with that candidate in its place, and run once}."""
    loops = {}
    for name, change in {IN_USE: None, **candidates}.items():
        if change is not None:
            owner, attribute, candidate = change
            before = getattr(owner, attribute)
            # MindSpore's parser looks some methods up again by the function's own name.
            candidate.__name__ = attribute
            setattr(owner, attribute, candidate)
        try:
            loops[name] = FluxDenoiseLoop(transformer, CacheContext(1, 64, transformer.inner_dim))
            loops[name](*arguments).asnumpy()
        finally:
            if change is not None:
                setattr(owner, attribute, before)
    return loops


def measure(loops, arguments, runs):
    """{name: seconds of each run, all run in turn} and {name: latents}."""
    seconds, latents = {name: [] for name in loops}, {}
    for _ in range(runs):
        for name, loop in loops.items():
            begin = time.perf_counter()
            latents[name] = loop(*arguments).asnumpy()
            seconds[name].append(time.perf_counter() - begin)
    return seconds, latents


def table_of(seconds, latents):
    """A row for each candidate."""
    used = statistics.median(seconds[IN_USE])
    return [
        {
            "Candidate": name,
            "Time (s)": spread(times),
            "Ratio": f"{statistics.median(times) / used:.2f} ({statistics.median(times):.3f} / {used:.3f})",
            "Largest Difference": f"{np.abs(latents[name] - latents[IN_USE]).max():.1e}",
        }
        for name, times in seconds.items()
    ]


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "cpu_stand_ins", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        ms.set_device("CPU")
        ms.set_context(mode=ms.GRAPH_MODE)
        cpu_kernels.KERNELS_FILE = cpu_kernels.LINEAR = None
        install()
        transformer, arguments = FluxTransformer2DModel.from_pretrained(str(TINY_FLUX / "transformer")), inputs(STEPS)
        seconds, latents = measure(compiled(transformer, arguments, CANDIDATES), arguments, args.runs)
        rows = table_of(seconds, latents)
        data = {"settings": {**machine(), "runs": args.runs}, "seconds": seconds}
        publish(args.save_path, "cpu_stand_ins", markdown(rows), rows, data, args.into)

    return exit_status("cpu_stand_ins", work)


if __name__ == "__main__":
    sys.exit(main())
