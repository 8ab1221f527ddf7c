"""bfloat16 on a CPU, whose backend has no operators for it: the matrices of a transformer's blocks alone are of it.

What comes into such a layer is rounded to bfloat16, products are summed in float32, and all between the layers stays
float32. So a picture shows what bfloat16 does to the largest part of a model, in half the memory of its weights.
"""

import mindspore as ms

from .quantize import QuantizeConfig, linear_layers, model_layer, quantized_layers, refuse_bfloat16


def on_this_device(dtypes):
    """The dtypes in which a pipeline is loaded here, and whether its blocks' matrices are bfloat16 behind that.

    Args:
        dtypes: a dtype, {component: dtype}, or None, as from_pretrained takes it.
    """
    if ms.get_context("device_target") != "CPU":
        return dtypes, False
    if isinstance(dtypes, dict):
        loaded = {name: float32_for(dtype) for name, dtype in dtypes.items()}
        return loaded, dtypes.get("transformer", dtypes.get("default")) == ms.bfloat16
    return float32_for(dtypes), dtypes == ms.bfloat16


def float32_for(dtype):
    """float32 in the place of bfloat16."""
    return ms.float32 if dtype == ms.bfloat16 else dtype


def round_matrices(transformer):
    """Makes the matrices of a transformer's blocks bfloat16, in place. Raises ValueError for one with int8 weights."""
    if quantized_layers(transformer):
        refuse_bfloat16()
    for name in linear_layers(transformer, QuantizeConfig()):
        model_layer(transformer, name).weight.set_dtype(ms.bfloat16)
