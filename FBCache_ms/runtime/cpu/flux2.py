"""Stand-ins for FLUX.2's attention; see stand_ins.py."""

import numpy as np
from mindone.diffusers.models import layers_compat
from mindone.diffusers.models.transformers import transformer_flux2

import mindspore as ms
from mindspore import mint, ops

from . import flux
from .flux import apply_rotary_emb, attend, flux_attention
from .stand_ins import split


def empty(*size, dtype=None, device=None):
    """mint.empty; of zeros."""
    size = size[0] if len(size) == 1 and isinstance(size[0], (list, tuple)) else size
    return ms.Tensor(np.zeros(size), dtype or ms.float32)


def get_1d_rotary_pos_embed(*args, **kwargs):
    """mindone's rotary table, of whatever precision, in float32."""
    cos, sin = flux.get_1d_rotary_pos_embed(*args, **kwargs)
    return cos.float(), sin.float()


def rms_norm_cell(self, x):
    """layers_compat's RMSNorm.construct, over the last axis."""
    normed = x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + self.eps)
    return normed if self.weight is None else normed * self.weight


def swiglu_cell(self, x):
    """Flux2SwiGLU.construct."""
    gate, value = split(x, x.shape[-1] // 2, -1)
    return self.gate_fn(gate) * value


def flux2_parallel_attention(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
    """Flux2ParallelSelfAttnProcessor.__call__: attention and MLP side by side."""
    mlp_width = attn.mlp_hidden_dim * attn.mlp_mult_factor
    query, key, value, mlp = split(attn.to_qkv_mlp_proj(hidden_states), 3 * [attn.inner_dim] + [mlp_width], -1)
    heads = query.shape[:2] + (attn.heads, attn.head_dim)
    query, key, value = attn.norm_q(query.reshape(heads)), attn.norm_k(key.reshape(heads)), value.reshape(heads)
    if image_rotary_emb is not None:
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
    attended = attend(self, query, key, value, attention_mask)
    attended = attended.reshape(attended.shape[:2] + (attn.inner_dim,))
    return attn.to_out(ops.concat((attended, attn.mlp_act_fn(mlp)), -1))


STAND_INS = (
    (mint, "empty", empty),
    (layers_compat.RMSNorm, "construct", rms_norm_cell),
    (transformer_flux2, "get_1d_rotary_pos_embed", get_1d_rotary_pos_embed),
    (transformer_flux2, "apply_rotary_emb", apply_rotary_emb),
    (transformer_flux2.Flux2SwiGLU, "construct", swiglu_cell),
    (transformer_flux2.Flux2AttnProcessor, "__call__", flux_attention),
    (transformer_flux2.Flux2ParallelSelfAttnProcessor, "__call__", flux2_parallel_attention),
)
"""As in stand_ins.py."""
