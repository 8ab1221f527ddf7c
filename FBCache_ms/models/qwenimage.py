"""Qwen-Image: mindone's QwenImageTransformer2DModel as the cache sees it.

mindone 0.5.0's own construct does not compile: its rotary embedding is of complex numbers, under ms._no_grad(), and
reads shapes and lengths from lists. Here the host makes a table of real cosines and sines, and the block's equations
stand in this file. A transformer with a block, attention or processor of another class runs without the cache.
"""

from functools import lru_cache

import numpy as np
from mindone.diffusers import QwenImageTransformer2DModel
from mindone.diffusers.models.attention_processor import Attention
from mindone.diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedRope,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
)

import mindspore as ms

from . import qwenimage_costs
from .base import Model
from .blocks import (
    behind_double,
    controlnet_index,
    finite,
    input_or_none,
    joint_attention,
    modulate,
    modulation,
    refuse_kwargs,
    rotary_of,
    token_norms,
)
from .mindones import AtParsing, is_mindones, replaced
from .padding import keys_of, padded_text

KIND, COSTS, CONSTANTS = QwenImageTransformer2DModel, qwenimage_costs, ()
BY_BRANCH = ("encoder_hidden_states", "encoder_hidden_states_mask")
BY_TOKEN = {"encoder_hidden_states": ("text", -2), "rotary": ("both", 0), "controlnet_block_samples": ("image", 1)}
MODULATION = ("img_mod", "txt_mod")


@ms.jit_class
class QwenImageModel(Model):
    """A QwenImageTransformer2DModel.

    ``given`` holds "temb", the modulation vector (B, D); "rotary", two of (T + S, head_dim); "keys", (B, 1, 1, T + S),
    true where attention sees a token; and "controlnet", a ControlNet's residuals, or None.
    """

    def idle(self):
        """See Model.idle."""
        last = self.cell(self.stacks[0] - 1)
        return (*last.txt_mlp.get_parameters(), *last.attn.to_add_out.get_parameters())

    def prepare(self, inputs, constants, dtype):
        """See Model.prepare."""
        transformer, text = self.transformer, inputs["encoder_hidden_states"]
        embedded = transformer.txt_in(transformer.txt_norm(text.reshape((-1,) + text.shape[-2:])))
        branch = {
            "text": embedded.reshape(text.shape[:-1] + embedded.shape[-1:]),
            "mask": inputs["encoder_hidden_states_mask"],
        }
        return branch, {"rotary": inputs["rotary"], "controlnet": input_or_none(inputs, "controlnet_block_samples")}

    def times(self, timesteps, dtype):
        """The sinusoids (N, 256) of timesteps (N,) in [0, 1]."""
        return self.transformer.time_text_embed.time_proj(timesteps.to(dtype))

    def condition(self, time, branch, common):
        """See Model.condition."""
        text, mask, rotary = branch["text"], branch["mask"], common["rotary"]
        return text, {
            "temb": self.transformer.time_text_embed.timestep_embedder(time.to(text.dtype)),
            "rotary": rotary,
            "keys": keys_of(mask, text.shape[1], rotary[0].shape[0]).unsqueeze(1).unsqueeze(1),
            "controlnet": common["controlnet"],
        }

    def embed(self, latents):
        """See Model.embed."""
        return self.transformer.img_in(latents)

    def block(self, index, image, text, given):
        """See Model.block."""
        image, unfinished = self.divided_block(index, image, text, given)
        return image, self.text_behind(index, unfinished, given)

    def head(self, image, given):
        """See Model.head."""
        return self.transformer.proj_out(self.transformer.norm_out(image, given["temb"]))

    def modulated(self, image, given):
        """See Model.modulated."""
        before, _ = modulation(self.cell(0).img_mod(given["temb"]))
        return modulate(self.cell(0).img_norm1(image), *before)

    def divides(self, index):
        """See Model.divides."""
        return True

    def divided_block(self, index, image, text, given):
        """See Model.divided_block; the equations are those of mindone 0.5.0's QwenImageTransformerBlock."""
        cell = self.cell(index)
        before, behind = modulation(cell.img_mod(given["temb"]))
        text_before, text_behind = modulation(cell.txt_mod(given["temb"]))
        attended, text_attended = joint_attention(
            cell.attn,
            modulate(cell.img_norm1(image), *before),
            modulate(cell.txt_norm1(text), *text_before),
            given["rotary"],
            given["keys"],
        )
        image = finite(behind_double(cell.img_norm2, cell.img_mlp, image, attended, *behind))
        if given["controlnet"] is not None:
            residuals = given["controlnet"]
            image = image + residuals[controlnet_index(index, self.stacks[0], len(residuals), False)]
        return image, (text, text_attended) + text_behind

    def text_behind(self, index, unfinished, given):
        """See Model.text_behind."""
        cell = self.cell(index)
        return finite(behind_double(cell.txt_norm2, cell.txt_mlp, *unfinished))

    def unfinished_shapes(self, index, image, text):
        """See Model.unfinished_shapes."""
        temb = image[0], image[2]
        return (text, text) + 4 * (temb,)

    def guide(self, negative, positive, scale):
        """g |v_pos| / |g|, with g = v_neg + s (v_pos - v_neg), the norms those of each token."""
        guided = super().guide(negative, positive, scale)
        return guided * (token_norms(positive) / token_norms(guided))


