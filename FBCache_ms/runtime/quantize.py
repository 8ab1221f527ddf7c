"""Rounds a model's linear layers to int8: while a checkpoint is loaded, or behind that.

    config = QuantizeConfig("int8_weight_only")
    pipe = FluxPipeline.from_pretrained(path, device=choose_device(), quantize_config=config)

The layers are models/quantized.py's; everything else of mindone's model stays. The names are cache-dit's.
"""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Optional, Tuple

import numpy as np

from .checkpoint import check_fit, read_json, tensor_shapes, torch_name, weights_files

QUANT_TYPES = ("int8_weight_only", "int8")
LAYERS = ("blocks", "all")
BLOCKS = "transformer_blocks.", "single_transformer_blocks."


@dataclass(frozen=True)
class QuantizeConfig:
    """Which layers are rounded to int8, and how.

    Args:
        quant_type: "int8_weight_only": weights, by a scale for each output channel. "int8": what goes into a layer,
            too, by a scale for each token.
        exclude_layers: layers that stay as they are; each a part of their names, with * for anything.
        components_to_quantize: of a pipeline, by name: "transformer", "text_encoder_2" and so on.
        layers: of a transformer, "blocks" for those of its blocks or "all". A text encoder's are always all.
        weight_only_layers: with "int8", layers whose inputs stay as they are. None: those that make the modulation,
            since the cache compares what they scale (docs/quantize.md).

    Raises ValueError or TypeError, naming the field, for what is not allowed.
    """

    quant_type: str = "int8_weight_only"
    exclude_layers: Tuple[str, ...] = ()
    components_to_quantize: Tuple[str, ...] = ("transformer",)
    layers: str = "blocks"
    weight_only_layers: Optional[Tuple[str, ...]] = None

    def __post_init__(self):
        for name, allowed in {"quant_type": QUANT_TYPES, "layers": LAYERS}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("exclude_layers", "components_to_quantize", "weight_only_layers"):
            value = getattr(self, name)
            if value is None and name == "weight_only_layers":
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) and each for each in value):
                raise TypeError(f"{name} must be a list of texts, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.weight_only_layers is not None and self.quant_type != "int8":
            raise ValueError(f"weight_only_layers has no effect with quant_type {self.quant_type!r}; it needs 'int8'")
        if not self.components_to_quantize:
            raise ValueError("components_to_quantize names no component")

    def to_dict(self):
        """As a model's config.json keeps it."""
        return {"quant_method": "fbcache_ms", **asdict(self)}

    @classmethod
    def from_dict(cls, saved):
        """From a model's config.json. Raises ValueError for what another program has written there."""
        saved = dict(saved)
        method = saved.pop("quant_method", None)
        if method != "fbcache_ms":
            raise ValueError(f"quantization_config is of quant_method {method!r}; only 'fbcache_ms' can be loaded")
        try:
            return cls(**saved)
        except TypeError as error:
            raise ValueError(f"quantization_config: {error}") from None


def check_quantize(config, dtype=None):
    """Raises TypeError for what is neither a QuantizeConfig nor None.

    Raises ValueError for one with a ``dtype`` that does not go with int8: float32 on Ascend, whose operators take
    shorter ones alone, and bfloat16 on a CPU, where that is a rounding of its own.
    """
    if not isinstance(config, (QuantizeConfig, type(None))):
        raise TypeError(f"quantize_config must be a QuantizeConfig or None, not {type(config).__name__}")
    if config is None:
        return
    import mindspore as ms

    names = config.components_to_quantize
    dtypes = [dtype.get(name, dtype.get("default")) for name in names] if isinstance(dtype, dict) else [dtype]
    # mindone loads as float32 where nothing is said.
    dtypes = [each or ms.float32 for each in dtypes]
    if ms.float32 in dtypes:
        refuse_float32()
    if ms.bfloat16 in dtypes:
        refuse_bfloat16()


def kinds_in(model):
    """The dtypes of a model's Parameters, by name."""
    return {str(parameter.dtype) for parameter in model.get_parameters()}


def refuse_float32():
    """Raises ValueError on Ascend, whose operators take shorter dtypes alone."""
    import mindspore as ms

    if ms.get_context("device_target") != "CPU":
        raise ValueError("int8 weights need a mindspore_dtype of bfloat16 or float16 on Ascend, not float32")


def refuse_bfloat16():
    """Raises ValueError on a CPU, in the place of rounding what is or would be bfloat16."""
    import mindspore as ms

    if ms.get_context("device_target") == "CPU":
        raise ValueError("int8 weights need float32 ones on CPU, not bfloat16")


def quantize(module, config=QuantizeConfig()):
    """Rounds a pipeline's components, or a model, to int8, in place; returns it.

    A LoRA adapter that is there stays as it is around its layer, and one may be loaded later.

    Raises:
        TypeError: config is no QuantizeConfig.
        ValueError: a component is missing, quantised already, in bfloat16 on a CPU or in float32 on Ascend, or a
            pattern matches no layer.
    """
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"config must be a QuantizeConfig, not {type(config).__name__}")
    models = parts_of(module, config.components_to_quantize)
    for name, model in models.items():
        if quantized_layers(model):
            raise ValueError(f"{name} is quantised already; dequantize() gives it dense weights again")
    layers = {name: linear_layers(model, config) for name, model in models.items()}
    check_patterns(config, layers)
    for model in models.values():
        if kinds_in(model) == {"Float32"}:
            refuse_float32()
        # A model that is bfloat16 throughout is compiled for Ascend.
        if kinds_in(model) >= {"Float32", "BFloat16"}:
            refuse_bfloat16()
    for model in models.values():
        round_layers(model, config)
    return module


