"""Every table of speed, one benchmark after the other.

    .venv/bin/python benchmarks/speed.py --para_attention /tmp/peer/bin/python --cache_dit /tmp/cache_dit/bin/python

Each benchmark writes its own Markdown, CSV and JSON into --save_path; speed.md and speed.json then have all that lie
there, those of earlier runs with --only among them. One that misses its target does not stop the others; the status is
then 1.
"""

import json
import subprocess
import sys
from pathlib import Path

from FBCache_ms.eval.shared.arguments import Parser, add_save_path, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, json_bytes, say_written, write_file, write_text

BENCHMARKS = {
    "overhead": "The loop against its limit",
    "products": "A block against its products",
    "branches": "What a branch costs",
    "against_torch": "Against torch",
    "growth_against_torch": "Against torch as the model grows",
    "against_example": "Against the example in mindone",
    "first_picture": "The first picture",
    "sweep_time": "A sweep against its denoise loops",
    "growth": "Growth",
    "frontier": "The frontier",
}
PEERS = ("para_attention", "cache_dit")
NEEDS = {"against_torch": any, "growth_against_torch": lambda given: given[-1]}
"""What of the peers' environments, in that order, a benchmark cannot do without."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "speed", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME", help="which")
    for peer in PEERS:
        add(f"--{peer}", metavar="PYTHON", help="as of against_torch.py; what needs it is left out without")
    add("--into", type=Path, metavar="FOLDER", help="where each benchmark also writes its table, as its own --into")
    add_save_path(add, "./results/speed", "the tables")
    args = parser.parse_args(argv)
    given = [getattr(args, peer) is not None for peer in PEERS]
    args.only = [name for name in args.only if name not in NEEDS or NEEDS[name](given)]
    try:
        if not args.only:
            raise ValueError("torch's tables need --cache_dit, --para_attention or both")
        if args.into is not None and not args.into.is_dir():
            raise ValueError(f"--into: there is no folder {args.into}")
        check_folder(args.save_path)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def command_of(name, args):
    """A benchmark's command line."""
    options = ["--save_path", str(args.save_path)]
    if args.into is not None:
        options += ["--into", str(args.into / f"{name}.md")]
    if name in NEEDS:
        options += [text for peer in PEERS if getattr(args, peer) for text in (f"--{peer}", getattr(args, peer))]
    return [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *options]


def collect(folder, names):
    """Writes speed.md and speed.json from what the benchmarks wrote into a folder; returns the text."""
    text = "\n".join(f"## {BENCHMARKS[name]}\n\n{(folder / f'{name}.md').read_text()}" for name in names)
    data = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    write_text(folder / "speed.md", text)
    write_file(folder / "speed.json", lambda stream: stream.write(json_bytes(data)))
    return text


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    statuses = {}

    def work():
        for name in args.only:
            print(f"{name}: {BENCHMARKS[name]}", file=sys.stderr)
            # What an earlier run measured is not what one says that fails.
            (args.save_path / f"{name}.json").unlink(missing_ok=True)
            statuses[name] = subprocess.run(command_of(name, args)).returncode
        collect(args.save_path, [name for name in BENCHMARKS if (args.save_path / f"{name}.json").is_file()])
        say_written(args.save_path, "speed.md", "speed.json")

    status = exit_status("speed", work)
    missed = [name for name, code in statuses.items() if code]
    if missed:
        print(f"speed: {', '.join(missed)} ended with a status other than 0", file=sys.stderr)
    return status or int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
