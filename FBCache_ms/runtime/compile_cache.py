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
from types import FunctionType, MethodType

import mindone
import transformers
from google.protobuf.message import DecodeError
from mindone.diffusers.utils import logging

import mindspore as ms
from mindspore.train.mind_ir_pb2 import ModelProto

from ..models.mindones import AUTHORS, by_known_author
from .kept_graphs import VALUES, bases_of, constants_of

logger = logging.get_logger(__name__)

_ROOMS = "rules", "cache", "models", "runtime", "pipelines"
_NUMBERS = itertools.count()

LEFT_OVER = 24 * 3600
"""Seconds after which an unfinished graph's folder belongs to no process any more."""

KEPT_ON_DISK = 128
"""So many graphs a folder keeps; a generation has four: the loop, two text encoders and the autoencoder's decoder."""

DECORATORS = "contextlib", "functools", "huggingface_hub", "transformers"
"""Packages by whose decorators mindone wraps methods."""


def graph_key(cell, inputs, model, **structure):
    """All that shapes a cell's graph, as text: what is given, its layers, Parameters and inputs, and whose code it is.

    Two graphs with the same text are the same graph; the weights' values are not in it, they are not in the graph.

    Args:
        cell: what is compiled.
        inputs: its inputs.
        model: the model with a config that it is, or that it runs the layers of.
        structure: what makes a graph of its own beside these.

    Raises TypeError for a model that is not mindone's own throughout: another process cannot tell what it computes.
    """

    constants, kinds = constants_of(model, as_text)
    check_authors(kinds)
    parts = {
        "cell": type(cell).__name__,
        **structure,
        "model": config_of(model),
        "training": cell.training,
        "layers": hashlib.sha256(repr(constants).encode()).hexdigest(),
        "inputs": [description(value) for value in inputs],
        "parameters": {parameter.name: description(parameter) for parameter in cell.get_parameters()},
        "jit_syntax_level": str(ms.get_context("jit_syntax_level")),
        "mindspore": ms.__version__,
        "mindone": mindone.__version__,
        "transformers": transformers.__version__,
        "python": python_version(),
        "FBCache_ms": sources_checksum(),
        "layer_sources": files_checksum({inspect.getfile(kind) for kind in kinds}),
    }
    return json.dumps(parts, indent=1, sort_keys=True, default=str)


def description(value):
    """A tensor's shape and dtype, or of a dictionary, list or tuple those of each; anything else as text."""
    if isinstance(value, dict):
        return [[name, description(each)] for name, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [description(each) for each in value]
    return [list(value.shape), str(value.dtype)] if hasattr(value, "dtype") else str(value)


def as_text(value):
    """What a layer has, as text that is the same in every process; raises TypeError for what has no such text."""
    if type(value) in VALUES or isinstance(value, ms.Type):
        return repr(value)
    if isinstance(value, (list, tuple, set)):
        return str([as_text(each) for each in value])
    if isinstance(value, dict):
        return str({str(name): as_text(each) for name, each in value.items()})
    if isinstance(value, ms.Parameter):
        return ""  # graph_key has them.
    if isinstance(value, ms.Tensor):
        digest = hashlib.sha256(value.float().asnumpy().tobytes()).hexdigest()
        return f"{value.shape} {value.dtype} {digest}"
    if isinstance(value, (FunctionType, MethodType)):
        check_function(getattr(value, "__func__", value))
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):
        return str(value.to_dict())
    check_authors([type(value)])
    return f"{type(value)} {as_text(getattr(value, 'attrs', None))}"


def check_authors(kinds):
    """Raises TypeError unless classes, and the methods of theirs, are mindone's or MindSpore's own."""
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in AUTHORS:
            raise TypeError(f"{kind.__qualname__} is not mindone's")
    for base in bases_of(kinds):
        for method in vars(base).values():
            method = getattr(method, "__func__", getattr(method, "fget", method))
            if isinstance(method, FunctionType):
                module = method.__globals__.get("__name__", "")
                # A base from elsewhere has methods of its own file, and mindone decorates some by other packages.
                if module != base.__module__ and module.partition(".")[0] not in DECORATORS:
                    check_function(method)


def check_function(function):
    """Raises TypeError for a function of the user's."""
    if not by_known_author(function):
        raise TypeError(f"{function.__qualname__} is not mindone's")


