"""What sharing a picture gives on this CPU: two processes with a core each, against one process with one core.

    .venv/bin/python benchmarks/sharing.py

A wide transformer, randomly initialised, without a cache and under plain First-Block Cache. The kernels are the same on
both sides: a block that is one kernel has no place for an exchange, so one process draws without that kernel too. The
processes draw in turn while the others wait, and every turn gives a ratio of its own. Between processes of one host
MindSpore exchanges by its CPU backend, over the loopback device; heads are exchanged by gathering everything there.
"""

import os
import socket
import statistics
import subprocess
import sys

from overhead import PROMPT, denoise, ratios, transformer_of, with_transformer

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.predict.sharing import SCHEMES

ALONE = "alone"
SIDE = 192
"""Pixels of the picture."""
WIDE = {"num_attention_heads": 32, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
WIDE.update(num_layers=1, num_single_layers=3)
SETTINGS = {"uncached": (UNCACHED, 4), "First-Block Cache": ("F1B0_W0_R0.6", 12)}
"""A configuration by its name, and the steps that are drawn with it."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "sharing", description=__doc__)
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


def wide_pipeline(scheme):
    """A FluxPipeline with the wide transformer, shared by a scheme."""
    import mindspore as ms

    from FBCache_ms import ContextParallelConfig, FluxPipeline
    from FBCache_ms.models.gathered import PROCESSORS, Ranks
    from FBCache_ms.models.transformer_flux_withFBCache import BY_TOKEN
    from FBCache_ms.runtime.checkpoint import TINY_FLUX
    from FBCache_ms.runtime.parallel import Sharing

    tiny = FluxPipeline.from_pretrained(str(TINY_FLUX))
    prompt = tiny.encode_prompt(PROMPT, max_sequence_length=tiny.tokenizer_2.model_max_length)[:2]
    ms.set_seed(0)
    pipe = with_transformer(tiny, transformer_of(tiny.transformer.config, **WIDE))
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    if scheme != ALONE:
        pipe.enable_parallelism(ContextParallelConfig(scheme=scheme))
        return pipe, prompt

    @ms.jit_class
    class Alone(Ranks):
        """All tokens, without the kernel of a whole block."""

        def attended(self, query, key, value):
            return query, key, value

    alone = Alone(1, 0, None)
    for _, cell in pipe.transformer.cells_and_names():
        if type(getattr(cell, "processor", None)) in PROCESSORS:
            cell.processor = PROCESSORS[type(cell.processor)](alone, cell.processor)
    pipe.sharing = Sharing(alone, alone, None, BY_TOKEN)
    return pipe, prompt


def worker(scheme, core):
    """A process that draws once for each line of standard input, which names a setting, and prints its seconds."""
    os.sched_setaffinity(0, {int(core)})
    from FBCache_ms import choose_device

    choose_device("CPU")
    pipe, prompt = wide_pipeline(scheme)
    for line in sys.stdin:
        tag, steps = SETTINGS[line.strip()]
        print("drawn", *denoise(pipe, prompt, CacheConfig.named(tag), steps), flush=True)


def free_port():
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Group:
    """Processes that draw a picture together.

    Args:
        scheme: what they exchange; ALONE for one process.
        log: an open file for what they say on standard error.
    """

    def __init__(self, scheme, log):
        cores = sorted(os.sched_getaffinity(0))[: 1 if scheme == ALONE else 2]
        cluster = {"MS_WORKER_NUM": str(len(cores)), "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
        roles = [{"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank)} for rank in range(len(cores))]
        if scheme == ALONE:
            cluster, roles = {}, [{}]
        else:
            roles.append({"MS_ROLE": "MS_SCHED"})
        self.processes = []
        for role, core in zip(roles, cores + cores[:1]):
            command = sys.executable, __file__, "worker", scheme, str(core)
            environment = {**os.environ, **cluster, **role, "OMP_NUM_THREADS": "1"}
            how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.processes.append(subprocess.Popen(command, env=environment, **how))
        self.ranks = self.processes[: len(cores)]

    def draw(self, setting):
        """The slowest process's seconds of a denoise loop, and its computed steps. Raises RuntimeError if one ended."""
        for process in self.ranks:
            process.stdin.write(setting + "\n")
            process.stdin.flush()
        return max(map(self.drawn, self.ranks))

    @staticmethod
    def drawn(process):
        """What a process has printed."""
        for line in process.stdout:
            if line.startswith("drawn "):
                return float(line.split()[1]), int(line.split()[2])
        raise RuntimeError(f"a process that draws has ended with status {process.wait()}")

    def end(self):
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def measure(scheme, runs, log):
    """{setting: {ALONE or the scheme: [seconds of each turn]}}, and {setting: computed steps}.

    A first time of each is not counted. Raises RuntimeError where both compute different steps.
    """
    groups, computed = {}, {}
    try:
        for name in (ALONE, scheme):
            groups[name] = Group(name, log)
            for setting in SETTINGS:
                steps = groups[name].draw(setting)[1]
                if computed.setdefault(setting, steps) != steps:
                    raise RuntimeError(f"{name} computes {steps} steps, {ALONE} {computed[setting]}: {setting}")
        seconds = {setting: {name: [] for name in groups} for setting in SETTINGS}
        for _ in range(runs):
            for setting, taken in seconds.items():
                for name, group in groups.items():
                    taken[name].append(group.draw(setting)[0])
        return seconds, computed
    finally:
        for group in groups.values():
            group.end()


def rows_of(scheme, seconds, computed):
    """A row for each setting."""
    for setting, taken in seconds.items():
        yield {
            "Setting": f"{setting}, {SETTINGS[setting][1]} steps, {computed[setting]} computed",
            "Scheme": scheme,
            "One process (s)": spread(taken[ALONE]),
            "Two processes (s)": spread(taken[scheme]),
            "Ratio": spread(ratios(taken[ALONE], taken[scheme])),
        }


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        args.save_path.mkdir(parents=True, exist_ok=True)
        with open(args.save_path / "sharing.log", "w") as log:
            measured = {scheme: measure(scheme, args.runs, log) for scheme in SCHEMES}
        rows = [row for scheme, found in measured.items() for row in rows_of(scheme, *found)]
        uncached = measured[SCHEMES[0]][0]["uncached"][ALONE]
        step = statistics.median(uncached) / SETTINGS["uncached"][1]
        text = f"{markdown(rows)}\nA computed step of one process takes {step:.2f} s.\n"
        data = {"settings": {**machine(), "runs": args.runs}, "measured": measured}
        publish(args.save_path, "sharing", text, rows, data, args.into)

    return exit_status("sharing", work)


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main())
