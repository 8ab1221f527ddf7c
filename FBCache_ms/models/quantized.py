"""Linear layers with int8 weights, in the place of mindone's; runtime/quantize.py makes them."""

import numpy as np

import mindspore as ms
from mindspore import mint, nn
from mindspore.ops.auto_generate import DynamicQuantExt, QuantBatchMatmul, WeightQuantBatchMatmul

from . import kernels

LEVELS = 127
"""The greatest magnitude of a quantised number, the same on both sides of 0."""


ROWS = 64
"""Of a weight that are rounded at once."""


class Int8WeightOnlyLinear(mint.nn.Linear):
    """x W^T + b, where W (O, I) is an int8 q with a scale s for each output channel: W = s q.

    One of mint's layers, so that an adapter may be put around it. Its Parameters are ``weight``, q; ``weight_scale``, s
    (O,); and ``bias`` (O,), or None. Products are as CANN's WeightQuantBatchMatmul has them, and the bias is added
    behind it: CANN wants a float32 one there for bfloat16, MindSpore one of the scale's dtype.

    Args:
        in_features: I.
        out_features: O.
        dtype: of the layer that it stands for.
        bias: that layer's own, a Parameter, or None.
    """

    def __init__(self, in_features, out_features, dtype, bias=None):
        nn.Cell.__init__(self, auto_prefix=False)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias is not None
        self.weight = int8_parameter(np.zeros((out_features, in_features), np.int8))
        self.weight_scale = ms.Parameter(ms.Tensor(np.ones(out_features), dtype))
        self.bias = bias

    def take(self, weight):
        """Takes over a weight (O, I), an array of floats, rounded to int8."""
        quantised, scales = np.empty(weight.shape, np.int8), []
        # A few rows at a time: in float32 the whole would take four times what is saved.
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS].astype(np.float32)
            scales.append(ms.Tensor(scales_of(rows), self.weight_scale.dtype).float().asnumpy())
            # By the scale as it is kept, so that what bfloat16 rounds off of it is made up for.
            levels = np.rint(rows / scales[-1][:, None])
            quantised[start : start + ROWS] = np.clip(levels, -LEVELS, LEVELS)
        self.weight_scale.set_data(ms.Tensor(np.concatenate(scales), self.weight_scale.dtype))
        # Without another copy of it.
        self.weight.set_data(ms.Tensor.from_numpy(quantised))

    def dense_weight(self):
        """s q, an array of float32."""
        return self.weight.asnumpy() * self.weight_scale.float().asnumpy()[:, None]

    def construct(self, input):
        """x W^T + b for x (..., I)."""
        output = self.product(input.reshape((-1, input.shape[-1])))
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(input.shape[:-1] + output.shape[-1:])

    def product(self, rows):
        """x W^T for x (N, I)."""
        by_kernel = kernels.int8_weight_product(rows, self.weight, self.weight_scale)
        if by_kernel is not None:
            return by_kernel
        return WeightQuantBatchMatmul(False, True)(rows, self.weight, self.weight_scale)


class Int8Linear(Int8WeightOnlyLinear):
    """The same with x rounded to int8, too, by a scale for each token: t = max|x| / 127, as CANN's DynamicQuant does.

    The product is one of integers, exact until it is scaled.
    """

    def product(self, rows):
        """x W^T for x (N, I)."""
        by_kernel = kernels.int8_product(rows, self.weight, self.weight_scale)
        if by_kernel is not None:
            return by_kernel
        quantised, token_scale = DynamicQuantExt()(rows, None)
        product = QuantBatchMatmul(False, True, rows.dtype)
        return product(quantised, self.weight, self.weight_scale.float(), None, None, token_scale)


def scales_of(weight):
    """max|w| / 127 of each row, 1 where a row is all zeros."""
    scale = np.abs(weight).max(1) / LEVELS
    return np.where(scale == 0, 1, scale)


def int8_parameter(values):
    """A Parameter that stays int8 where a model is cast to another dtype."""
    weight = ms.Parameter(ms.Tensor(values), requires_grad=False)
    # mindone's to() casts every Parameter of a model.
    weight.set_dtype = lambda dtype: weight
    return weight
