"""Stand-ins for what MindSpore's CPU backend has no kernel for, so that mindone's pipelines run on it.

install() puts them in the places of mint's functions and of mindone's cells, and fills rules/kernels.py and
models/kernels.py. Here are those that any family may need; each family's own are in a file beside this one. Nothing
else in the package replaces anything of mindone's or MindSpore's. A cell is replaced where it calls a Tensor method,
such as x.chunk, that graph mode resolves out of Python's reach.

What takes the time was chosen by timing the 28-step loop with each candidate (benchmarks/cpu_stand_ins.py), not by
name. The fused stand-ins, of one kernel each, take the places of others where there is a C++ compiler.
"""

import math

from mindone.diffusers.models import (
    activations,
    attention,
    attention_dispatch,
    attention_processor,
    embeddings,
    normalization,
)

import mindspore as ms
from mindspore import mint, ops

from ...models import kernels as model_kernels
from ...models.mindones import is_mindones
from ...models.quantized import Int8Linear, Int8WeightOnlyLinear
from ...rules import kernels as rule_kernels
from . import kernels

try:
    from mindspore.graph._parse import parser
except ImportError:  # MindSpore 2.7.0 has it elsewhere, and makes a new tensor of x += y by itself
    parser = None


def chunk(input, chunks, dim=0):
    """mint.chunk: equal pieces, the last one smaller where they do not come out even."""
    return split(input, -(-input.shape[dim] // chunks), dim)


def split(tensor, split_size_or_sections, dim=0):
    """mint.split: pieces of one size, or of the sizes listed."""
    total, sizes = tensor.shape[dim], split_size_or_sections
    if isinstance(sizes, int):
        if total % sizes == 0:
            return ops.Split(dim, total // sizes)(tensor)
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    pieces, start = (), 0
    for size in sizes:
        pieces = pieces + (piece(tensor, dim, start, size),)
        start += size
    return pieces


def piece(tensor, dim, start, size):
    """``size`` entries of a tensor's axis from ``start`` on."""
    axis = dim % tensor.ndim
    begin = (0,) * axis + (start,) + (0,) * (tensor.ndim - axis - 1)
    return ops.Slice()(tensor, begin, tensor.shape[:axis] + (size,) + tensor.shape[axis + 1 :])


def stack(tensors, dim=0):
    """mint.stack."""
    return ops.stack(tensors, dim)


def unbind(input, dim=0):
    """mint.unbind."""
    return ops.unstack(input, dim)


def outer(input, vec2):
    """mint.outer of two vectors."""
    return input.expand_dims(1) * vec2.expand_dims(0)


def arange(start=0, end=None, step=1, *, dtype=None):
    """mint.arange."""
    if end is None:
        start, end = 0, start
    values = ops.Range()(start, end, step)
    return values if dtype is None else values.astype(dtype)


def full(size, fill_value, *, dtype=None):
    """mint.full."""
    if dtype is None:
        dtype = ms.float32 if isinstance(fill_value, float) else ms.int64
    return ops.fill(dtype, tuple(size), fill_value)


def zeros_like(input, *, dtype=None):
    """mint.zeros_like."""
    return ops.zeros_like(input, dtype=dtype)


def ones_like(input, *, dtype=None):
    """mint.ones_like."""
    return ops.ones_like(input, dtype=dtype)


def randn_like(input, *, seed=None, dtype=None):
    """mint.randn_like."""
    return ops.standard_normal(input.shape, seed).astype(dtype or input.dtype)


def gelu(input, *, approximate="none"):
    """mint.nn.functional.gelu; the tanh form through sigmoid(2 x) = (1 + tanh(x)) / 2, which is one operator less."""
    if approximate == "tanh":
        return input * ops.sigmoid(2 * math.sqrt(2 / math.pi) * (input + 0.044715 * input * input * input))
    return 0.5 * input * (1 + ops.erf(input / math.sqrt(2)))


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """mint.nn.functional.layer_norm over the last axes."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keep_dims=True)
    normed = centred * ops.rsqrt((centred * centred).mean(axes, keep_dims=True) + eps)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, backend=None
):
    """Attention of (B, heads, L, d) in the inputs' dtype; a mask is added, or, where it is bool, keeps what is true."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = ops.BatchMatMul(transpose_b=True)(query, key) * scale
    if is_causal:
        keep = ops.tril(ops.ones((query.shape[-2], key.shape[-2]), ms.float32)) > 0
        scores = ops.masked_fill(scores, ops.logical_not(keep), float("-inf"))
    if attn_mask is not None:
        scores = masked(scores, attn_mask)
    return ops.BatchMatMul()(ops.softmax(scores, -1), value)


def masked(scores, mask):
    """Attention's scores with a mask added, or, where it is bool, kept where it is true."""
    if mask.dtype == ms.bool_:
        return ops.masked_fill(scores, ops.logical_not(mask), float("-inf"))
    return scores + mask


def linear_cell(self, input):
    """mint.nn.Linear.construct; with a weight of bfloat16 the input is rounded to that, and products summed in float32.

    A product of two bfloat16 is exact in float32.
    """
    rows, weight = input.reshape(-1, input.shape[-1]), self.weight
    if weight.dtype == ms.bfloat16:
        rows, weight = ops.cast(ops.cast(rows, weight.dtype), input.dtype), ops.cast(weight, input.dtype)
    output = ops.MatMul(transpose_b=True)(rows, weight)
    if self.bias is not None:
        output = ops.BiasAdd()(output, self.bias)
    return output.reshape(input.shape[:-1] + output.shape[-1:])


def layer_norm_cell(self, input):
    """mint.nn.LayerNorm.construct."""
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def rms_norm_cell(self, hidden_states):
    """mindone's RMSNorm.construct."""
    variance = (hidden_states * hidden_states).mean(-1, keep_dims=True)
    hidden_states = hidden_states * ops.rsqrt(variance + self.eps)
    if self.weight is not None:
        hidden_states = hidden_states * self.weight
        if self.bias is not None:
            hidden_states = hidden_states + self.bias
    return hidden_states


def embedding_cell(self, input):
    """mint.nn.Embedding.construct."""
    return ops.gather(self.weight, input, 0)


def conv2d_cell(self, input):
    """mint.nn.Conv2d.construct, for zero padding."""
    vertical, horizontal = self.padding
    convolution = ops.Conv2D(
        self.out_channels,
        self.kernel_size,
        pad_mode="pad",
        pad=(vertical, vertical, horizontal, horizontal),
        stride=self.stride,
        dilation=self.dilation,
        group=self.groups,
    )
    output = convolution(input, self.weight)
    if self.bias is not None:
        output = ops.bias_add(output, self.bias)
    return output


def ada_layer_norm_zero_cell(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    """mindone's AdaLayerNormZero.construct: modulated for attention, then gate, shift, scale and gate for the rest."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = chunk(self.linear(self.silu(emb)), 6, 1)
    return self.norm(x) * (1 + scale.expand_dims(1)) + shift.expand_dims(1), gate, mlp_shift, mlp_scale, mlp_gate


def ada_layer_norm_zero_single_cell(self, x, emb=None):
    """mindone's AdaLayerNormZeroSingle.construct."""
    shift, scale, gate = chunk(self.linear(self.silu(emb)), 3, 1)
    return self.norm(x) * (1 + scale.expand_dims(1)) + shift.expand_dims(1), gate


def attention_cell_scaled_dot_product(
    self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None
):
    """The autoencoder's Attention.scaled_dot_product_attention."""
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def repeat(self, *repeats):
    """Tensor.repeat: so many copies along each axis, after new axes in front."""
    repeats = tuple(repeats[0]) if len(repeats) == 1 and isinstance(repeats[0], (list, tuple)) else repeats
    return ops.tile(self, repeats)


def fused_linear_cell(self, input):
    """mint.nn.Linear.construct."""
    if kernels.LINEAR is None or self.bias is None or input.dtype != ms.float32:
        return linear_cell(self, input)
    linear = kernels.LINEAR_BFLOAT16 if self.weight.dtype == ms.bfloat16 else kernels.LINEAR
    return linear(input, self.weight, self.bias)


def fused_gelu(input, *, approximate="none"):
    """mint.nn.functional.gelu."""
    if approximate != "tanh" or input.dtype != ms.float32:
        return gelu(input, approximate=approximate)
    return kernels.GELU_TANH(input)


def fused_layer_norm_cell(self, input):
    """mint.nn.LayerNorm.construct."""
    if len(self.normalized_shape) > 1 or input.dtype != ms.float32:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
    normed = kernels.LAYER_NORM(input, number(self.eps))
    if self.weight is not None:
        normed = normed * self.weight
    if self.bias is not None:
        normed = normed + self.bias
    return normed


def fused_group_norm_cell(self, input):
    """mint.nn.GroupNorm.construct; MindSpore's own kernel takes the autoencoder's decoder half of its time."""
    if input.dtype != ms.float32:
        return ops.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
    return kernels.GROUP_NORM(input, self.weight, self.bias, number(self.num_groups), number(self.eps))


class Weights:
    """The weights that a cell's kernel reads, in its order; None where the cell is more than the kernel stands for.

    An attribute, made when the parser asks for it, since parsing as many attributes takes it a while for each block.
    ``layers`` gives a cell's layers in that order, or None. Where there are kernels for ``rounded`` matrices, those of
    all layers may be bfloat16 or int8. With int8, whether each layer rounds its input, 1 or 0, comes first, and behind
    each matrix its scale.
    """

    def __init__(self, layers, rounded=False):
        self.layers, self.rounded = layers, rounded

    def __get__(self, cell, owner):
        layers = None if cell is None or kernels.LINEAR is None else self.layers(cell)
        if layers is None:
            return None
        weights, matrices, rounds = (), set(), ()
        for layer in layers:
            # An adapter is a layer of another type.
            if is_mindones(layer, mint.nn.Linear):
                weights += (layer.weight, layer.bias)
                matrices.add(layer.weight.dtype)
            elif self.rounded and any(is_mindones(layer, kind) for kind in (Int8WeightOnlyLinear, Int8Linear)):
                weights += (layer.weight, layer.weight_scale, layer.bias)
                rounds += (isinstance(layer, Int8Linear),)
                matrices.add(layer.weight.dtype)
            elif is_mindones(layer, normalization.RMSNorm) and layer.bias is None:
                weights += (layer.weight,)
            else:
                return None
        if len(matrices) > 1 or not matrices <= ({ms.float32, ms.bfloat16, ms.int8} if self.rounded else {ms.float32}):
            return None
        if any(weight is None or weight.dtype not in {ms.float32, *matrices} for weight in weights):
            return None
        return (ms.Tensor(rounds, ms.float32), *weights) if rounds else weights


def layer_norm_layers(cell):
    """What a LayerNorm within a kernel reads: nothing."""
    plain = is_mindones(cell, mint.nn.LayerNorm) and cell.weight is None and cell.bias is None
    return () if plain and len(cell.normalized_shape) == 1 else None


def modulation_layers(cell, kind):
    """What a block's AdaLayerNorm reads within a kernel."""
    plain = is_mindones(cell, kind) and getattr(cell, "emb", None) is None and is_mindones(cell.silu, mint.nn.SiLU)
    return (cell.linear,) if plain and layer_norm_layers(cell.norm) is not None else None


def feed_forward_layers(cell):
    """What FeedForward's kernel reads."""
    if not is_mindones(cell, attention.FeedForward) or len(cell.net) != 3:
        return None
    first, dropout, last = cell.net
    plain = is_mindones(first, activations.GELU) and first.approximate == "tanh" and drops_nothing(dropout)
    return (first.proj, last) if plain else None


def drops_nothing(cell):
    """Whether a Dropout hands on what it is given."""
    return is_mindones(cell, mint.nn.Dropout) and not (cell.training and cell.p > 0)


def timestep_embedding_layers(cell):
    """What TimestepEmbedding's kernel reads."""
    plain = cell.cond_proj is None and is_mindones(cell.act, mint.nn.SiLU) and cell.post_act is None
    return (cell.linear_1, cell.linear_2) if plain else None


def ada_layer_norm_continuous_layers(cell):
    """What AdaLayerNormContinuous's kernel reads."""
    return modulation_layers(cell, normalization.AdaLayerNormContinuous)


def fused_timesteps_cell(self, timesteps):
    """mindone's Timesteps.construct."""
    if not self.flip_sin_to_cos or self.num_channels % 2 == 1:
        settings = self.flip_sin_to_cos, self.downscale_freq_shift, self.scale
        return embeddings.get_timestep_embedding(timesteps, self.num_channels, *settings)
    half = self.num_channels // 2
    exponents = -math.log(10000) * arange(0, half).astype(ms.float32) / (half - self.downscale_freq_shift)
    return kernels.SINUSOIDS(timesteps.astype(ms.float32), self.scale * ops.exp(exponents))


def fused_timestep_embedding_cell(self, sample, condition=None):
    """mindone's TimestepEmbedding.construct."""
    if self.kernel_weights is not None and condition is None and sample.ndim == 2 and sample.dtype == ms.float32:
        return kernels.TIMESTEP_EMBEDDING(sample, *self.kernel_weights)
    if condition is not None:
        sample = sample + self.cond_proj(condition)
    sample = self.linear_1(sample)
    if self.act is not None:
        sample = self.act(sample)
    sample = self.linear_2(sample)
    return sample if self.post_act is None else self.post_act(sample)


def fused_ada_layer_norm_continuous_cell(self, x, conditioning_embedding):
    """mindone's AdaLayerNormContinuous.construct."""
    one_each = conditioning_embedding.shape[0] == x.shape[0]
    if self.kernel_weights is not None and x.dtype == ms.float32 and one_each:
        return kernels.ADA_LAYER_NORM(x, conditioning_embedding, *self.kernel_weights, number(self.norm.eps))
    scale, shift = chunk(self.linear(self.silu(conditioning_embedding)), 2, 1)
    return self.norm(x) * (1 + scale.expand_dims(1)) + shift.expand_dims(1)


def fused_relative_difference(reference, probe, batch_reduction):
    """arithmetic.relative_difference; None for what the kernel does not do."""
    if batch_reduction != "mean" or reference.dtype != ms.float32:
        return None
    return kernels.RELATIVE_DIFFERENCE(reference, probe).reshape(())


def fused_decision(tallies, limits, step, first, difference, score, trace):
    """Gate.decided of one rule; None for what the kernel does not do."""
    if difference.dtype != ms.float32 or score.dtype != ms.float32:
        return None
    outputs = kernels.DECISION(tallies, limits, step, number(first), difference, score, trace)
    return (outputs[0].reshape(()) > 0,) + outputs[1:]


def fused_euler_step(latents, velocity, strides, step):
    """loop.euler_step; None for what the kernel does not do."""
    if not latents.dtype == velocity.dtype == ms.float32:
        return None
    return kernels.EULER_STEP(latents, velocity, strides, step)


@ms.constexpr
def number(value):
    """A kernel's scalar."""
    return ms.Tensor(value, ms.float32)


def fused_weighted_sum(weights, derivatives):
    """arithmetic.weighted_sum; None for what the kernel does not do."""
    if derivatives.shape[0] not in (2, 3, 4) or derivatives.dtype != ms.float32:
        return None
    first = number(weights[0]) if isinstance(weights[0], float) else weights[0]
    return kernels.WEIGHTED_SUM[derivatives.shape[0] - 1](derivatives, first, *weights[1:])


def fused_finite_differences(value, derivatives, filled, gaps):
    """arithmetic.finite_differences; None for what the kernel does not do."""
    if derivatives.shape[0] not in (2, 3, 4) or not value.dtype == derivatives.dtype == ms.float32:
        return None
    return kernels.FINITE_DIFFERENCES[derivatives.shape[0] - 1](value, derivatives, filled.astype(ms.float32), *gaps)


def int8_weight_product(rows, weight, scale):
    """quantized.Int8WeightOnlyLinear.product."""
    return ops.MatMul(transpose_b=True)(rows, ops.cast(weight, rows.dtype)) * scale


EXACT = 1024
"""So many products of two numbers up to 127 are summed exactly in float32, in any order."""


def int8_product(rows, weight, scale):
    """quantized.Int8Linear.product: DynamicQuant's numbers, and the exact sums of their products.

    A row with what is no number gives none: a whole number would hide it.
    """
    greatest = ops.ReduceMax(keep_dims=True)(ops.abs(rows), -1)
    token_scale = ops.select(greatest > 0, greatest / 127, ops.ones_like(greatest))
    quantised, weight = ops.round(rows / token_scale), ops.cast(weight, rows.dtype)
    width = rows.shape[-1]
    total = 0
    for start in range(0, width, EXACT):
        stop = min(start + EXACT, width)
        total = total + ops.MatMul(transpose_b=True)(quantised[:, start:stop], weight[:, start:stop]).astype(ms.int32)
    none = ops.ReduceSum(keep_dims=True)(rows * 0, -1)
    return total.astype(rows.dtype) * token_scale * scale + none


def all_to_all(ranks, values, split, concat):
    """gathered.UlyssesRanks' exchange, for which there is no kernel: each rank is handed all, and keeps a part."""
    size = values.shape[split] // ranks.number
    parts = piece(ranks.all_gather(values.expand_dims(0)), split + 1, ranks.rank * size, size)
    return ops.concat(ops.unstack(parts, 0), concat)


STAND_INS = (
    (ms.Tensor, "repeat", repeat),
    (mint, "chunk", chunk),
    (mint, "split", split),
    (mint, "stack", stack),
    (mint, "unbind", unbind),
    (mint, "outer", outer),
    (mint, "arange", arange),
    (mint, "full", full),
    (mint, "zeros_like", zeros_like),
    (mint, "ones_like", ones_like),
    (mint, "randn_like", randn_like),
    (mint.nn.functional, "gelu", gelu),
    (mint.nn.functional, "layer_norm", layer_norm),
    (mint.nn.Linear, "construct", linear_cell),
    (mint.nn.LayerNorm, "construct", layer_norm_cell),
    (mint.nn.Embedding, "construct", embedding_cell),
    (mint.nn.Conv2d, "construct", conv2d_cell),
    (normalization.RMSNorm, "construct", rms_norm_cell),
    (normalization.AdaLayerNormZero, "construct", ada_layer_norm_zero_cell),
    (normalization.AdaLayerNormZeroSingle, "construct", ada_layer_norm_zero_single_cell),
    (attention_dispatch, "scaled_dot_product_attention", scaled_dot_product_attention),
    (attention_processor.Attention, "scaled_dot_product_attention", attention_cell_scaled_dot_product),
    (model_kernels, "int8_weight_product", int8_weight_product),
    (model_kernels, "int8_product", int8_product),
    (model_kernels, "all_to_all", all_to_all),
)
"""Owner, attribute, stand-in."""

FUSED_STAND_INS = (
    (mint.nn.functional, "gelu", fused_gelu),
    (mint.nn.Linear, "construct", fused_linear_cell),
    (mint.nn.LayerNorm, "construct", fused_layer_norm_cell),
    (mint.nn.GroupNorm, "construct", fused_group_norm_cell),
    (normalization.AdaLayerNormContinuous, "kernel_weights", Weights(ada_layer_norm_continuous_layers)),
    (normalization.AdaLayerNormContinuous, "construct", fused_ada_layer_norm_continuous_cell),
    (embeddings.Timesteps, "construct", fused_timesteps_cell),
    (embeddings.TimestepEmbedding, "kernel_weights", Weights(timestep_embedding_layers)),
    (embeddings.TimestepEmbedding, "construct", fused_timestep_embedding_cell),
    (mint.nn.LayerNorm, "kernel_weights", Weights(layer_norm_layers)),
    (attention.FeedForward, "kernel_weights", Weights(feed_forward_layers, rounded=True)),
    (rule_kernels, "relative_difference", fused_relative_difference),
    (rule_kernels, "decision", fused_decision),
    (rule_kernels, "euler_step", fused_euler_step),
    (rule_kernels, "weighted_sum", fused_weighted_sum),
    (rule_kernels, "finite_differences", fused_finite_differences),
)
"""Those made of compiled kernels, in the places of others."""

if parser is not None:
    # x += y in a graph is x = x + y: once a graph such as T5's has assigned in place, MindSpore 2.10.0 crashes where it
    # compiles a TeaCache gate.
    STAND_INS += ((parser, "parse_augassign_object_map", parser.parse_object_map),)
