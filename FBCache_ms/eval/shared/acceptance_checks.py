"""What the acceptance run checks: a function each, from the Run to a Finding."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Optional
from zlib import crc32

from FBCache_ms.config import PRESETS, CacheConfig
from FBCache_ms.eval import benchmark, environment
from FBCache_ms.eval import run_flux_withFBCache_pipeline as fbcache_flux
from FBCache_ms.eval.shared.arguments import branches_of, guidance_of
from FBCache_ms.eval.shared.cases import BASELINE, ROWS, UNCACHED, Row
from FBCache_ms.eval.shared.drawing import Painter, Setting, draw_missing
from FBCache_ms.eval.shared.floors import FLOOR_ELSEWHERE, FLOORS, MOST_LOST_CLIP_SCORE, is_embedded
from FBCache_ms.eval.shared.measure import Judge, cell_of, write_sweep
from FBCache_ms.eval.shared.metrics import psnr, read_picture
from FBCache_ms.eval.shared.tables import markdown
from FBCache_ms.predict.memory import cache_bytes
from FBCache_ms.predict.sharing import SCHEMES
from FBCache_ms.runtime.checkpoint import TINY_FLUX, image_size

TESTS = Path(__file__).parents[3] / "tests"

UNIT_TESTS = ("config", "rules", "cache_context", "memory", "flops", "checkpoint", "pictures", "prompts", "scenes")
"""The test files that compare with formulas, NumPy or themselves.

Others compare with numbers of another program's CPU run, test the CPU's own stand-ins, or expect of float32 attention
what Ascend, which computes it in float16, cannot keep.
"""

AGREEMENT = {
    "CPU": (1e-3, 60),
    "float32": (0.02, 36),
    "float16": (0.02, 36),
    "bfloat16": (0.05, 30),
}
"""How far two ways to run the same blocks may lie apart: differences by this share, pictures by this PSNR in dB.

mindone's attention computes in float16 on Ascend when the model is in float32. Rounding the blocks' streams to bfloat16
alone moves a difference by up to 1.4 % (docs/results/precision.md); every operator of every block rounds as well.
Pictures of other noise are 12 dB apart. Nobody has measured these on an NPU.
"""

FEW_STEPS, ALTERNATING = 4, "F1B0_W1MC1_R1"
"""Graph and PyNative draw so many steps, and reuse every other one whatever the model: both branches are compared."""

LEAST_SPEEDUP = 1
"""How much faster than the uncached graph First-Block Cache at its larger threshold has to be."""

_TAGS = (*ROWS, "F1B0_W0_T1O2_R0.12", "F1B1_W0_T1O1_R0.12", *PRESETS)
STRUCTURES = tuple({CacheConfig.named(tag).structure: tag for tag in _TAGS[::-1]}.values())[::-1]
"""Whose bytes are counted: one of each structure."""

MOST_EXTRA_MEMORY = 4
"""The most that a cached run may take beyond an uncached one, in caches: it also compares and forecasts in float32."""

LAST_WORDS = 4000
"""Characters of a program's stderr that are kept to tell why it failed."""


@dataclass(frozen=True)
class Finding:
    """What a check found: whether it passed, None where it could not be done; why, in a line; and its tables."""

    passed: Optional[bool]
    text: str
    table: str = ""


class Run:
    """What the checks share: the program's arguments, and one model in memory."""

    def __init__(self, args):
        self.args = args

    @cached_property
    def painter(self):
        """The Painter; ValueError for a device that is not there."""
        return Painter(self.args)

    @property
    def agreement(self):
        """What AGREEMENT has for this device and dtype."""
        device = self.painter.device
        return AGREEMENT["CPU" if device.name == "CPU" else device.dtype]

    @cached_property
    def code(self):
        """A checksum over what draws beside the painter's settings: our sources, and Ascend's software."""
        from FBCache_ms.runtime.compile_cache import sources_checksum

        parts = environment.ascend_parts() if self.painter.device.name == "Ascend" else []
        found = [sources_checksum(), *(f"{part.name} {part.found}" for part in parts)]
        return f"{crc32(' '.join(found).encode()):08x}"

    def drawn(self, name, settings, prompts, in_turn=True):
        """{Setting: its PictureFolder} within the folder ``name``, with the prompts' pictures.

        Old ones of the same ``code`` are kept.
        """
        folder = self.args.save_path / name / self.code
        folders = {setting: self.painter.folder(folder, setting) for setting in settings}
        draw_missing(self.painter, folders, prompts, in_turn=in_turn)
        return folders


