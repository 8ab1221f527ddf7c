"""Checks a pipeline folder in diffusers layout before anything is loaded from it."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

from ..models import costs_of, flux_costs

TINY_FLUX = Path(__file__).parents[1] / "tiny_flux"
"""The embedded checkpoint."""

FLUX_DEV = flux_costs.PUBLISHED
"""The transformer's config of black-forest-labs/FLUX.1-dev."""

_READ = ("scheduler", "tokenizer", "tokenizer_2")
"""Components without weights."""

_VOCABULARIES = ("vocab.json", "merges.txt"), ("tokenizer.json",), ("spiece.model",)
"""The files that one tokenizer or another has; it needs those of one line."""

_TORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
_HARMLESS = ("position_ids", "embed_tokens.weight", "inv_freq")
_REPOSITORY = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*/\w[\w.-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_SUFFIXES = ("safetensors", "index", "json")
_SAMPLE = 4096


def is_hub_name(name):
    """Whether this is a model's name on a hub, an owner's and the model's, rather than a path.

    Where there is such a folder or one with the owner's name, it is a path.
    """
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name)) and not Path(name).parent.exists()


def check_checkpoint(folder, handed_over=(), variant=None, kind=None):
    """The tensors of each component of a pipeline, {component: {tensor name: shape}}, read from file headers.

    Args:
        folder: the pipeline's.
        handed_over: the components that need no files here.
        variant: whose weights files are meant, like "fp16", where a component has them; None for those of no variant.
        kind: the class of transformer that the caller takes, by name; None for any that the cache knows.

    Raises OSError, naming what is wrong, if the folder, a component, a config, a weights file or the variant is
    missing, cannot be read or was cut short, or if the transformer is of another kind.
    """
    folder = Path(folder)
    if not folder.exists():
        raise OSError(f"checkpoint {folder}: there is no such folder")
    if not folder.is_dir():
        raise OSError(f"checkpoint {folder} is a file, not a folder")
    index = read_json(folder / "model_index.json")
    family = _family(folder, index, kind)
    components = [name for name in family.COMPONENTS if name not in handed_over]
    for component in components:
        if not isinstance(index.get(component), list) or len(index[component]) != 2:
            pipeline = family.PIPELINE
            raise OSError(f"checkpoint {folder}: model_index.json names no {component}; a {pipeline} needs one")
    components = [name for name in components if index[name][0] is not None]
    for component in components:
        _check_files(folder, component)
    models = [name for name in components if name not in _READ]
    variants = {_variant(file) for name in models for file in _visible(folder / name, "*.safetensors")} - {None}
    if variant is not None and models and variant not in variants:
        others = ", ".join(sorted(variants)) or "none"
        raise OSError(f"checkpoint {folder} has no weights of variant {variant}; its variants: {others}")
    return {name: _component_tensors(folder / name, variant) for name in models}


def _family(folder, index, kind):
    """What is known of a pipeline's family, by the transformer that its index names; the caller's where it names none.

    Raises OSError unless it names the kind that is asked for, or one that the cache knows.
    """
    named = index.get("transformer")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    if kind is not None and name not in (None, kind):
        takes, pipeline = costs_of(SimpleNamespace(_class_name=kind)).PIPELINE, index.get("_class_name")
        raise OSError(f"checkpoint {folder} has a {name}, for {pipeline}; {takes} takes a {kind}")
    try:
        return costs_of(SimpleNamespace(_class_name=name or kind or "FluxTransformer2DModel"))
    except ValueError as error:
        raise OSError(f"checkpoint {folder}: {error}") from None


def absent_components(folder):
    """The components that the pipeline was saved without."""
    index = read_json(Path(folder) / "model_index.json")
    return [name for name, saved in index.items() if isinstance(saved, list) and saved[:1] == [None]]


def check_fit(component, cell, tensors):
    """Raises ValueError if a loaded component and the tensors of its files, {name: shape}, are not the same set."""
    wanted = {torch_name(name) for name, _ in cell.parameters_and_names()}
    # transformers' models say so how names in older checkpoints have changed.
    renamed = getattr(cell, "_checkpoint_conversion_mapping", None) or {}
    there = {torch_name(_renamed(name, renamed)) for name in tensors}
    for problem, names in {"lack": wanted - there, "have, but its config does not,": there - wanted}.items():
        names = sorted(name for name in names if not name.endswith(_HARMLESS))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"checkpoint component {component}: its weights {problem} {names[0]}{more}")