def round_layers(model, config):
    """Rounds a model's layers, those that a QuantizeConfig means."""
    for layer, kind in kinds_of(model, config).items():
        dense = model_layer(model, layer)
        quantised = kind(*dense.weight.shape[::-1], dense.weight.dtype, dense.bias)
        quantised.take(dense.weight.float().asnumpy())
        put_layer(model, layer, quantised)
    remember(model, config)


def dequantize(module):
    """Gives a pipeline's components, or a model, dense weights again, the rounded ones, in place; returns it."""
    from mindspore import Parameter, Tensor, mint
    from mindspore.nn.utils import no_init_parameters

    for model in parts_of(module, None).values():
        for name, layer in quantized_layers(model).items():
            with no_init_parameters():
                dense = mint.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = Tensor(layer.dense_weight(), layer.weight_scale.dtype)
            dense.weight = Parameter(weight, requires_grad=layer.weight_scale.requires_grad)
            if layer.bias is not None:
                dense.bias = layer.bias
            put_layer(model, name, dense)
        remember(model, None)
    return module


def parts_of(module, names):
    """The models {name: cell} that are meant: a model itself, or of a pipeline those of these names, all for None."""
    from mindspore import nn

    if isinstance(module, nn.Cell):
        return {type(module).__name__: module}
    cells = {name: part for name, part in module.components.items() if isinstance(part, nn.Cell)}
    for name in names or ():
        if name not in cells:
            raise ValueError(f"components_to_quantize: {type(module).__name__} has no {name}, but {', '.join(cells)}")
    return {name: getattr(module, name) for name in (cells if names is None else names)}


def quantized_layers(model):
    """The int8 layers, {name: cell}."""
    from ..models.quantized import Int8WeightOnlyLinear

    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, Int8WeightOnlyLinear)}


def quantized_as(pipe):
    """How a pipeline's components are quantised, {name: quant_type} of those that are."""
    models = parts_of(pipe, None).items()
    return {name: saved_in(model.config)["quant_type"] for name, model in models if quantized_layers(model)}


def saved_in(config):
    """What remember() wrote into a model's config."""
    return config["quantization_config"] if isinstance(config, dict) else config.quantization_config


def linear_layers(model, config):
    """The names of the linear layers that a QuantizeConfig is about; adapters' own are left out."""
    from ..models import family

    within = BLOCKS if family(model) and config.layers == "blocks" else ""
    return [
        layer
        for layer, cell in model.cells_and_names()
        if is_linear(cell) and layer.startswith(within) and ".lora_" not in layer
    ]