def check_environment(run):
    """Python, its packages, and where there is an NPU driver, CANN and MindSpore's view of it."""
    parts = environment.python_parts()
    if run.args.device == "Ascend":
        parts += environment.ascend_parts()
    wrong = [part for part in parts if part.wrong]
    found = ", ".join(f"{part.name} {part.found}" for part in parts if part.name not in ("numpy", "pillow"))
    doubts = "".join(f"; {part.name}: {part.advice}" for part in parts if part.advice)
    text = "; ".join(f"{part.name}: {part.advice}" for part in wrong) or found + doubts
    if run.args.device == "CPU":
        text += "; there is no NPU here, so this is a dry run"
    return Finding(not wrong, text, environment.table_of(parts))


def check_unit_tests(run):
    """The tests that need no numbers of a CPU run, on this device."""
    if not TESTS.is_dir():
        return Finding(None, f"{TESTS} is not there: run from a checkout of the repository")
    if find_spec("pytest") is None or find_spec("xdist") is None:
        return Finding(None, "pytest is not there: install FBCache_ms[test]")
    files = [str(path) for name in UNIT_TESTS for path in TESTS.rglob(f"test_{name}.py")]
    command = [sys.executable, "-m", "pytest", "-n", "0", "--device", run.args.device, *files]
    done = subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    text = f"{'; '.join([lines[-1], *failed])} ({', '.join(UNIT_TESTS)})"
    return Finding(done.returncode == 0, text)


def check_decisions(run):
    """The embedded checkpoint in float32 on this device and on the CPU: equal decisions, nearly equal differences.

    On the CPU, two processes, whose differences have to be equal.
    """

    folder = run.args.save_path / "decisions"
    run_program(fbcache_flux, embedded_in_float32("CPU", folder))
    reports = (
        json.loads((folder / "run.json").read_text()),
        fbcache_flux.run(fbcache_flux.parse_arguments(embedded_in_float32(run.args.device, folder))),
    )
    cpu, here = map(_trace_of, reports)
    tolerance = 0 if run.args.device == "CPU" else AGREEMENT["float32"][0]
    threshold, size = CacheConfig().residual_diff_threshold, image_size(TINY_FLUX)
    passed, text = agree(cpu, here, threshold, tolerance)
    nearest = min(abs(difference / threshold - 1) for difference in cpu["residual_diffs"] if difference is not None)
    text += f"; the CPU's nearest difference lies {nearest:.1%} off the threshold"
    rows = [
        {
            "Step": step,
            run.args.device: _decision(here, step),
            "CPU, another process": _decision(cpu, step),
        }
        for step in range(len(cpu["reused"]))
    ]
    return Finding(passed, f"{size}x{size}, float32, {reports[0]['config']}: {text}", markdown(rows))


def _decision(trace, step):
    difference = trace["residual_diffs"][step]
    return ("reused" if trace["reused"][step] else "computed") + ("" if difference is None else f", {difference:.5f}")


def embedded_in_float32(device, folder):
    """The options with which a device draws the embedded checkpoint into a folder."""
    names = {"ckpt": TINY_FLUX, "device": device, "dtype": "float32", "save_path": folder}
    return [text for name, value in names.items() for text in (f"--{name}", str(value))]


def _trace_of(report):
    """What ``agree`` compares, of a run.json."""
    reused = [step in report["cached_steps"] for step in range(report["steps"])]
    return {"reused": reused, "residual_diffs": report["residual_diffs"]}


def check_sharing(run):
    """The embedded checkpoint on two devices that share the picture against one device: decisions and pictures."""
    device, folder = run.args.device, run.args.save_path / "sharing"
    if device == "Ascend":
        import mindspore as ms

        if ms.hal.device_count("Ascend") < 2:
            return Finding(None, "one NPU is here, and two have to share a picture")
    run_program(fbcache_flux, embedded_in_float32(device, folder / "one"))
    tolerance, floor = AGREEMENT["CPU" if device == "CPU" else "float32"]
    one, passed, said = _traced(folder / "one"), True, []
    for scheme in SCHEMES:
        draw_on_two(device, folder / scheme, scheme)
        near = psnr(*(read_picture(folder / name / "output_0.png") for name in ("one", scheme)))
        agreed, text = agree(one, _traced(folder / scheme), CacheConfig().residual_diff_threshold, tolerance)
        passed = passed and agreed and near >= floor
        said.append(f"{scheme}: {near_text(near, floor)}, {text}")
    return Finding(passed, f"two devices share the picture; {'; '.join(said)}")


