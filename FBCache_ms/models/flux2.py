"""FLUX.2: mindone's Flux2Transformer2DModel as the cache sees it.

Its blocks run as they are. mindone 0.5.0 makes the rotary table in float64, which Ascend's operators do not take: here
the host makes it. The modulation is one for all blocks of a kind, made once a step.
"""

from functools import lru_cache

import numpy as np
from mindone.diffusers import Flux2Transformer2DModel
from mindone.diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2PosEmbed,
    Flux2TimestepGuidanceEmbeddings,
    Flux2TransformerBlock,
)

import mindspore as ms

from . import flux2_costs
from .base import Model
from .blocks import input_or_none, refuse_kwargs, rotary_of
from .mindones import AtParsing, is_mindones, replaced

KIND, COSTS, CONSTANTS = Flux2Transformer2DModel, flux2_costs, ()
BY_BRANCH = ("encoder_hidden_states",)
BY_TOKEN = {"encoder_hidden_states": ("text", -2), "rotary": ("both", 0), "moves": ("image", -2)}
MODULATION = ("_modulation",)


@ms.jit_class
class Flux2Model(Model):
    """A Flux2Transformer2DModel.

    ``given`` holds "temb", the modulation vector (B, D); "image", "text" and "single", what modulates the blocks'
    streams; "rotary", two of (T + S, head_dim); and "moves", (S, 1), zero for a token of a picture that the latents are
    drawn after, or None.
    """

    def prepare(self, inputs, constants, dtype):
        """See Model.prepare."""
        text, embedder = inputs["encoder_hidden_states"], self.transformer.time_guidance_embed
        embedded = self.transformer.context_embedder(text.reshape((-1,) + text.shape[-2:]))
        guidance = embedder.guidance_embedder(self.times(inputs["guidance"], dtype).to(dtype))
        branch = {"text": embedded.reshape(text.shape[:-1] + embedded.shape[-1:])}
        return branch, {
            "rotary": inputs["rotary"],
            "guidance": guidance,
            "moves": input_or_none(inputs, "moves"),
        }

    def times(self, timesteps, dtype):
        """The sinusoids (N, E) of timesteps (N,) in [0, 1], or of guidance scales."""
        return self.transformer.time_guidance_embed.time_proj(timesteps.to(dtype) * 1000)

    def condition(self, time, branch, common):
        """See Model.condition; the modulation vector is the sum of what time and guidance give."""
        text = branch["text"]
        temb = self.transformer.time_guidance_embed.timestep_embedder(time.to(text.dtype)) + common["guidance"]
        return text, self.modulation(temb, common)

    def modulation(self, temb, common):
        """``given`` from the modulation vector."""
        transformer = self.transformer
        return {
            "temb": temb,
            "image": transformer.double_stream_modulation_img(temb),
            "text": transformer.double_stream_modulation_txt(temb),
            "single": transformer.single_stream_modulation(temb)[0],
            "rotary": common["rotary"],
            "moves": common["moves"],
        }

    def embed(self, latents):
        """See Model.embed."""
        return self.transformer.x_embedder(latents)

    def block(self, index, image, text, given):
        """See Model.block."""
        if index < self.stacks[0]:
            text, image = self.cell(index)(
                hidden_states=image,
                encoder_hidden_states=text,
                temb_mod_params_img=given["image"],
                temb_mod_params_txt=given["text"],
                image_rotary_emb=given["rotary"],
            )
        else:
            text, image = self.cell(index)(
                hidden_states=image,
                encoder_hidden_states=text,
                temb_mod_params=given["single"],
                image_rotary_emb=given["rotary"],
                split_hidden_states=True,
            )
        return image, text

    def head(self, image, given):
        """See Model.head."""
        velocity = self.transformer.proj_out(self.transformer.norm_out(image, given["temb"]))
        return velocity if given["moves"] is None else velocity * given["moves"]

    def modulated(self, image, given):
        """See Model.modulated."""
        shift, scale, _ = given["image"][0]
        return (1 + scale) * self.transformer.transformer_blocks[0].norm1(image) + shift

    def resume(self, given, pending):
        """See Model.resume."""
        return self.modulation(pending["temb"], given)


def graph_inputs(transformer, arguments):
    """See base.py; of ``still`` tokens, last among the image's, the velocity is zero.

    Raises ValueError where there is no guidance, and as refuse_kwargs does."""
    refuse_kwargs(arguments["joint_attention_kwargs"])
    if arguments["guidance"] is None:
        raise ValueError("guidance is None; mindone's Flux2Transformer2DModel needs one")
    ids = [of_one(arguments[name]).asnumpy() for name in ("txt_ids", "img_ids")]
    rope, still = transformer.pos_embed, arguments.get("still")
    inputs = {
        "encoder_hidden_states": arguments["encoder_hidden_states"],
        "guidance": arguments["guidance"],
        "rotary": rotary_table(np.concatenate(ids).astype(np.float64).tobytes(), rope.theta, tuple(rope.axes_dim)),
    }
    if still is not None:
        stays, dtype = np.arange(len(ids[1])) >= len(ids[1]) - still.shape[1], still.dtype
        inputs["moves"] = ms.Tensor(~stays[:, None], dtype)
    return inputs


def of_one(ids):
    """The ids (N, 4) of one picture of a batch; those of all are equal."""
    return ids[0] if ids.ndim == 3 else ids


@lru_cache(maxsize=8)
def rotary_table(positions, theta, axes):
    """Cosines and sines (N, head_dim) of positions (N, 4), float64 as bytes, each frequency twice in a row.

    Those of mindone 0.5.0's Flux2PosEmbed; ``axes`` says how many of head_dim are for each position.
    """
    return rotary_of(np.frombuffer(positions).reshape(-1, len(axes)), theta, axes)


def why_foreign(transformer):
    """Why this file cannot take a transformer's place, beside what every family asks; in words, None where it can."""
    kinds = {
        "pos_embed": Flux2PosEmbed,
        "time_guidance_embed": Flux2TimestepGuidanceEmbeddings,
        "double_stream_modulation_img": Flux2Modulation,
        "double_stream_modulation_txt": Flux2Modulation,
        "single_stream_modulation": Flux2Modulation,
    }
    for name, kind in kinds.items():
        if replaced(getattr(transformer, name), kind, ("construct",)):
            return f"{name} {type(getattr(transformer, name)).__name__} has a construct of its own"
    return None


def why_not_probed(transformer, probe):
    """What keeps a rule's probe from a transformer, in words; None if nothing does."""
    if probe != "modulated" or is_mindones(transformer.transformer_blocks[0], Flux2TransformerBlock):
        return None
    return f"the first block, {type(transformer.transformer_blocks[0]).__name__}, is not mindone's as it is there"


Flux2Transformer2DModel.cached_model = AtParsing(Flux2Model)
