"""The command fbcache: every program of FBCache_ms under one name."""

import argparse
import sys
from importlib import import_module
from importlib.metadata import version

from FBCache_ms.eval.shared.arguments import TYPED, Parser

PROGRAMS = {
    "draw": ("run_flux_withFBCache_pipeline", "draw a prompt; say what was cached and what that saved"),
    "serve": ("serve", "serve pictures over HTTP, by OpenAI's interface"),
    "bench": ("benchmark", "time the uncached loop and caches beside it"),
    "sweep": ("sweep", "draw the same prompts under many configurations, and compare"),
    "tune": ("tune", "find the fastest configuration that is good enough, or the best"),
    "learn": ("learn_mask", "learn which steps to compute, for a checkpoint"),
    "report": ("report", "make one HTML page of a sweep"),
    "quality": ("quality", "score a folder of pictures: PSNR, SSIM, LPIPS, CLIP, FID"),
    "fid": ("fid_mscoco", "measure the Fréchet distance to MSCOCO's pictures"),
    "memory": ("memory", "count the bytes that caches take"),
    "predict": ("cost_model", "predict times and operations on an Atlas or a GPU"),
    "doctor": ("environment", "say what is installed, and what is wrong with it"),
    "accept": ("ascend_acceptance", "check on an Ascend NPU all that is promised"),
    "family": ("family", "put the cache on mindone's other Flux pipelines, and compare"),
    "precision": ("precision", "show what bfloat16 does to decisions and forecasts"),
}
"""{subcommand: (the module in this folder, what it does)}."""

EXAMPLES = """\
fbcache draw --prompt "a big red circle" --cache teacache --compare
fbcache sweep --cases fbcache teacache --limit 10
fbcache tune --help"""


def main(argv=None, module=__name__):
    """The command; hands what follows the subcommand to that program, and returns its exit status.

    ``module`` is the ``__name__`` of the file that was started.
    """
    argv = sys.argv[1:] if argv is None else argv
    lines = [f"  {name:<11}{text}" for name, (_, text) in PROGRAMS.items()]
    parts = [
        "Draws with Flux on MindSpore behind a cache, measures it and tunes it.",
        "\n".join(lines),
        "\n".join(f"  {line}" for line in EXAMPLES.splitlines()),
    ]
    parser = Parser(
        module, "fbcache", "[--version] SUBCOMMAND [options]", description="\n\n".join(parts), add_help=False
    )
    # The usage and the description say all of these, so that the help is one screen.
    add = parser.add_argument
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    add("--version", action="version", version=f"fbcache {version('FBCache_ms')}", help=argparse.SUPPRESS)
    add("program", choices=PROGRAMS, metavar="SUBCOMMAND", help=argparse.SUPPRESS)
    program = parser.parse_args(argv[:1] or ["--help"]).program
    typed_before = TYPED.set(f"{parser.prog} {program}")
    try:
        return import_module(f"FBCache_ms.eval.{PROGRAMS[program][0]}").main(argv[1:])
    finally:
        TYPED.reset(typed_before)


if __name__ == "__main__":
    sys.exit(main())