def is_linear(cell):
    """Whether a cell computes x W^T + b and nothing else; mindone's text encoders have nn.Dense."""
    from mindspore import mint, nn

    from ..models.mindones import is_mindones

    return is_mindones(cell, mint.nn.Linear) or is_mindones(cell, nn.Dense) and cell.activation is None


def kinds_of(model, config):
    """The layers of a model that a QuantizeConfig means, {name: class of models/quantized.py}."""
    from ..models import family
    from ..models.quantized import Int8Linear, Int8WeightOnlyLinear

    weight_only = config.weight_only_layers
    if weight_only is None:
        weight_only = getattr(family(model), "MODULATION", ())
    dynamic = config.quant_type == "int8"
    return {
        layer: Int8Linear if dynamic and not matches(layer, weight_only) else Int8WeightOnlyLinear
        for layer in linear_layers(model, config)
        if not matches(layer, config.exclude_layers)
    }


def matches(layer, patterns):
    """Whether any of the patterns is a part of a layer's name."""
    return any(fnmatchcase(layer, f"*{pattern}*") for pattern in patterns)


def check_patterns(config, layers):
    """Raises ValueError for a component without linear layers, or a pattern that matches none.

    Args:
        config: the QuantizeConfig.
        layers: the names of the linear layers of each component.
    """
    for component, names in layers.items():
        if not names:
            raise ValueError(f"components_to_quantize: {component} has no linear layer that can be quantised")
    every = [name for names in layers.values() for name in names]
    for field in ("exclude_layers", "weight_only_layers"):
        for pattern in getattr(config, field) or ():
            if not any(matches(name, [pattern]) for name in every):
                raise ValueError(f"{field}: {pattern!r} matches no layer of {', '.join(layers)}; one is {every[0]}")


def model_layer(model, name):
    """A model's layer by its name."""
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def put_layer(model, name, layer):
    """Puts a layer in the place of the one of this name."""
    parent, _, last = name.rpartition(".")
    parent = model_layer(model, parent) if parent else model
    if last.isdigit():
        parent[int(last)] = layer
    else:
        setattr(parent, last, layer)
    # A cell names the Parameters of what it is given by its own name for that alone.
    for own, parameter in layer.parameters_and_names():
        parameter.name = f"{name}.{own}"


def remember(model, config):
    """Writes into a model's config how it is quantised, which save_pretrained then saves; None takes that out."""
    saved = None if config is None else config.to_dict()
    if hasattr(model, "register_to_config"):
        if config is None:
            vars(model).pop("fuse_lora", None)
        else:
            # mindone would add an adapter's weights to int8 ones, and cut their fractions off.
            model.fuse_lora = refuse_fusing
        kept = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = type(model.config)(kept if saved is None else {**kept, "quantization_config": saved})
    elif saved is not None:
        model.config.quantization_config = saved
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def refuse_fusing(*args, **kwargs):
    """Raises ValueError in the place of fuse_lora."""
    raise ValueError("an adapter cannot be fused into int8 weights; fuse it before quantising, or leave it unfused")


def saved_config(folder):
    """The QuantizeConfig that a component was saved with, None for dense weights.

    Raises OSError for a config that cannot be read, ValueError for one that another program has written.
    """
    saved = read_json(Path(folder) / "config.json").get("quantization_config")
    return None if saved is None else QuantizeConfig.from_dict(saved)


def load_parts(folder, tensors, config=None, dtypes=None, variant=None):
    """The components of a checkpoint that are read as int8 at once, {name: model}: saved so, or the transformer.

    Args:
        folder: the pipeline's.
        tensors: {component: {tensor name: shape}} of those that are to be loaded.
        config: a QuantizeConfig, or None.
        dtypes: a dtype, or {component: dtype}, as from_pretrained takes it.
        variant: of the weights files.

    Raises ValueError as quantize does, before anything is read.
    """
    wanted = () if config is None else config.components_to_quantize
    check_parts(folder, tensors, config)
    parts = {}
    index = read_json(Path(folder) / "model_index.json")
    for name in tensors:
        if name in wanted and name == "transformer" or saved_config(Path(folder) / name) is not None:
            library, kind = index[name]
            kind = getattr(import_module(f"mindone.{library}"), kind)
            dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
            parts[name] = load_quantized(kind, Path(folder) / name, config if name in wanted else None, dtype, variant)
    return parts