def users_folder():
    """The user's folder for what need not be made twice; it may not be there yet.

    One with a colon in its path is passed over where it can be: MindSpore takes what follows for a kernel's name.
    """
    folders = [os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache")]
    folders = [Path(folder) / "FBCache_ms" for folder in folders if folder]
    return next((folder for folder in folders if ":" not in str(folder)), folders[0])


def config_of(model):
    """A model's config, a dictionary: diffusers' is one, and transformers' leaves out how attention is computed."""
    if not hasattr(model.config, "to_dict"):
        return dict(model.config)
    return {**model.config.to_dict(), "attention": getattr(model.config, "_attn_implementation", None)}


@lru_cache(maxsize=None)
def sources_checksum():
    """A checksum over the sources of this package that say what a graph computes."""
    package = Path(__file__).parents[1]
    files = (file for room in _ROOMS for kind in ("py", "cc") for file in (package / room).rglob(f"*.{kind}"))
    return files_checksum([package / "config.py", *files])


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

        A graph is written beside the others and takes its name when it is whole, so that a process that is killed, a
        full disk, or two processes at the same time leave none that is half written. What cannot be written is not
        kept, with a warning.
        """
        number = next(_NUMBERS)
        kept = self.path(key, number).resolve()
        found = _is_whole(kept)
        try:
            place = kept if found else self._fresh(kept)
            link = _link()
            link.unlink(missing_ok=True)
            link.symlink_to(place, target_is_directory=True)
        except OSError as error:
            _warn(f"compiled graphs are not kept in {self.folder}: {error.strerror}")
            cell.compile(*inputs)
            return False
        variables = {
            "MS_COMPILER_CACHE_ENABLE": "1",
            "MS_COMPILER_CACHE_PATH": str(link),
            # MindSpore would ask whether the program's own file has changed, which is not in the graph.
            "MS_DEV_FORCE_USE_COMPILE_CACHE": "1",
        }
        environment = {name: os.environ.get(name) for name in variables}
        times = _times(place)
        os.environ.update(variables)
        try:
            cell.compile(*inputs)
            used = found and _times(kept) == times
            if not found:
                self._keep(place, kept, key)
            elif not _is_whole(kept):
                shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):  # A folder to read from, or another process that does the same.
                (kept / "graph.json").touch()
                self.prune()
        finally:
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            if not found:
                shutil.rmtree(place, ignore_errors=True)
        return used

    def _fresh(self, kept):
        """A folder to write a graph to, beside the one that it will be."""
        shutil.rmtree(kept, ignore_errors=True)  # Not whole.
        kept.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=kept.parent, prefix=f"{kept.name}."))

    def _keep(self, place, kept, key):
        """Gives a graph its name, and graph.json: its key, and the checksums that tell whether it is still whole."""
        try:
            files = _checksums(place)
            for file in files:
                _check_end(place / file)
            (place / "graph.json").write_text(
                json.dumps({**json.loads(key), "files": files}, indent=1), encoding="utf-8"
            )
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or "it could not be written to its end"
            _warn(f"a compiled graph is not kept in {self.folder}: {reason}")
            return
        place.chmod(0o755)  # mkdtemp's is for its maker alone.
        with suppress(OSError):  # Another process was faster.
            place.rename(kept)

    def prune(self):
        """Removes graphs beyond KEPT_ON_DISK, the longest unused first, and what a killed process left for a day."""
        graphs = sorted(self.folder.glob("*/graph.json"), key=lambda file: file.stat().st_mtime)
        unfinished = self.folder.glob(f"*-{'[0-9a-f]' * 24}-*.*")
        left = [place for place in unfinished if time.time() - place.stat().st_mtime > LEFT_OVER]
        for place in [file.parent for file in graphs[:-KEPT_ON_DISK]] + left:
            shutil.rmtree(place, ignore_errors=True)


def _times(folder):
    """When each graph in a folder was written: MindSpore writes one anew that it cannot use."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.mindir")}


def _is_whole(folder):
    """Whether a graph's files are as they were when it was kept."""
    try:
        return json.loads((folder / "graph.json").read_text(encoding="utf-8"))["files"] == _checksums(folder)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _checksums(folder):
    """{file: checksum} of a graph's files, of which graph.json is none."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "graph.json")
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _check_end(file):
    """Raises DecodeError for a graph that ends before its last field; MindSpore tells nobody that a disk is full."""
    if file.suffix == ".mindir":
        model = ModelProto.FromString(file.read_bytes())
        if not model.HasField("mind_ir_version"):
            raise DecodeError


@lru_cache(maxsize=None)
def _warn(text):
    """Warns once."""
    logger.warning(text)


@lru_cache(maxsize=None)
def _link():
    """The one path that MindSpore remembers for the rest of the process; it points to the graph being compiled."""
    folder = tempfile.mkdtemp(prefix="FBCache_ms_")
    register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "graph"