def _renamed(name, patterns):
    """A tensor's name by the first pattern that it matches, {pattern: replacement}."""
    for pattern, replacement in patterns.items():
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def torch_name(name):
    """A Parameter's name as torch has it; MindSpore's layers, and text encoders that mindone saved, have their own."""
    head, _, tail = name.rpartition(".")
    return f"{head}.{_TORCH_NAMES.get(tail, tail)}"


def image_unit(folder):
    """What an image's height and width have to be multiples of: the autoencoder's factor times the patch's 2.

    Raises OSError if the autoencoder's config does not say.
    """
    path = Path(folder) / "vae" / "config.json"
    config = read_json(path)
    # Each halves the picture but for a list's last; the patch halves it once more. Qwen-Image's has the latter list.
    for name, more in {"block_out_channels": 0, "temperal_downsample": 1}.items():
        if isinstance(config.get(name), list) and config[name]:
            return 2 ** (len(config[name]) + more)
    raise OSError(f"checkpoint file {path} is damaged: it has no block_out_channels")


def block_counts(folder):
    """How many double and single blocks the transformer has."""
    config = transformer_config(folder)
    return costs_of(config).stacks(config)


def family_of(folder):
    """What is known of a checkpoint's family without MindSpore: models/flux_costs.py or one like it.

    Raises OSError for a folder that has none of a family that the cache knows.
    """
    return costs_of(transformer_config(folder))


def transformer_config(folder):
    """The transformer's config, the published one's where the file does not say; no guidance embedding unless it does.

    Raises OSError for one of a family that the cache does not know.
    """
    path = Path(folder) / "transformer" / "config.json"
    config = read_json(path)
    try:
        published = costs_of(SimpleNamespace(_class_name=config.get("_class_name", FLUX_DEV._class_name))).PUBLISHED
    except ValueError as error:
        raise OSError(f"checkpoint file {path}: {error}") from None
    return SimpleNamespace(**{**vars(published), "guidance_embeds": False, **config})


def image_size(folder):
    """The height and width in pixels that the autoencoder's config names, which a picture has by default."""
    size = read_json(Path(folder) / "vae" / "config.json").get("sample_size", 1024)
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
    config = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
    read_json(folder / component / (config if component not in _READ[1:] else "tokenizer_config.json"))
    if component in _READ[1:]:
        there = [names for names in _VOCABULARIES if (folder / component / names[0]).is_file()]
        if not there:
            names = ", ".join(names[0] for names in _VOCABULARIES)
            raise OSError(f"checkpoint {folder / component} has none of {names}")
        for name in there[0]:
            path = folder / component / name
            if name.endswith(".json"):
                read_json(path)
            elif not path.is_file():
                raise OSError(f"checkpoint file {path} is missing")


def _component_tensors(folder, variant):
    return {name: shape for file in weights_files(folder, variant) for name, shape in tensor_shapes(file).items()}


def weights_files(folder, variant=None):
    """A component's weights files, those of a variant where it has such.

    Raises OSError if there is none, or one that an index names is missing, or the weights are there twice.
    """
    weights, indices = _visible(folder, "*.safetensors"), _visible(folder, "*.safetensors.index*.json")
    there = {_variant(file) for file in weights + indices}
    variant = variant if variant in there else None
    files = [file for file in weights if _variant(file) == variant]
    for index in (index for index in indices if _variant(index) == variant):
        wanted = read_json(index).get("weight_map")
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
    return files


def _visible(folder, pattern):
    """The files below a folder that no system or tool hid there, such as ._ files of macOS."""
    files = ((file, file.relative_to(folder).parts) for file in folder.glob(pattern))
    return sorted(file for file, parts in files if not any(part.startswith(".") for part in parts))


def _variant(file):
    """The variant that a weights file's or an index's name tells, None for none: model.fp16-00001-of-00002.safetensors
    has fp16."""
    return ".".join(part for part in _SHARD.sub("", file.name).split(".")[1:] if part not in _SUFFIXES) or None


def tensor_shapes(file):
    """Names and shapes in a safetensors file: a length in 8 bytes, a JSON header of that length, the data.

    Raises OSError for a file that is damaged.
    """
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


def read_json(path):
    """A JSON object from a checkpoint's file. Raises OSError, naming it, where that cannot be."""
    if not path.is_file():
        raise OSError(f"checkpoint file {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"checkpoint file {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise OSError(f"checkpoint file {path} is damaged: it holds no JSON object")
    return content
