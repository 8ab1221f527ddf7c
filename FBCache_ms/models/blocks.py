"""What the blocks of several families have in common."""

import numpy as np
from mindone.diffusers.models import attention_dispatch, embeddings

import mindspore as ms
from mindspore import mint, ops

from . import kernels


def input_or_none(inputs, name):
    """An input by its name, None where it is not given."""
    return inputs[name] if name in inputs else None


def controlnet_index(index, blocks, samples, in_turn):
    """Which of a ControlNet's residuals block number ``index`` gets: spread over the blocks, or in turn."""
    if in_turn:
        return index % samples
    return index // ((blocks + samples - 1) // samples)


def behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate, places=None):
    """A double block's stream behind attention, by a device's kernel where there is one that does it."""
    by_kernel = kernels.behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate, places)
    if by_kernel is not None:
        return by_kernel
    return behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate)


def behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """A double block's stream: y = x + gate a, then y + mlp_gate ff((1 + scale) norm(y) + shift)."""
    stream = stream + gate.unsqueeze(1) * attended
    modulated = norm(stream) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return stream + mlp_gate.unsqueeze(1) * feed_forward(modulated)


def behind_attention(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate, added=None, tokens=None):
    """A double block's stream behind attention, and what the MLP gives before its gate.

    With ``tokens``, an int32 vector, the MLP runs for these alone; what it gives all others is ``added``.
    """
    stream = stream + gate.unsqueeze(1) * attended
    if tokens is None:
        added = feed_forward(modulate(norm(stream), shift, scale))
    else:
        some = modulate(norm(ops.gather(stream, tokens, 1)), shift, scale)
        added = with_tokens(added, tokens, feed_forward(some))
    return stream + mlp_gate.unsqueeze(1) * added, added


def with_tokens(stream, tokens, values):
    """A stream (B, N, D) with values (B, k, D) in the places of k tokens."""
    batch, number, width = stream.shape
    rows = tokens + number * ms.Tensor(np.arange(batch)[:, None], ms.int32)
    stream = ops.tensor_scatter_update(stream.reshape(-1, width), rows.reshape(-1, 1), values.reshape(-1, width))
    return stream.reshape(batch, number, width)


def finite(stream):
    """A stream of float16 within what that can hold."""
    return stream.clip(-65504, 65504) if stream.dtype == ms.float16 else stream


def modulate(normed, shift, scale):
    """(1 + scale) x + shift."""
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def refuse_kwargs(attention_kwargs):
    """Raises ValueError for what goes on to attention, where nothing can."""
    if attention_kwargs:
        raise ValueError(f"attention_kwargs {', '.join(attention_kwargs)} are not supported with the cache")


def modulation(vector):
    """A block's modulation (B, 6 D): shift and scale before attention; its gate, the MLP's shift, scale and gate."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mint.chunk(vector, 6, dim=-1)
    return (shift, scale), (gate, mlp_shift, mlp_scale, mlp_gate)


def token_norms(velocity):
    """|v| of each token, (B, S, 1)."""
    return mint.sqrt(mint.sum(velocity * velocity, dim=-1, keepdim=True))


def attend(processor, query, key, value, mask):
    """Attention of (B, L, heads, d), over the tokens of all ranks where the processor is one of models/gathered.py."""
    if hasattr(processor, "ranks"):
        query, key, value = processor.ranks.attended(query, key, value)
    attention = attention_dispatch.dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return processor.ranks.own(attention) if hasattr(processor, "ranks") else attention


def joint_attention(attn, image, text, rotary, keys):
    """Joint attention over [text, image]: what the image and what the text stream gets of it.

    The equations are those of mindone 0.5.0's QwenDoubleStreamAttnProcessor2_0, and padding is no key.
    """
    batch, text_len = text.shape[:2]
    heads = (batch, -1, attn.heads, attn.inner_dim // attn.heads)
    query = attn.norm_q(attn.to_q(image).reshape(heads))
    text_query = attn.norm_added_q(attn.add_q_proj(text).reshape(heads))
    key = attn.norm_k(attn.to_k(image).reshape(heads))
    text_key = attn.norm_added_k(attn.add_k_proj(text).reshape(heads))
    value, text_value = attn.to_v(image).reshape(heads), attn.add_v_proj(text).reshape(heads)
    query = embeddings.apply_rotary_emb(mint.cat((text_query, query), dim=1), rotary, sequence_dim=1)
    key = embeddings.apply_rotary_emb(mint.cat((text_key, key), dim=1), rotary, sequence_dim=1)
    attended = attend(attn.processor, query, key, mint.cat((text_value, value), dim=1), keys)
    attended = attended.reshape(batch, attended.shape[1], -1).to(query.dtype)
    return attn.to_out[1](attn.to_out[0](attended[:, text_len:])), attn.to_add_out(attended[:, :text_len])


def rotary_of(positions, theta, axes):
    """Cosines and sines (N, head_dim) of positions (N, P), float32, each frequency twice in a row.

    By the host, in float64, since mindone's tables are of numbers that a graph or an NPU does not take.

    Args:
        theta: the base of the frequencies.
        axes: so many of head_dim are for each of the P positions.
    """
    frequencies = [float(theta) ** (-np.arange(0, axis, 2) / axis) for axis in axes]
    angles = [np.outer(positions[:, place], frequency) for place, frequency in enumerate(frequencies)]
    angles = np.repeat(np.concatenate(angles, 1), 2, 1)
    return ms.Tensor(np.cos(angles), ms.float32), ms.Tensor(np.sin(angles), ms.float32)
