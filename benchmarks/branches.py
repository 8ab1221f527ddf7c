"""What a branch costs MindSpore's CPU runtime: a turn of a loop, by the number of weights that the branch could read.

    .venv/bin/python benchmarks/branches.py

The branch is never taken. Each loop of 100 turns is run in turn with the others; the first row's has no branch.
"""

import statistics
import sys
import time

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread

TURNS, SHAPE = 100, (96, 128)


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "branches", description=__doc__)
    add = parser.add_argument
    add("--weights", type=int, nargs="+", default=[1, 100, 400], metavar="N", help="in the branch, a loop each")
    add("--runs", type=int, default=11, metavar="N", help="turns of all loops")
    add_save_path(add, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for weights in args.weights:
            check_range("weights", weights, 1)
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def loop_of(weights, taken=()):
    """A loop of TURNS turns with so many weights in a branch, none for no branch; a function without arguments.

    The turns in ``taken`` take the branch.
    """
    import numpy as np

    import mindspore as ms
    from mindspore import Parameter, nn, ops

    class Loop(nn.Cell):
        def __init__(self):
            super().__init__()
            twos = ms.Tensor(np.full(SHAPE, 2), ms.float32)
            self.weights = ms.ParameterTuple([Parameter(twos, name=f"weight_{i}") for i in range(weights)])
            takes = [float(turn in taken) for turn in range(TURNS)]
            self.taken = Parameter(ms.Tensor(takes, ms.float32), name="taken")

        def construct(self, x, start):
            turn = start
            while turn < TURNS:
                if weights == 0:
                    x = x + self.taken[turn]
                elif self.taken[turn] > 0.5:
                    for weight in self.weights:
                        x = x * weight
                else:
                    x = ops.abs(x)
                turn = turn + 1
            return x

    values = np.linspace(-1, 1, SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    loop, x, start = Loop(), ms.Tensor(values, ms.float32), ms.Tensor(0, ms.int32)
    return lambda: loop(x, start).asnumpy()


def microseconds(loops, runs):
    """{weights: microseconds a turn of each run} of the loops, run in turn after a first time."""
    for loop in loops.values():
        loop()
    times = {weights: [] for weights in loops}
    for _ in range(runs):
        for weights, loop in loops.items():
            begin = time.perf_counter()
            loop()
            times[weights].append((time.perf_counter() - begin) / TURNS * 1e6)
    return times


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        import mindspore as ms

        from FBCache_ms.runtime.device import choose_device, prepare_device

        choose_device("CPU")
        prepare_device()
        ms.set_context(mode=ms.GRAPH_MODE)
        times = microseconds({weights: loop_of(weights) for weights in (0, *args.weights)}, args.runs)
        without = statistics.median(times[0])
        rows = [
            {
                "Weights in the Branch": weights or "no branch",
                "A Turn (us)": spread(values, 0),
                "Above No Branch (us)": f"{statistics.median(values) - without:.0f}",
            }
            for weights, values in times.items()
        ]
        text = markdown(rows)
        data = {"settings": {**machine(), "runs": args.runs}, "microseconds": times}
        publish(args.save_path, "branches", text, rows, data, args.into)

    return exit_status("branches", work)


if __name__ == "__main__":
    sys.exit(main())