def _traced(folder):
    """_trace_of what a program has drawn into a folder."""
    return _trace_of(json.loads((folder / "run.json").read_text()))


def draw_on_two(device, folder, scheme):
    """Draws check_sharing's picture by two devices. Raises RuntimeError where they fail."""
    launcher = Path(sys.executable).parent / "msrun"
    command = [launcher, "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={free_port()}"]
    command += [f"--log_dir={folder / 'logs'}", fbcache_flux.__file__, "--context_parallel", "2"]
    command += ["--context_parallel_scheme", scheme, *embedded_in_float32(device, folder)]
    # msrun starts whatever "python" it finds.
    environment = {**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"msrun ended with status {done.returncode}: {folder / 'logs'} has what the devices said")


def free_port():
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check_speed(run):
    """The speed table, by the benchmark itself: a process of its own, whose kernels need not be deterministic."""
    args, folder = run.args, run.args.save_path / "speed"
    options = ["--save_path", folder, "--runs", args.runs, "--limit", min(args.limit, args.runs)]
    options += ["--pynative" if args.pynative else "--no-pynative"]
    for name in ("ckpt", "device", "dtype", "jit_level", "num_inference_steps", "seed"):
        options += [f"--{name}", getattr(args, name)]
    if args.image_size is not None:
        options += ["--image_size", *args.image_size]
    if args.lazy_inline:
        options += ["--lazy_inline"]
    if args.quantize is not None:
        options += ["--quantize", args.quantize.quant_type, *args.quantize.components_to_quantize]
    guidance = {**guidance_of(args), "negative_prompt": args.negative_prompt}
    for name, value in {**guidance, "compile_cache": args.compile_cache, "prompts": args.prompts_file}.items():
        if value is not None:
            options += [f"--{name}", value]
    run_program(benchmark, options)
    *rows, cached = json.loads((folder / "benchmark.json").read_text())["rows"]
    uncached = next(row for row in rows if row["configuration"] == benchmark.GRAPH)
    text = (
        f"{cached['configuration']} is {cached['speedup']:.2f} times as fast as the uncached graph, "
        f"{cached['seconds']:.3f} s against {uncached['seconds']:.3f} s, "
        f"{cached['computed_steps']:.1f} of {cached['steps']} steps computed; "
        f"more than {LEAST_SPEEDUP} is asked for"
    )
    return Finding(cached["speedup"] > LEAST_SPEEDUP, text, (folder / "benchmark.md").read_text())


def check_memory(run):
    """The caches' bytes as allocated and by the formula; on an NPU, what a cached run takes beyond an uncached one."""
    import numpy as np

    from FBCache_ms import CacheContext

    painter, steps = run.painter, run.args.num_inference_steps
    # The uncached run comes first in its process: what a cached one allocates stays.
    settings = uncached, cached = Setting.named(UNCACHED, steps), Setting.named(ROWS[-1], steps)
    folders = run.drawn("memory", settings, run.args.prompts[:1])
    transformer, dtype = painter.pipe.transformer, painter.device.mindspore_dtype
    text_len = painter.arguments(0, run.args.prompts[0], steps)["prompt_embeds"].shape[1]
    shape = 1, painter.image_tokens, transformer.inner_dim
    itemsize = 4 if painter.device.dtype == "float32" else 2
    channels, rows = transformer.proj_out.weight.shape[0], []
    for tag in STRUCTURES:
        config, settings = CacheConfig.named(tag), {"text_len": text_len, "channels": channels}
        sigmas = np.linspace(1, 0, steps + 1)
        settings["stacks"] = transformer.cached_model.stacks
        # A mask or a table may be for another number of steps, and changes no byte.
        off = config.switched_off()
        context = CacheContext(*shape, mindspore_dtype=dtype, config=off, steps=steps, sigmas=sigmas, **settings)
        rows.append((tag, context.nbytes, cache_bytes(config, *shape, itemsize=itemsize, **settings)))
    formula = cache_bytes(cached.config, *shape, text_len, branches_of(run.args), itemsize)
    rows.append((f"{ROWS[-1]}, after its run", folders[cached].record(0)["cache_bytes"], formula))
    table = markdown(
        [{"`--cache`": tag, "Allocated (Bytes)": here, "Formula (Bytes)": there} for tag, here, there in rows]
    )
    passed = all(here == there for _, here, there in rows)
    text = f"{len(rows)} caches take {'exactly' if passed else 'NOT'} what the formula says"
    if painter.device.name == "Ascend":
        peaks = [folders[setting].seconds(1)[0]["peak_bytes"] for setting in (uncached, cached)]
        extra = peaks[1] - peaks[0]
        passed = passed and formula <= extra <= MOST_EXTRA_MEMORY * formula
        text += (
            f"; the cached run takes {extra / 1e6:.1f} MB beyond the uncached one's {peaks[0] / 1e6:.0f} MB, "
            f"from 1 to {MOST_EXTRA_MEMORY} times the cache's {formula / 1e6:.1f} MB are allowed"
        )
    return Finding(passed, text, table)