def check_parts(folder, tensors, config):
    """Raises ValueError for a QuantizeConfig that a checkpoint does not allow; arguments as in load_parts."""
    if config is None:
        return
    for name in config.components_to_quantize:
        if name not in tensors:
            raise ValueError(f"components_to_quantize: there is no {name} to load, but {', '.join(tensors)}")
        saved = saved_config(Path(folder) / name)
        if saved is not None:
            raise ValueError(f"{name} of {folder} is quantised already, as {saved.quant_type}")
    wanted = config.components_to_quantize
    check_patterns(config, {name: matrices(tensors[name], blocks_of(name, config)) for name in wanted})


def blocks_of(component, config):
    """What the names of the layers begin with that a QuantizeConfig is about."""
    return BLOCKS if component == "transformer" and config.layers == "blocks" else ""


def matrices(tensors, within=""):
    """The names of the layers whose weights are matrices, from those of their tensors."""
    weights = [name for name, shape in tensors.items() if name.endswith(".weight") and len(shape) == 2]
    return [name.removesuffix(".weight") for name in weights if name.startswith(within)]


def load_quantized(kind, folder, config=None, dtype=None, variant=None):
    """A model whose weights are rounded to int8 one by one as they are read, so that there are never two of them.

    Args:
        kind: mindone's class of the model.
        folder: the component's.
        config: a QuantizeConfig; None for a component that was saved quantised.
        dtype: of what is not int8, float32 for None.
        variant: of the weights files.

    Raises ValueError for weights that do not fit, or are quantised only in part.
    """
    from safetensors import safe_open

    from mindspore import Tensor, bfloat16, float16, float32, int8
    from mindspore.nn.utils import no_init_parameters

    folder, name = Path(folder), Path(folder).name
    saved, files = saved_config(folder), weights_files(folder, variant)
    with no_init_parameters():
        model = empty_model(kind, folder)
        tensors = {each: shape for file in files for each, shape in tensor_shapes(file).items()}
        if saved is None:
            check_fit(name, model, tensors)
        for layer, cell in kinds_of(model, config or saved).items():
            dense = model_layer(model, layer)
            put_layer(model, layer, cell(*dense.weight.shape[::-1], dtype or float32, dense.bias))
        if saved is not None:
            check_fit(name, model, tensors)
    for parameter in model.get_parameters():
        # MindSpore 2.10.0's own to() reads what is not there yet.
        if parameter.dtype in (float32, float16, bfloat16):
            parameter.set_dtype(dtype or float32)
    parameters = {torch_name(each): parameter for each, parameter in model.parameters_and_names()}
    fresh = {} if config is None else {f"{each}.weight": cell for each, cell in quantized_layers(model).items()}
    for file in files:
        for each in tensor_shapes(file):
            # What has been read of a file counts as this process's memory until it is closed.
            with safe_open(file, "np") as weights:
                value, parameter = weights.get_tensor(each), parameters.get(torch_name(each))
            if each in fresh:
                fresh[each].take(value)
            elif parameter is not None:
                if (value.dtype == np.int8) != (parameter.dtype == int8):
                    raise ValueError(f"{name} of {folder.parent} is quantised in part: {each} is {value.dtype}")
                parameter.set_data(Tensor(value, parameter.dtype))
    model.set_train(False)
    remember(model, config or saved)
    return model


def empty_model(kind, folder):
    """A model as its config says, of mindone's diffusers or transformers, without what makes it quantised."""
    if hasattr(kind, "load_config"):
        settings = {name: value for name, value in kind.load_config(folder).items() if name != "quantization_config"}
        return kind.from_config(settings)
    settings = kind.config_class.from_pretrained(folder)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    return kind(settings)
