"""Stand-ins for Flux's attention and blocks; see stand_ins.py."""

import numpy as np
from mindone.diffusers.models import normalization
from mindone.diffusers.models.transformers import transformer_flux

import mindspore as ms
from mindspore import ops

from ...models import kernels as model_kernels
from ...models.blocks import behind_double
from ...models.mindones import by_known_author, is_mindones
from ...models.transformer_flux_withFBCache import behind_single, divided_double
from . import kernels
from .stand_ins import (
    Weights,
    arange,
    drops_nothing,
    feed_forward_layers,
    layer_norm_layers,
    modulation_layers,
    number,
    outer,
    scaled_dot_product_attention,
)


def get_1d_rotary_pos_embed(
    dim,
    pos,
    theta=10000.0,
    use_real=False,
    linear_factor=1.0,
    ntk_factor=1.0,
    repeat_interleave_real=True,
    freqs_dtype=ms.float32,
):
    """Flux's rotary table: cosine and sine (S, dim), each frequency twice in a row, of positions (S,)."""
    frequencies = (theta * ntk_factor) ** (-arange(0, dim, 2).astype(freqs_dtype) / dim) / linear_factor
    angles = outer(pos, frequencies).expand_dims(-1)
    angles = ops.concat((angles, angles), -1).reshape(-1, dim)
    return ops.cos(angles), ops.sin(angles)


