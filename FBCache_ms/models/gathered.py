"""Attention where several devices share a picture's tokens.

Everything else in a transformer sees each token by itself. A device holds a part of the text and a part of the image.
In attention it has its own queries, and the keys and values of all (Ranks); or all tokens' of a part of the heads
(UlyssesRanks). They are exchanged behind norm and rotary embedding, where the order of the tokens does not matter.
"""

from mindone.diffusers.models import embeddings
from mindone.diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from mindone.diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from mindone.diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

import mindspore as ms
from mindspore import mint, ops

from . import kernels
from .blocks import attend, joint_attention


@ms.jit_class
class Ranks:
    """The devices that share a picture, as a graph uses them; attention gathers keys and values.

    Args:
        number: how many.
        rank: which of them this is.
        group: their communication group, None for one alone.
    """

    def __init__(self, number, rank, group):
        self.number, self.rank, self.group = number, rank, group
        self.all_gather = ops.AllGather(group) if number > 1 else None

    def tokens(self, values):
        """(B, L, ...) of all tokens, from each rank's (B, L / n, ...)."""
        gathered = self.all_gather(values.unsqueeze(0)).swapaxes(0, 1)
        return gathered.reshape((values.shape[0], self.number * values.shape[1]) + values.shape[2:])

    def attended(self, query, key, value):
        """What a device's attention is of: its own queries, and keys and values of all tokens, in one exchange."""
        width = key.shape[-1]
        both = self.tokens(mint.cat((key, value), dim=-1))
        return query, both[..., :width], both[..., width:]

    def own(self, attention):
        """What attention gives for this device's tokens, (B, L / n, heads, d)."""
        return attention

    def why_not(self, cell):
        """What stands in the way of an attention cell, in words, or None."""
        return None

    def mean(self, values, axes=None):
        """arithmetic.mean over the equal shares of all ranks, summed in their order, so that all have the same bits."""
        if not isinstance(values, tuple):
            return self.mean((values,), axes)[0]
        own = mint.stack([value.mean(axes) for value in values])
        means = self.all_gather(own.unsqueeze(0))
        total = means[0]
        for rank in range(1, self.number):
            total = total + means[rank]
        return tuple([total[place] / self.number for place in range(len(values))])


@ms.jit_class
class UlyssesRanks(Ranks):
    """Ranks whose attention is of all tokens and a part of the heads: DeepSpeed-Ulysses (arXiv 2309.14509).

    Two exchanges a block, together 2 / n of what keys and values are.
    """

    def __init__(self, number, rank, group):
        Ranks.__init__(self, number, rank, group)
        self.to_heads = ops.AlltoAll(number, 2, 1, group) if number > 1 else None
        self.to_tokens = ops.AlltoAll(number, 1, 2, group) if number > 1 else None

    def attended(self, query, key, value):
        """See Ranks: all tokens' (B, L, heads / n, d)."""
        width = key.shape[-1]
        parts = mint.cat((query, key, value), dim=-1)
        by_kernel = kernels.all_to_all(self, parts, 2, 1)
        parts = by_kernel if by_kernel is not None else self.to_heads(parts)
        return parts[..., :width], parts[..., width : 2 * width], parts[..., 2 * width :]

    def own(self, attention):
        """See Ranks."""
        by_kernel = kernels.all_to_all(self, attention, 1, 2)
        return by_kernel if by_kernel is not None else self.to_tokens(attention)

    def why_not(self, cell):
        """See Ranks."""
        return (
            f"{cell.heads} heads cannot be shared by {self.number} devices evenly" if cell.heads % self.number else None
        )


SCHEMES = {"gather": Ranks, "ulysses": UlyssesRanks}
"""What attention exchanges, by name."""


class Gathered:
    """An attention processor that sees the tokens of all ranks.

    Args:
        ranks: the Ranks.
        original: the processor whose place it takes.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, ranks, original):
        self.ranks, self.original = ranks, original
        # The compile cache tells graphs apart by these.
        self.rank, self.number, self.group = ranks.rank, ranks.number, ranks.group


@ms.jit_class
class GatheredJoint(Gathered):
    """Joint attention over a text and an image stream, or over one of both: FLUX.1's, FLUX.2's in double blocks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        """What mindone's processor gives."""
        if encoder_hidden_states is not None:
            return joint_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask)
        heads = (hidden_states.shape[0], -1, attn.heads, attn.inner_dim // attn.heads)
        query = attn.norm_q(attn.to_q(hidden_states).reshape(heads))
        key = attn.norm_k(attn.to_k(hidden_states).reshape(heads))
        value = attn.to_v(hidden_states).reshape(heads)
        query = embeddings.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = embeddings.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        return attend(self, query, key, value, attention_mask).reshape(hidden_states.shape)


@ms.jit_class
class GatheredQwen(Gathered, QwenDoubleStreamAttnProcessor2_0):
    """Qwen-Image's, which models/qwenimage.py runs by joint_attention."""

    def __init__(self, ranks, original):
        Gathered.__init__(self, ranks, original)


@ms.jit_class
class GatheredParallel(Gathered):
    """FLUX.2's single blocks', whose MLP lies beside attention."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        """What mindone's processor gives."""
        projected = attn.to_qkv_mlp_proj(hidden_states)
        width = attn.inner_dim
        heads = (hidden_states.shape[0], -1, attn.heads, width // attn.heads)
        query = attn.norm_q(projected[..., :width].reshape(heads))
        key = attn.norm_k(projected[..., width : 2 * width].reshape(heads))
        value = projected[..., 2 * width : 3 * width].reshape(heads)
        query = embeddings.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = embeddings.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        attended = attend(self, query, key, value, attention_mask).reshape(hidden_states.shape[:-1] + (width,))
        return attn.to_out(mint.cat((attended, attn.mlp_act_fn(projected[..., 3 * width :])), dim=-1))


PROCESSORS = {
    FluxAttnProcessor: GatheredJoint,
    Flux2AttnProcessor: GatheredJoint,
    Flux2ParallelSelfAttnProcessor: GatheredParallel,
    QwenDoubleStreamAttnProcessor2_0: GatheredQwen,
}
"""What takes the place of each of mindone's processors."""
