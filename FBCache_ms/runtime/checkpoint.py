"""Checks a pipeline folder in diffusers layout before anything is loaded from it."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

from ..models import costs_of

TINY_FLUX = Path(__file__).parents[1] / "tiny_flux"
"""The embedded checkpoint."""

FLUX_DEV = SimpleNamespace(
    _class_name="FluxTransformer2DModel",
    num_layers=19,
    num_single_layers=38,
    num_attention_heads=24,
    attention_head_dim=128,
    in_channels=64,
    out_channels=None,
    patch_size=1,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
"""The transformer's config of black-forest-labs/FLUX.1-dev."""

_REQUIRED = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
_FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json", "vocab.json", "merges.txt"),
    "tokenizer_2": ("tokenizer_config.json",),
}
_TOKENIZER_2_MODELS = ("tokenizer.json", "spiece.model")
_TORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
_HARMLESS = ("position_ids", "embed_tokens.weight")
_REPOSITORY = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*/\w[\w.-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_SUFFIXES = ("safetensors", "index", "json")
_SAMPLE = 4096


def is_hub_name(name):
    """Whether this is a model's name on a hub, an owner's and the model's, rather than a path.

    Where there is such a folder or one with the owner's name, it is a path.
    """
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name)) and not Path(name).parent.exists()


def check_checkpoint(folder, handed_over=(), variant=None):
    """The tensors of each component of a Flux pipeline, {component: {tensor name: shape}}, read from file headers.

    Args:
        folder: the pipeline's.
        handed_over: the components that need no files here.
        variant: whose weights files are meant, like "fp16", where a component has them; None for those of no variant.

    Raises OSError, naming what is wrong, if the folder, a component, a config, a weights file or the variant is
    missing, cannot be read or was cut short.
    """
    folder = Path(folder)
    if not folder.exists():
        raise OSError(f"checkpoint {folder}: there is no such folder")
    if not folder.is_dir():
        raise OSError(f"checkpoint {folder} is a file, not a folder")
    index = _read_json(folder / "model_index.json")
    components = [name for name in _REQUIRED if name not in handed_over]
    for component in components:
        if not isinstance(index.get(component), list) or len(index[component]) != 2:
            raise OSError(f"checkpoint {folder}: model_index.json names no {component}; a Flux pipeline needs one")
    components = [name for name in components if index[name][0] is not None]
    for component in components:
        _check_files(folder, component)
    models = [name for name in components if name not in _FILES]
    variants = {_variant(file) for name in models for file in _visible(folder / name, "*.safetensors")} - {None}
    if variant is not None and models and variant not in variants:
        others = ", ".join(sorted(variants)) or "none"
        raise OSError(f"checkpoint {folder} has no weights of variant {variant}; its variants: {others}")
    return {name: _component_tensors(folder / name, variant) for name in models}


def absent_components(folder):
    """The components that the pipeline was saved without."""
    index = _read_json(Path(folder) / "model_index.json")
    return [name for name in _REQUIRED if isinstance(index.get(name), list) and index[name][:1] == [None]]


def check_fit(component, cell, tensors):
    """Raises ValueError if a loaded component and the tensors of its files, {name: shape}, are not the same set."""
    wanted = {_torch_name(name) for name, _ in cell.parameters_and_names()}
    there = set(map(_torch_name, tensors))
    for problem, names in {"lack": wanted - there, "have, but its config does not,": there - wanted}.items():
        names = sorted(name for name in names if not name.endswith(_HARMLESS))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"checkpoint component {component}: its weights {problem} {names[0]}{more}")


def _torch_name(name):
    """A Parameter's name as torch has it; MindSpore's layers, and text encoders that mindone saved, have their own."""
    head, _, tail = name.rpartition(".")
    return f"{head}.{_TORCH_NAMES.get(tail, tail)}"


def image_unit(folder):
    """What an image's height and width have to be multiples of: the autoencoder's factor times the patch's 2.

    Raises OSError if the autoencoder's config does not say.
    """
    path = Path(folder) / "vae" / "config.json"
    widths = _read_json(path).get("block_out_channels")
    if not isinstance(widths, list) or not widths:
        raise OSError(f"checkpoint file {path} is damaged: it has no block_out_channels")
    return 2 ** len(widths)


