"""Checks a pipeline folder in diffusers layout before anything is loaded from it."""

import json
from pathlib import Path

TINY_FLUX = Path(__file__).parent / "tiny_flux"
"""The embedded checkpoint."""

_REQUIRED = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_CONFIGS["tokenizer_2"] = _CONFIGS["tokenizer"]


def check_checkpoint(folder):
    """The tensors of each component of a Flux pipeline, {component: {tensor name: shape}}, read from file headers.

    Raises OSError, naming what is wrong, if the folder, a component, a config or a weights file is missing, cannot be
    read or was cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"checkpoint {folder} is not a folder")
    index = _read_json(folder / "model_index.json")
    tensors = {}
    for component in _REQUIRED:
        if component not in index:
            raise OSError(f"checkpoint {folder}: model_index.json names no {component}; a Flux pipeline needs one")
        if index[component][0] is None:
            continue
        _read_json(folder / component / _CONFIGS.get(component, "config.json"))
        if component not in _CONFIGS:
            tensors[component] = _component_tensors(folder / component)
    return tensors


def _component_tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        wanted = set(_read_json(index)["weight_map"].values())
        lost = sorted(wanted - {file.name for file in files})
        if lost:
            raise OSError(f"checkpoint {folder}: {lost[0]} is missing, one of {len(wanted)} weights files")
    if not files:
        raise OSError(f"checkpoint {folder}: no weights file *.safetensors")
    tensors = {}
    for file in files:
        tensors.update(_tensors(file))
    return tensors


def _tensors(file):
    """Names and shapes in a safetensors file: a length in 8 bytes, a JSON header of that length, the data."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < size else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise OSError(f"weights file {file} is damaged: it has no readable safetensors header")
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise OSError(f"weights file {file} is damaged: it has {size} bytes where its header says {end}")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}


def _read_json(path):
    if not path.is_file():
        raise OSError(f"checkpoint file {path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"checkpoint file {path} is not JSON: {error}") from None