def check_graph(run):
    """The compiled graph against the same blocks operator by operator: pictures, decisions and differences."""
    tolerance, floor = run.agreement
    settings = [Setting.named(ALTERNATING, FEW_STEPS, graph) for graph in (True, False)]
    folders = run.drawn("graph", settings, run.args.prompts[:1])
    graph, eager = (folders[setting].record(0) for setting in settings)
    near = psnr(*(read_picture(folders[setting].file(0)) for setting in settings))
    passed, text = agree(graph, eager, 1, tolerance)
    text = f"{FEW_STEPS} steps, {ALTERNATING}: {near_text(near, floor)}, {text}"
    return Finding(passed and near >= floor, text)


def check_loop(run):
    """The whole loop against the same graph a step at a time, and against a graph a step in mindone's own pipeline."""
    import numpy as np

    from FBCache_ms import apply_cache_on_pipe

    painter, steps, prompt = run.painter, run.args.num_inference_steps, run.args.prompts[0]
    tolerance, floor = run.agreement
    pipe, config = painter.pipe, CacheConfig.named(ROWS[-1])
    pipe.use_graph_mode = True

    def draw(pipe, **more):
        return pipe(**painter.arguments(0, prompt, steps), **more)[0][0]

    whole, whole_stats = draw(pipe, cache_config=config), pipe.cache_stats
    pieces = draw(pipe, cache_config=config, callback_on_step_end=lambda pipe, step, time, tensors: tensors)
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    mindones = apply_cache_on_pipe(pipe.MINDONES(**parts), config)
    mindones.set_progress_bar_config(disable=True)
    stepwise, stepwise_stats = draw(mindones), mindones.transformer.cache_stats
    equal = np.array_equal(whole, pieces)
    near = psnr(whole, stepwise)
    passed, text = agree(_trace(whole_stats), _trace(stepwise_stats), config.residual_diff_threshold, tolerance)
    text = (
        f"in pieces of one step the picture is {'the same' if equal else 'ANOTHER'} to the last bit"
        f"{'' if run.args.deterministic else ' (without --deterministic)'}; "
        f"in mindone's own pipeline, a graph a step: {near_text(near, floor)}, {text}"
    )
    return Finding(equal and passed and near >= floor, text)


def _trace(stats):
    return {"reused": stats.reused, "residual_diffs": stats.residual_diffs}


