"""Compiled graphs on disk, a folder each, so that another process starts from them.

MindSpore's own compile cache (2.7.0) numbers a process's graphs in the order of their compilation, in one folder for
all of them, and asks of a graph only whether source files have changed since. A program that compiles in another order,
or with other constants, is given a wrong graph. So here every graph has a folder whose name is a checksum over all that
shapes it, and MindSpore is shown that folder alone, while it compiles that graph alone.
"""

import hashlib
import inspect
import itertools
import json
import os
import shutil
import tempfile
import time
from atexit import register
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from platform import python_version

import mindone
import transformers

import mindspore as ms

_SOURCES = ("*.py", "models/*.py", "backend/*.py", "backend/*.cc")
_NUMBERS = itertools.count()

LEFT_OVER = 24 * 3600
"""Seconds after which an unfinished graph's folder belongs to no process any more."""

MOST = 128
"""So many graphs a folder keeps; a generation has four: the loop, two text encoders and the autoencoder's decoder."""


def graph_key(cell, inputs, model, **structure):
    """All that shapes a cell's graph, as text: what is given, its layers, Parameters and inputs, and whose code it is.

    Two graphs with the same text are the same graph; the weights' values are not in it, they are not in the graph.

    Args:
        cell: what is compiled.
        inputs: its inputs.
        model: the model with a config that it is, or that it runs the layers of.
        structure: what makes a graph of its own beside these.

    Raises OSError or TypeError for a layer whose source is in no file.
    """

    def description(value):
        return [list(value.shape), str(value.dtype)] if hasattr(value, "dtype") else str(value)

    processors = getattr(model, "attn_processors", {})
    layers = [*model.cells_and_names(), *processors.items()]
    kinds = [f"{name} {type(layer).__qualname__}" for name, layer in layers]
    parts = {
        "cell": type(cell).__name__,
        **structure,
        "model": config_of(model),
        "training": cell.training,
        "layers": hashlib.sha256("\n".join(kinds).encode()).hexdigest(),
        "inputs": [description(value) for value in inputs],
        "parameters": {parameter.name: description(parameter) for parameter in cell.get_parameters()},
        "jit_syntax_level": str(ms.get_context("jit_syntax_level")),
        "mindspore": ms.__version__,
        "mindone": mindone.__version__,
        "transformers": transformers.__version__,
        "python": python_version(),
        "FBCache_ms": sources_checksum(),
        "layer_sources": files_checksum({inspect.getfile(type(layer)) for _, layer in layers}),
    }
    return json.dumps(parts, indent=1, sort_keys=True, default=str)


def users_folder():
    """The user's folder for what need not be made twice; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "FBCache_ms"


def config_of(model):
    """A model's config, a dictionary: diffusers' is one, and transformers' leaves out how attention is computed."""
    if not hasattr(model.config, "to_dict"):
        return dict(model.config)
    return {**model.config.to_dict(), "attention": getattr(model.config, "_attn_implementation", None)}


@lru_cache(maxsize=None)
def sources_checksum():
    """A checksum over the sources of this package, but for its programs."""
    return files_checksum(file for pattern in _SOURCES for file in Path(__file__).parent.glob(pattern))


def files_checksum(files):
    """A checksum over what files hold, wherever they lie."""
    digest = hashlib.sha256()
    for file in sorted(map(Path, files)):
        digest.update(f"{file.parent.name}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class CompileCache:
    """The folder that keeps the graphs used last; it is made where it is missing, and processes may share it."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key, number):
        """The folder of a graph, by its graph_key, as the number-th one that a process compiles from here."""
        kind = json.loads(key)["cell"]
        return self.folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}-{number}"

    def compile(self, cell, inputs, key):
        """Compiles a cell, or takes its graph from here; returns whether it came from here.

        A graph is written beside the others and then takes its name, so that a process that is killed, or two at the
        same time, leave none that is half written.
        """
        number = next(_NUMBERS)
        kept = self.path(key, number).resolve()
        found = kept.is_dir()
        kept.parent.mkdir(parents=True, exist_ok=True)
        place = kept if found else Path(tempfile.mkdtemp(dir=kept.parent, prefix=f"{kept.name}."))
        link = _link()
        link.unlink(missing_ok=True)
        link.symlink_to(place, target_is_directory=True)
        variables = {
            "MS_COMPILER_CACHE_ENABLE": "1",
            "MS_COMPILER_CACHE_PATH": str(link),
            # MindSpore would ask whether the program's own file has changed, which is not in the graph.
            "MS_DEV_FORCE_USE_COMPILE_CACHE": "1",
        }
        environment = {name: os.environ.get(name) for name in variables}
        files = _times(place)
        os.environ.update(variables)
        try:
            cell.compile(*inputs)
            used = found and _times(place) == files
            if not found:
                (place / "graph.json").write_text(key + "\n", encoding="utf-8")
                place.chmod(0o755)  # mkdtemp's is for its maker alone.
                with suppress(OSError):  # Another process was faster.
                    place.rename(kept)
            with suppress(OSError):  # A folder to read from, or another process that does the same.
                (kept / "graph.json").touch()
                self.prune()
        finally:
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            if not found:
                shutil.rmtree(place, ignore_errors=True)
        return used

    def prune(self):
        """Removes the graphs beyond MOST that were not used for longest, and what a killed process left for a day."""
        graphs = sorted(self.folder.glob("*/graph.json"), key=lambda file: file.stat().st_mtime)
        unfinished = self.folder.glob(f"*-{'[0-9a-f]' * 24}-*.*")
        left = [place for place in unfinished if time.time() - place.stat().st_mtime > LEFT_OVER]
        for place in [file.parent for file in graphs[:-MOST]] + left:
            shutil.rmtree(place, ignore_errors=True)


def _times(folder):
    """When each file in a folder was written: MindSpore writes a graph anew that it cannot use."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.mindir")}


@lru_cache(maxsize=None)
def _link():
    """The one path that MindSpore remembers for the rest of the process; it points to the graph being compiled."""
    folder = tempfile.mkdtemp(prefix="FBCache_ms_")
    register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "graph"