def graph_inputs(transformer, arguments):
    """See base.py; the text is padded to a bucket, and its mask says so.

    Raises ValueError for a guidance, and as refuse_kwargs and padded_text do.
    """
    refuse_kwargs(arguments["attention_kwargs"])
    if arguments["guidance"] is not None:
        raise ValueError("guidance must be None; mindone's QwenImageTransformer2DModel takes it and fails")
    text, mask = arguments["encoder_hidden_states"], arguments["encoder_hidden_states_mask"]
    text, mask = padded_text(text, mask, arguments.get("longest", 0))
    rope, shapes = transformer.pos_embed, of_one(arguments["img_shapes"])
    settings = rope.theta, tuple(rope.axes_dim), rope.scale_rope, shapes, text.shape[1]
    return {
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "rotary": rotary_table(*settings),
        "controlnet_block_samples": arguments["controlnet_block_samples"],
    }


def of_one(shapes):
    """The shapes of one generation's pictures, of a batch's: each is a list of them, or a shape."""
    shapes = shapes[0] if isinstance(shapes, list) else shapes
    return tuple(map(tuple, shapes if isinstance(shapes, list) else [shapes]))


@lru_cache(maxsize=8)
def rotary_table(theta, axes, scale_rope, shapes, text_len):
    """Cosines and sines (T + S, head_dim) of the text's and then the pictures' tokens, each frequency twice in a row.

    Those of mindone 0.5.0's QwenEmbedRope: a token of a picture has its frame, row and column, the latter two counted
    from the middle with ``scale_rope``; every picture's first frame is 0. The text's positions follow the largest.

    Args:
        axes: so many of head_dim are for frame, row and column.
        shapes: frames, rows and columns of each picture.
    """
    positions, largest = [], 0
    for frames, *sides in shapes:
        ranges = [np.arange(frames)] + [np.arange(side) - (side - side // 2) * scale_rope for side in sides]
        positions.append(np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3))
        largest = max(largest, *(side // 2 if scale_rope else side for side in sides))
    text = np.repeat(largest + np.arange(text_len)[:, None], 3, 1)
    return rotary_of(np.concatenate([text, *positions]), theta, axes)


def why_foreign(transformer):
    """Why this file cannot take a transformer's place, beside what every family asks; in words, None where it can."""
    for name, kind in {"pos_embed": QwenEmbedRope, "time_text_embed": QwenTimestepProjEmbeddings}.items():
        if replaced(getattr(transformer, name), kind, ("construct",)):
            return f"{name} {type(getattr(transformer, name)).__name__} has a construct of its own"
    for index, block in enumerate(transformer.transformer_blocks):
        if not is_mindones(block, QwenImageTransformerBlock):
            return f"block {index} is not mindone's QwenImageTransformerBlock as it is there"
        if not is_mindones(block.attn, Attention):
            return f"block {index}'s attention is not mindone's as it is there"
        if not is_mindones(block.attn.processor, QwenDoubleStreamAttnProcessor2_0):
            return f"block {index} has the attention processor {type(block.attn.processor).__name__}"
    return None


QwenImageTransformer2DModel.cached_model = AtParsing(QwenImageModel)
