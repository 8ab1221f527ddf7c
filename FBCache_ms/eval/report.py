"""Makes one HTML page of a sweep: the trade-off, the decisions, the differences, the pictures and the tables."""

import base64
import io
import json
import math
import os
import re
import sys
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from FBCache_ms.eval.shared.arguments import Parser, exit_status
from FBCache_ms.eval.shared.files import write_text
from FBCache_ms.eval.shared.metrics import open_picture

PAGE = Path(__file__).parent / "report_page"
LARGEST, LOSSLESS = 256, 128
"""The longest side in pixels of a picture on the page, and of one that is kept to the last bit."""

TEXT, NUMBER, MAYBE, LIST = (str,), (int, float), (int, float, type(None)), (list,)
SCORES = dict.fromkeys(("psnr", "ssim", "prompt_score", "clip_score"), MAYBE)
CELL = {
    **dict.fromkeys(("case", "name", "cache", "config", "folder"), TEXT),
    **dict.fromkeys(("seconds", "speedup", "computed_steps"), NUMBER),
    **dict.fromkeys(("threshold", "difference_limit", "uncached_seconds", "skipped", "tflops"), MAYBE),
    **SCORES,
    "steps": (int,),
    "pictures": LIST,
}
PICTURE = {"index": (int,), "seconds": NUMBER, **SCORES, "reused": LIST, "residual_diffs": LIST}


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "report", "SWEEP_FOLDER [options]", description=__doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_FOLDER", help="the folder that holds sweep.json")
    parser.add_argument("--save_path", type=Path, metavar="FILE", help="the page (default: SWEEP_FOLDER/report.html)")
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help="of how many prompts")
    args = parser.parse_args(argv)
    args.save_path = args.save_path or args.sweep / "report.html"
    if args.pictures < 1:
        parser.error(f"--pictures must be at least 1, not {args.pictures}")
    return args


def plotly_js():
    """The plotting library's script. Raises ValueError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("report needs plotly; install FBCache_ms[eval]") from None
    return get_plotlyjs()


def read_sweep(file):
    """The content of sweep.json, without the keys that the page does not use.

    A picture's ``reused`` becomes a text with 1 for a reused step and 0 for a computed one. Raises OSError where the
    file cannot be read, ValueError, naming the file and the place, where it is no sweep.
    """
    try:
        sweep = json.loads(file.read_text(encoding="utf-8"), parse_float=_number, parse_constant=_number)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    sweep = pick(sweep, {"settings": (dict,), "prompts": LIST, "cells": LIST}, file)
    if not sweep["prompts"] or {type(prompt) for prompt in sweep["prompts"]} != {str}:
        raise ValueError(f"{file}: prompts must be a list of texts")
    if not sweep["cells"]:
        raise ValueError(f"{file}: cells is empty")
    for number, cell in enumerate(sweep["cells"]):
        where = f"{file}: cells[{number}]"
        sweep["cells"][number] = cell = pick(cell, CELL, where)
        cell["pictures"] = [
            read_picture(picture, cell["steps"], f"{where}.pictures[{index}]")
            for index, picture in enumerate(cell["pictures"])
        ]
        cell["pictures"].sort(key=lambda picture: picture["index"])
        if [picture["index"] for picture in cell["pictures"]] != list(range(len(sweep["prompts"]))):
            raise ValueError(f"{where}: pictures must hold every prompt's index once")
    return sweep


def read_picture(picture, steps, where):
    """A picture's figures, of a generation in ``steps`` steps; raises ValueError as read_sweep."""
    picture = pick(picture, PICTURE, where)
    for name, kinds in (("reused", (bool,)), ("residual_diffs", MAYBE)):
        if len(picture[name]) != steps or any(type(value) not in kinds for value in picture[name]):
            raise ValueError(f"{where}: {name} must hold {steps} values, one a step")
    picture["reused"] = "".join(str(int(reused)) for reused in picture["reused"])
    diffs = picture["residual_diffs"]
    picture["residual_diffs"] = [None if value is None else float(f"{value:.4g}") for value in diffs]
    return picture


def pick(holder, kinds, where):
    """The named values of a JSON object. Raises ValueError for one that is missing or of none of its ``kinds``."""
    if type(holder) is not dict:
        raise ValueError(f"{where} must be an object")
    for name, kind in kinds.items():
        if name not in holder:
            raise ValueError(f"{where} has no {name}")
        if type(holder[name]) not in kind:
            raise ValueError(f"{where}: {name} cannot be {json.dumps(holder[name])[:40]}")
    return {name: holder[name] for name in kinds}


def _number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def picture_uri(path):
    """A picture as a data URI, no side above LARGEST pixels. Raises OSError, naming the file, if unreadable."""
    with open_picture(path) as image:
        picture = image.convert("RGB")
    if max(picture.size) <= LOSSLESS:
        kind, options = "png", {"optimize": True}
    else:
        kind, options = "webp", {"quality": 90}
        picture.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def page_data(folder, prompts_shown, page_folder=None):
    """What the page shows of a sweep: read_sweep's content with the pictures of the first prompts.

    ``images`` lists each different picture once: what is ``shown``, and the address of the ``full`` picture as seen
    from the page's folder, None where that is shown. A cell's ``images`` are indices into it, one a prompt shown.
    Raises OSError and ValueError, naming the file, for what cannot be read.
    """
    data = read_sweep(folder / "sweep.json")
    images, numbers = [], {}
    for cell in data["cells"]:
        pictures, cell["images"] = folder / cell.pop("folder"), []
        for index in range(len(data["prompts"]))[:prompts_shown]:
            path = pictures / f"{index:05d}.png"
            uri = picture_uri(path)
            whole = uri.startswith("data:image/png")
            # Different pictures may become the same where they are reduced.
            key = uri if whole else sha256(path.read_bytes()).digest()
            if key not in numbers:
                numbers[key] = len(images)
                images.append({"shown": uri, "full": None if whole else address(path, page_folder or folder)})
            cell["images"].append(numbers[key])
    return {**data, "images": images}


def address(path, page_folder):
    """A file's address as seen from a page in a folder."""
    return quote(Path(os.path.relpath(path, page_folder)).as_posix())


def page(data, plotly):
    """The page's text, everything within it."""
    parts = {
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "script": (PAGE / "page.js").read_text(encoding="utf-8"),
        "plotly": plotly,
        # "<" in a prompt could otherwise end the script element that holds the data.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"{{(\w+)}}", lambda mark: parts[mark[1]], (PAGE / "page.html").read_text(encoding="utf-8"))


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        folder = args.save_path.parent
        text = page(page_data(args.sweep, args.pictures, folder), plotly_js())
        folder.mkdir(parents=True, exist_ok=True)
        write_text(args.save_path, text)
        print(f"written to {args.save_path}")

    return exit_status("report", work)


if __name__ == "__main__":
    sys.exit(main())
