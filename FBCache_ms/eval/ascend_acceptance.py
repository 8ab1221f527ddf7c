"""Checks on an Ascend NPU, with one command, all that this package promises; without one it is a dry run on the CPU."""

import argparse
import inspect
import sys
import textwrap
import traceback

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import environment
from FBCache_ms.eval.shared.acceptance_checks import CHECKS, Finding, Run
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    one_line,
    reason,
)
from FBCache_ms.eval.shared.cases import ROWS
from FBCache_ms.eval.shared.files import check_folder, check_into, json_bytes, locked, put_into, write_file, write_text
from FBCache_ms.eval.shared.measure import clip_folder
from FBCache_ms.eval.shared.prompts import choose_prompts

LONGEST_REASON = 300
"""Characters of an error's message in the report; NAME.log has all of it."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "ascend_acceptance", description=__doc__)
    add_drawing_options(parser, limit=50, save_path="./results/acceptance", context_parallel=False)
    add_clip_option(parser)
    add = parser.add_argument_group("checks").add_argument
    add("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    add("--skip", nargs="+", choices=list(CHECKS), default=[], metavar="CHECK", help="leave these out")
    add("--runs", type=int, default=5, metavar="N", help="timed runs of each row of the speed table")
    add(
        "--pynative",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the speed table has the slow baseline, operator by operator",
    )
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        check_range("runs", args.runs, 1, 10_000)
        for tag in ROWS:
            check_cache(CacheConfig.named(tag), args.ckpt, args.num_inference_steps)
        args.prompts_file, args.prompts = args.prompts, choose_prompts(args)
        args.clip = clip_folder(args)
        args.checks = [name for name in args.only or CHECKS if name not in args.skip]
        if not args.checks:
            raise ValueError("--only and --skip leave no check")
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def device_here(args):
    """The device to run on: Ascend also where one is installed and does not work, so that its check says why."""
    import mindspore as ms

    if args.device != "auto":
        return args.device
    return "Ascend" if environment.is_ascend_machine() or ms.hal.is_available("Ascend") else "CPU"


def accept(args):
    """Runs the checks and writes the report; returns {name: Finding}."""
    from tqdm import tqdm

    args.device = device_here(args)
    run, findings = Run(args), {}
    with locked(args.save_path):
        for name, check in tqdm([item for item in CHECKS.items() if item[0] in args.checks], desc="checks"):
            try:
                findings[name] = check(run)
            except Exception as error:  # Whatever goes wrong in a check is what it found.
                write_text(args.save_path / f"{name}.log", traceback.format_exc())
                message = one_line(reason(error)) or type(error).__name__
                findings[name] = Finding(False, textwrap.shorten(message, LONGEST_REASON))
            tqdm.write(line_of(name, findings[name]))
        report = report_of(run, findings)
        write_text(args.save_path / "acceptance.md", report)
        write_file(args.save_path / "acceptance.json", lambda stream: stream.write(json_bytes(data_of(run, findings))))
        put_into(args.into, "".join(f"    {line_of(*item)}\n" for item in findings.items()))
    print(f"written to {args.save_path}: acceptance.md and acceptance.json")
    return findings


def verdict(finding):
    """A Finding's PASS, FAIL or SKIP."""
    return {True: "PASS", False: "FAIL", None: "SKIP"}[finding.passed]


def line_of(name, finding):
    """A check's line in the report."""
    return f"{verdict(finding)} {name}: {finding.text}"


def settings_of(run):
    """What was run, {name: value}; the versions are there once a model was loaded."""
    args = run.args
    common = vars(run)["painter"].common if "painter" in vars(run) else {"checkpoint": args.ckpt.resolve().name}
    return {**common, "device": args.device, "steps": args.num_inference_steps, "prompts": len(args.prompts)}


def report_of(run, findings):
    """The report as Markdown: a line for each check, what was run, and every table."""
    dry = run.args.device == "CPU"
    parts = ["# Acceptance run: a dry run on a CPU\n" if dry else "# Acceptance run on Ascend\n"]
    if dry:
        parts.append("No NPU was used: this shows that the checks work, and says nothing about one.\n")
    counts = [sum(verdict(finding) == word for finding in findings.values()) for word in ("PASS", "FAIL", "SKIP")]
    parts.append("{} passed, {} failed, {} skipped.\n".format(*counts))
    parts.append("".join(f"- {line_of(*item)}\n" for item in findings.items()))
    parts.append("Run with " + ", ".join(f"{name} {value}" for name, value in settings_of(run).items()) + ".\n")
    parts += [
        f"## {name}\n\n{inspect.getdoc(CHECKS[name])}\n\n{found.table}"
        for name, found in findings.items()
        if found.table
    ]
    return "\n".join(parts)


def data_of(run, findings):
    """The report's content for programs."""
    rows = [
        {"check": name, "verdict": verdict(found), "text": found.text, "table": found.table}
        for name, found in findings.items()
    ]
    return {"settings": settings_of(run), "findings": rows}


def main(argv=None):
    """The program; returns its exit status: 1 if a check failed."""
    args = parse_arguments(argv)
    findings = {}
    status = exit_status("ascend_acceptance", lambda: findings.update(accept(args)))
    return status or int(any(finding.passed is False for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(main())