def check_quality(run):
    """Pictures with the cache against those without: PSNR, SSIM and, where there is a CLIP, its score."""
    args, steps = run.args, run.args.num_inference_steps
    rows = (
        BASELINE,
        *(Row("FBCache", f"FBCache({CacheConfig.named(tag).residual_diff_threshold:g})", tag) for tag in ROWS),
    )
    settings = {row: Setting.named(row.cache, steps) for row in rows}
    folders = run.drawn("pictures", settings.values(), args.prompts, in_turn=False)
    judge = Judge(args.prompts, folders[settings[BASELINE]], args.clip)
    cells = [cell_of(row, setting, folders[setting], args.save_path, judge) for row, setting in settings.items()]
    table = write_sweep(args.save_path, {**run.painter.common, "steps": steps}, args.prompts, cells)
    baseline, *cached = cells
    misses, words = [], []
    for cell in cached:
        floor = floor_of(run, CacheConfig.named(cell["cache"]))
        words.append(
            f"{cell['name']} {near_text(cell['psnr'], floor['psnr'])}, SSIM {cell['ssim']:.4f} ({floor['ssim']})"
        )
        if cell["psnr"] < floor["psnr"] or cell["ssim"] < floor["ssim"]:
            misses.append(cell["name"])
        if cell["clip_score"] is not None:
            words[-1] += f", CLIP score {cell['clip_score']:.4f} (uncached {baseline['clip_score']:.4f})"
            if knows_its_size(args) and abs(cell["clip_score"] - baseline["clip_score"]) > MOST_LOST_CLIP_SCORE:
                misses.append(cell["name"])
    text = f"{len(args.prompts)} prompts: {'; '.join(words)}; in brackets the least that is asked for"
    return Finding(not misses, text, table)


def floor_of(run, config):
    """The PSNR and SSIM that a setting has to reach: the embedded checkpoint's, drawn as when they were measured."""
    args, dtype = run.args, run.painter.device.dtype
    as_measured = is_embedded(args.ckpt) and (args.num_inference_steps, args.image_size, dtype) == (28, None, "float32")
    key = config.residual_diff_threshold, config.taylorseer_derivative
    return FLOORS[key] if as_measured else FLOOR_ELSEWHERE


def knows_its_size(args):
    """Whether a CLIP score says something: the embedded checkpoint has learnt one size alone."""
    return not is_embedded(args.ckpt) or args.image_size is None


def near_text(near, floor):
    """A PSNR in words, with the least that is asked for."""
    return "equal pictures" if math.isinf(near) else f"PSNR {near:.1f} dB ({floor})"


def agree(first, second, threshold, tolerance):
    """Whether two generations decide alike, and a line about it.

    A difference may lie off by the share ``tolerance``. Where one lies that near the threshold rounding decides; from
    there on the two are not compared.

    Args:
        first, second: {"reused": a bool a step, "residual_diffs": a number or None a step}.
        threshold: that of the decisions.
        tolerance: share of a difference.
    """
    largest = 0
    pairs = zip(first["reused"], second["reused"], first["residual_diffs"], second["residual_diffs"])
    for step, (reused, other_reused, difference, other) in enumerate(pairs):
        if (difference is None) != (other is None):
            return False, f"step {step} was compared by one alone"
        apart = 0 if difference == other else abs(other - difference) / difference
        if apart > tolerance:
            return False, (
                f"step {step} has the difference {other:.5f} for {difference:.5f}, {apart:.2%} off; "
                f"{tolerance:.1%} are allowed"
            )
        largest = max(largest, apart)
        if reused != other_reused:
            if difference is None or abs(difference - threshold) > tolerance * threshold:
                return False, f"step {step} is {'computed' if reused else 'reused'} by the other alone"
            return True, f"decisions equal up to step {step}, where rounding decides: {difference:.5f}, {other:.5f}"
    if len(first["reused"]) != len(second["reused"]):
        return False, f"{len(second['reused'])} steps for {len(first['reused'])}"
    differences = "differences too"
    if largest:
        differences = f"differences at most {max(largest, 1e-4):.2%} apart ({tolerance:.1%})"
    return True, f"decisions equal, {sum(first['reused'])} of {len(first['reused'])} steps reused, {differences}"


def run_program(module, options):
    """Runs a program of this package in a process of its own and shows its progress.

    Raises RuntimeError with its last line if it fails.
    """
    command = [sys.executable, "-m", module.__name__, *map(str, options)]
    shown = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        for piece in iter(process.stderr.read1, b""):
            text = piece.decode(errors="replace")
            sys.stderr.write(text)
            shown = (shown + text)[-LAST_WORDS:]
    if process.returncode:
        lines = shown.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{module.__name__} ended with status {process.returncode}: {lines[-1]}")


CHECKS = {
    "environment": check_environment,
    "unit_tests": check_unit_tests,
    "decisions": check_decisions,
    "sharing": check_sharing,
    "speed": check_speed,
    "memory": check_memory,
    "graph": check_graph,
    "loop": check_loop,
    "quality": check_quality,
}
"""In their order: processes of their own come before this one fills the NPU with the model."""
