import numpy as np

from mindone.diffusers.models import attention_dispatch, attention_processor, embeddings, normalization
from mindone.diffusers.models.transformers import transformer_flux

import mindspore as ms
from mindspore import mint, ops


def chunk(input, chunks, dim=0):
    size = -(-input.shape[dim] // chunks)
    pieces = []
    for start in range(0, input.shape[dim], size):
        pieces.append(ops.narrow(input, dim, start, min(size, input.shape[dim] - start)))
    return tuple(pieces)


def split(tensor, split_size_or_sections, dim=0):
    if isinstance(split_size_or_sections, int):
        total = tensor.shape[dim]
        sizes = [min(split_size_or_sections, total - s) for s in range(0, total, split_size_or_sections)]
    else:
        sizes = split_size_or_sections
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(ops.narrow(tensor, dim, start, size))
        start += size
    return tuple(pieces)


def stack(tensors, dim=0):
    return ops.stack(tensors, dim)


def unbind(input, dim=0):
    return ops.unstack(input, dim)


def outer(input, vec2):
    return input.reshape(-1, 1) * vec2.reshape(1, -1)


def gelu(input, *, approximate="none"):
    if approximate == "tanh":
        return input * ops.sigmoid(1.5957691216057308 * (input + 0.044715 * input * input * input))
    return 0.5 * input * (1 + ops.erf(input * 0.7071067811865476))


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keep_dims=True)
    normed = centred * ops.rsqrt((centred * centred).mean(axes, keep_dims=True) + eps)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed


def layer_norm_cell(self, input):
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    backend=None,
):
    scores = ops.BatchMatMul(transpose_b=True)(query, key) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores + attn_mask
    return ops.BatchMatMul()(ops.softmax(scores, -1), value)


def conv2d_cell(self, input):
    padding = self.padding
    convolution = ops.Conv2D(
        self.out_channels,
        self.kernel_size,
        pad_mode="pad",
        pad=(padding[0], padding[0], padding[1], padding[1]),
        stride=self.stride,
        dilation=self.dilation,
        group=self.groups,
    )
    output = convolution(input, self.weight)
    if self.bias is not None:
        output = ops.bias_add(output, self.bias)
    return output


def attention_sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def embedding_cell(self, input):
    return ops.gather(self.weight, input, 0)


def zeros_like(input, *, dtype=None):
    return ops.zeros_like(input, dtype=dtype)


def ones_like(input, *, dtype=None):
    return ops.ones_like(input, dtype=dtype)


def arange(start=0, end=None, step=1, *, dtype=None):
    if end is None:
        start, end = 0, start
    r = ops.arange(start, end, step)
    return r if dtype is None else r.to(dtype)


def full(size, fill_value, *, dtype=None):
    return ops.fill(dtype or (ms.float32 if isinstance(fill_value, float) else ms.int64), tuple(size), fill_value)


def rms_norm(self, hidden_states):
    variance = ops.ReduceMean(keep_dims=True)(ops.square(hidden_states), -1)
    hidden_states = hidden_states * ops.rsqrt(variance + self.eps)
    if self.weight is not None:
        hidden_states = hidden_states * self.weight
    return hidden_states


def ada_layer_norm_zero(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    emb = self.linear(self.silu(emb))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunk(emb, 6, 1)
    x = self.norm(x) * (1 + scale_msa.expand_dims(1)) + shift_msa.expand_dims(1)
    return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


def ada_layer_norm_zero_single(self, x, emb=None):
    shift, scale, gate = chunk(self.linear(self.silu(emb)), 3, 1)
    return self.norm(x) * (1 + scale.expand_dims(1)) + shift.expand_dims(1), gate


def rotary_pos_embed(dim, pos, theta=10000.0, use_real=False, linear_factor=1.0, ntk_factor=1.0, repeat_interleave_real=True, freqs_dtype=ms.float32):
    freqs = 1.0 / (theta ** (ops.arange(0, dim, 2).to(ms.float32) / dim))
    angles = outer(pos, freqs).expand_dims(-1)
    angles = ops.concat((angles, angles), -1).reshape(-1, dim)
    return ops.cos(angles), ops.sin(angles)


def flux_attention(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    query, key, value, encoder_query, encoder_key, encoder_value = transformer_flux._get_qkv_projections(
        attn, hidden_states, encoder_hidden_states
    )
    batch, length, _ = query.shape
    heads = (batch, -1, attn.heads, query.shape[-1] // attn.heads)
    query, key, value = attn.norm_q(query.reshape(heads)), attn.norm_k(key.reshape(heads)), value.reshape(heads)
    if attn.added_kv_proj_dim is not None:
        query = mint.cat([attn.norm_added_q(encoder_query.reshape(heads)), query], dim=1)
        key = mint.cat([attn.norm_added_k(encoder_key.reshape(heads)), key], dim=1)
        value = mint.cat([encoder_value.reshape(heads), value], dim=1)
    if image_rotary_emb is not None:
        query = transformer_flux.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = transformer_flux.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    hidden_states = scaled_dot_product_attention(query, key, value, attention_mask).transpose(0, 2, 1, 3)
    hidden_states = hidden_states.reshape(batch, hidden_states.shape[1], -1)
    if encoder_hidden_states is None:
        return hidden_states
    text = encoder_hidden_states.shape[1]
    return attn.to_out[0](hidden_states[:, text:]), attn.to_add_out(hidden_states[:, :text])


def install():
    mint.nn.LayerNorm.construct = layer_norm_cell
    mint.nn.Conv2d.construct = conv2d_cell
    attention_processor.Attention.scaled_dot_product_attention = attention_sdpa
    mint.nn.Embedding.construct = embedding_cell
    mint.zeros_like = zeros_like
    mint.ones_like = ones_like
    mint.chunk = chunk
    mint.split = split
    mint.stack = stack
    mint.unbind = unbind
    mint.outer = outer
    mint.arange = arange
    mint.full = full
    mint.nn.functional.gelu = gelu
    mint.nn.functional.layer_norm = layer_norm
    attention_dispatch.scaled_dot_product_attention = scaled_dot_product_attention
    normalization.RMSNorm.construct = rms_norm
    normalization.AdaLayerNormZero.construct = ada_layer_norm_zero
    normalization.AdaLayerNormZeroSingle.construct = ada_layer_norm_zero_single
    transformer_flux.get_1d_rotary_pos_embed = rotary_pos_embed
    transformer_flux.FluxAttnProcessor.__call__ = flux_attention