def block_counts(folder):
    """How many double and single blocks the transformer has."""
    config = transformer_config(folder)
    return costs_of(config).stacks(config)


def transformer_config(folder):
    """The transformer's config, FLUX.1's where the file does not say; without a guidance embedding unless it does."""
    config = _read_json(Path(folder) / "transformer" / "config.json")
    return SimpleNamespace(**{**vars(FLUX_DEV), "guidance_embeds": False, **config})


def image_size(folder):
    """The height and width in pixels that the autoencoder's config names, which a picture has by default."""
    size = _read_json(Path(folder) / "vae" / "config.json").get("sample_size", 1024)
    return size // image_unit(folder) * image_unit(folder)


def fingerprint(folder):
    """A checksum that tells checkpoints apart, wherever they lie: of every config, and of where each tensor begins.

    It reads a few kilobytes of each tensor, so that it takes a second and not a minute for a model of 34 GB; training
    or merging changes all of a tensor.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for file in _visible(folder, "**/*"):
        if file.suffix in (".json", ".txt", ".model"):
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                text = stream.read(length)
                digest.update(file.relative_to(folder).as_posix().encode() + text)
                header = json.loads(text)
                header.pop("__metadata__", None)
                for begin, _ in sorted(tensor["data_offsets"] for tensor in header.values()):
                    stream.seek(8 + length + begin)
                    digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _check_files(folder, component):
    for name in _FILES.get(component, ("config.json",)):
        path = folder / component / name
        if name.endswith(".json"):
            _read_json(path)
        elif not path.is_file():
            raise OSError(f"checkpoint file {path} is missing")
    if component == "tokenizer_2":
        there = [name for name in _TOKENIZER_2_MODELS if (folder / component / name).is_file()]
        if not there:
            raise OSError(f"checkpoint {folder / component} has neither of {' and '.join(_TOKENIZER_2_MODELS)}")
        if "tokenizer.json" in there:
            _read_json(folder / component / "tokenizer.json")


def _component_tensors(folder, variant):
    weights, indices = _visible(folder, "*.safetensors"), _visible(folder, "*.safetensors.index*.json")
    there = {_variant(file) for file in weights + indices}
    variant = variant if variant in there else None
    files = [file for file in weights if _variant(file) == variant]
    for index in (index for index in indices if _variant(index) == variant):
        wanted = _read_json(index).get("weight_map")
        if not isinstance(wanted, dict):
            raise OSError(f"checkpoint file {index} is damaged: it has no weight_map")
        wanted = set(wanted.values())
        whole = _SHARD.sub("", min(wanted))
        if any(file.name == whole for file in files) and wanted != {whole}:
            raise OSError(
                f"checkpoint {folder} has its weights twice, by {whole} and by {index.name}; remove the old ones"
            )
        lost = sorted(wanted - {file.name for file in files})
        if lost:
            raise OSError(f"checkpoint {folder}: {lost[0]} is missing, one of {len(wanted)} weights files")
    if not files:
        hint = f" but for variant {', '.join(sorted(there))}" if there else ""
        raise OSError(f"checkpoint {folder}: no weights file *.safetensors{hint}")
    tensors = {}
    for file in files:
        tensors.update(_tensors(file))
    return tensors


def _visible(folder, pattern):
    """The files below a folder that no system or tool hid there, such as ._ files of macOS."""
    files = ((file, file.relative_to(folder).parts) for file in folder.glob(pattern))
    return sorted(file for file, parts in files if not any(part.startswith(".") for part in parts))


def _variant(file):
    """The variant that a weights file's or an index's name tells, None for none: model.fp16-00001-of-00002.safetensors
    has fp16."""
    return ".".join(part for part in _SHARD.sub("", file.name).split(".")[1:] if part not in _SUFFIXES) or None


def _tensors(file):
    """Names and shapes in a safetensors file: a length in 8 bytes, a JSON header of that length, the data."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length < size else b"")
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise OSError(f"weights file {file} is damaged: it has no readable safetensors header") from None
    if size != end:
        raise OSError(f"weights file {file} is damaged: it has {size} bytes where its header says {end}")
    return shapes


def _read_json(path):
    if not path.is_file():
        raise OSError(f"checkpoint file {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"checkpoint file {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise OSError(f"checkpoint file {path} is damaged: it holds no JSON object")
    return content