def apply_rotary_emb(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    """mindone's apply_rotary_emb for Flux: (B, L, H, d), or (B, H, L, d), turned by cosine and sine, both (L, d)."""
    cos, sin = freqs_cis
    if sequence_dim == 1:
        cos, sin = cos.expand_dims(1), sin.expand_dims(1)
    # One product in the place of taking the pairs apart and putting them together again.
    turned = ops.MatMul()(x.reshape(-1, x.shape[-1]), quarter_turn(x.shape[-1])).reshape(x.shape)
    return x * cos + turned * sin


@ms.constexpr
def quarter_turn(width):
    """The matrix that makes (-x1, x0) of each pair (x0, x1) of a row."""
    return ms.Tensor(np.kron(np.eye(width // 2), [[0, 1], [-1, 0]]), ms.float32)


def flux_attention(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    """FluxAttnProcessor.__call__: joint attention over [text, image] in a double block, over what comes in a single."""
    query, key, value, text_query, text_key, text_value = transformer_flux._get_qkv_projections(
        attn, hidden_states, encoder_hidden_states
    )
    batch = query.shape[0]
    heads = (batch, -1, attn.heads, query.shape[-1] // attn.heads)
    query, key, value = attn.norm_q(query.reshape(heads)), attn.norm_k(key.reshape(heads)), value.reshape(heads)
    if attn.added_kv_proj_dim is not None:
        query = ops.concat((attn.norm_added_q(text_query.reshape(heads)), query), 1)
        key = ops.concat((attn.norm_added_k(text_key.reshape(heads)), key), 1)
        value = ops.concat((text_value.reshape(heads), value), 1)
    if image_rotary_emb is not None:
        query = transformer_flux.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = transformer_flux.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
    attended = attend(self, query, key, value, attention_mask)
    attended = attended.reshape(batch, attended.shape[1], -1)
    if encoder_hidden_states is None:
        return attended
    text = encoder_hidden_states.shape[1]
    return attn.to_out[1](attn.to_out[0](attended[:, text:])), attn.to_add_out(attended[:, :text])


def attend(processor, query, key, value, mask):
    """dispatch_attention_fn of an attention processor: attention of (B, L, heads, d)."""
    if is_replaced("dispatch_attention_fn"):
        settings = {"backend": processor._attention_backend, "parallel_config": processor._parallel_config}
        return transformer_flux.dispatch_attention_fn(query, key, value, attn_mask=mask, **settings)
    query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
    return scaled_dot_product_attention(query, key, value, mask).swapaxes(1, 2)


@ms.constexpr
def is_replaced(name):
    """Whether a function that Flux's attention calls is the user's."""
    return not by_known_author(getattr(transformer_flux, name))


def flux_ip_adapter_attention(
    self,
    attn,
    hidden_states,
    encoder_hidden_states=None,
    attention_mask=None,
    image_rotary_emb=None,
    ip_hidden_states=None,
    ip_adapter_masks=None,
):
    """FluxIPAdapterAttnProcessor.__call__: a double block's attention, and what the image tokens see of each image."""
    image, text = flux_attention(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    heads = (image.shape[0], -1, attn.heads, attn.head_dim)
    query = attn.norm_q(attn.to_q(hidden_states).reshape(heads))
    seen = ops.zeros_like(image)
    for prompt, scale, to_k_ip, to_v_ip in zip(ip_hidden_states, self.scale, self.to_k_ip, self.to_v_ip):
        attended = attend(self, query, to_k_ip(prompt).reshape(heads), to_v_ip(prompt).reshape(heads), None)
        seen = seen + scale * attended.reshape(image.shape)
    return image, text, seen


def attends_plainly(attn, added):
    """Whether an attention is what a block's kernel does, with or without a text stream of its own."""
    if not is_mindones(attn, transformer_flux.FluxAttention) or attn.fused_projections or attn.pre_only == added:
        return False
    functions = "apply_rotary_emb", "_get_qkv_projections", "dispatch_attention_fn"
    return (
        is_mindones(attn.processor, transformer_flux.FluxAttnProcessor)
        and not any(map(is_replaced, functions))
        and (attn.added_kv_proj_dim is not None) == added
        and attn.query_dim == attn.inner_dim == attn.out_dim == attn.heads * attn.head_dim
    )


def double_block_layers(block):
    """What a double block's kernel reads."""
    attn, feed_forward = block.attn, feed_forward_layers(block.ff)
    norms = [modulation_layers(norm, normalization.AdaLayerNormZero) for norm in (block.norm1, block.norm1_context)]
    if None in (*norms, feed_forward, layer_norm_layers(block.norm2)) or not attends_plainly(attn, added=True):
        return None
    inner = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
    if not one_epsilon(block.norm1.norm, block.norm1_context.norm, block.norm2) or not one_epsilon(*inner):
        return None
    if not drops_nothing(attn.to_out[1]):
        return None
    image = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, attn.to_out[0]
    text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k, attn.to_add_out
    return (*norms[0], *image, *feed_forward, *norms[1], *text)


def one_epsilon(*norms):
    """Whether norms have the same epsilon, since a kernel is given one."""
    return len({norm.eps for norm in norms}) == 1


def single_block_layers(block):
    """What a single block's kernel reads."""
    attn, norm = block.attn, modulation_layers(block.norm, normalization.AdaLayerNormZeroSingle)
    activation = is_mindones(block.act_mlp, transformer_flux.GELU) and block.act_mlp.approximate == "tanh"
    if (
        norm is None
        or not activation
        or not attends_plainly(attn, added=False)
        or not one_epsilon(attn.norm_q, attn.norm_k)
    ):
        return None
    return (*norm, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, block.proj_mlp, block.proj_out)


def matrices_of(cell):
    """What the matrices are of that a cell's kernel reads; int8 ones come behind what says whether they round."""
    if cell.kernel_weights[1].dtype == ms.int8:
        return kernels.INT8
    return kernels.BFLOAT16 if cell.kernel_weights[0].dtype == ms.bfloat16 else kernels.FLOAT32


def fused_double_block(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """FluxTransformerBlock.construct."""
    image, unfinished = divided_double(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs or {}
    )
    return behind_double(self.norm2_context, self.ff_context, *unfinished), image


def fused_places(cells, attention_kwargs, dtype):
    """models/kernels.py's places, the table and the row of it where each of a block's kernels begins to read.

    None for what the kernels do not do, and outside a graph: only a graph's launch holds on to all of its weights up to
    its end.
    """
    if not in_a_graph() or len(attention_kwargs or {}) > 0 or dtype != ms.float32:
        return (None,) * len(cells)
    every, all_parts = [places_of(cell) for cell in cells], ()
    for parts in every:
        all_parts = all_parts + parts
    if len(all_parts) == 0:
        return (None,) * len(cells)
    table, found, row = ops.concat(all_parts), (), 0
    for parts in every:
        begins = ()
        for part in parts:
            begins, row = begins + ((table, number(row)),), row + part.shape[0]
        found = found + ((begins if len(parts) > 0 else None),)
    return found


def places_of(cell):
    """Where a block's weights lie, a tensor for each of its kernels; none for what these do not do."""
    if not getattr(cell, "is_divisible", False) or cell.kernel_weights is None:
        return ()
    if isinstance(cell, transformer_flux.FluxSingleTransformerBlock):
        return (kernels.SINGLE_BLOCK.places[matrices_of(cell)](*cell.kernel_weights),)
    behind = cell.ff_context.kernel_weights
    if behind is None or cell.norm2_context.kernel_weights is None:
        return ()
    return (
        kernels.DOUBLE_BLOCK.places[matrices_of(cell)](*cell.kernel_weights),
        kernels.BEHIND_DOUBLE.places[matrices_of(cell.ff_context)](*behind),
    )


@ms.constexpr
def in_a_graph():
    """Whether what asks is compiled."""
    return ms.get_context("mode") == ms.GRAPH_MODE


def fused_whole_block(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.whole_block; None for what the kernels do not do."""
    if places is None or not is_whole(cell, image, temb, attention_kwargs):
        return None
    if len(places) == 1:
        return single_block(cell, image, text, temb, rotary, places)
    image, unfinished = fused_divided_double(cell, image, text, temb, rotary, attention_kwargs, places)
    return fused_behind_double(cell.norm2_context, cell.ff_context, *unfinished, places), image


def is_whole(cell, image, temb, attention_kwargs):
    """Whether a block's kernel does all that the block is asked for."""
    plain = cell.kernel_weights is not None and len(attention_kwargs or {}) == 0 and image.dtype == ms.float32
    return plain and temb.shape[0] == image.shape[0]


def fused_divided_double(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.divided_double; None for what the kernel does not do."""
    if not is_whole(cell, image, temb, attention_kwargs):
        return None
    streams = image, text, temb, rotary[0], rotary[1], number((cell.norm2.eps, cell.attn.norm_q.eps))
    if places is None:
        outputs = kernels.DOUBLE_BLOCK.whole[matrices_of(cell)](*streams, *cell.kernel_weights)
    else:
        outputs = kernels.DOUBLE_BLOCK.placed[matrices_of(cell)](*streams, *places[0])
    return outputs[0], (text,) + outputs[1:]


def fused_behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate, places):
    """blocks.behind_double; None for what the kernel does not do."""
    whole = (
        getattr(norm, "kernel_weights", None) is not None and getattr(feed_forward, "kernel_weights", None) is not None
    )
    if not whole or stream.dtype != ms.float32 or gate.shape[0] != stream.shape[0]:
        return None
    streams = stream, attended, gate, shift, scale, mlp_gate, number(norm.eps)
    if places is None:
        return kernels.BEHIND_DOUBLE.whole[matrices_of(feed_forward)](*streams, *feed_forward.kernel_weights)
    return kernels.BEHIND_DOUBLE.placed[matrices_of(feed_forward)](*streams, *places[1])


def single_block(cell, image, text, temb, rotary, places=None):
    """A single block by its kernel."""
    streams = image, text, temb, rotary[0], rotary[1], number((cell.norm.norm.eps, cell.attn.norm_q.eps))
    if places is None:
        return kernels.SINGLE_BLOCK.whole[matrices_of(cell)](*streams, *cell.kernel_weights)
    return kernels.SINGLE_BLOCK.placed[matrices_of(cell)](*streams, *places[0])


def fused_single_block(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """FluxSingleTransformerBlock.construct."""
    if is_whole(self, hidden_states, temb, joint_attention_kwargs):
        return single_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb)
    kwargs, text_len = joint_attention_kwargs or {}, encoder_hidden_states.shape[1]
    streams = ops.concat((encoder_hidden_states, hidden_states), 1)
    normed, gate = self.norm(streams, emb=temb)
    attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **kwargs)
    streams = behind_single(self, streams, normed, attended, gate)
    return streams[:, :text_len], streams[:, text_len:]


STAND_INS = (
    (transformer_flux, "get_1d_rotary_pos_embed", get_1d_rotary_pos_embed),
    (transformer_flux, "apply_rotary_emb", apply_rotary_emb),
    (transformer_flux.FluxAttnProcessor, "__call__", flux_attention),
    (transformer_flux.FluxIPAdapterAttnProcessor, "__call__", flux_ip_adapter_attention),
)
"""As in stand_ins.py."""

FUSED_STAND_INS = (
    (transformer_flux.FluxTransformerBlock, "kernel_weights", Weights(double_block_layers, rounded=True)),
    (transformer_flux.FluxTransformerBlock, "construct", fused_double_block),
    (transformer_flux.FluxSingleTransformerBlock, "kernel_weights", Weights(single_block_layers, rounded=True)),
    (transformer_flux.FluxSingleTransformerBlock, "construct", fused_single_block),
    (model_kernels, "places", fused_places),
    (model_kernels, "whole_block", fused_whole_block),
    (model_kernels, "divided_double", fused_divided_double),
    (model_kernels, "behind_double", fused_behind_double),
)
