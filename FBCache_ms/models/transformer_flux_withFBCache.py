"""Flux.1: mindone's FluxTransformer2DModel as the cache sees it, with First-Block Cache and TaylorSeer in it."""

from mindone.diffusers import FluxTransformer2DModel
from mindone.diffusers.models.attention import FeedForward
from mindone.diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from mindone.diffusers.models.modeling_outputs import Transformer2DModelOutput
from mindone.diffusers.models.normalization import AdaLayerNormZero
from mindone.diffusers.models.transformers.transformer_flux import (
    GELU,
    FluxIPAdapterAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from mindone.diffusers.utils import logging
from mindone.peft.tuners.lora.layer import Linear as LoraLinear

import mindspore as ms
from mindspore import mint, ops

from ..cache.loop import DenoiseLoop
from ..cache.step import cached_call
from ..runtime.device import graph_mode
from . import flux_costs, kernels
from .base import Model
from .blocks import behind_attention, behind_double, controlnet_index, finite, input_or_none, with_tokens
from .gathered import Gathered
from .mindones import AtParsing, is_mindones, replaced
from .quantized import Int8Linear, Int8WeightOnlyLinear

logger = logging.get_logger(__name__)

KIND, COSTS, CONSTANTS = FluxTransformer2DModel, flux_costs, ("controlnet_blocks_repeat",)
BY_BRANCH = ("encoder_hidden_states", "pooled_projections", "joint_attention_kwargs")
BY_TOKEN = {
    "encoder_hidden_states": ("text", -2),
    "txt_ids": ("text", -2),
    "img_ids": ("image", -2),
    "controlnet_block_samples": ("image", 1),
    "controlnet_single_block_samples": ("image", 1),
}
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")


@ms.jit_class
class FluxModel(Model):
    """A FluxTransformer2DModel.

    ``given`` holds "temb", the modulation vector (B, D); "rotary", two of (T + S, head_dim); "attention", the keyword
    arguments of attention, or None; and "controlnet" and "controlnet_single", a ControlNet's residuals for either
    stack, or None, with "in_turn", whether the former are taken in turn; and "places", for each block where its weights
    lie, or None.
    """

    def prepare(self, inputs, constants, dtype):
        """See Model.prepare."""
        transformer, text_ids, image_ids = self.transformer, inputs["txt_ids"], inputs["img_ids"]
        text, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
        embedder, guidance = transformer.time_text_embed, input_or_none(inputs, "guidance")
        context = transformer.context_embedder(text.reshape((-1,) + text.shape[-2:]))
        text_ids = text_ids[0] if text_ids.ndim == 3 else text_ids
        image_ids = image_ids[0] if image_ids.ndim == 3 else image_ids
        rotary = transformer.pos_embed(mint.cat((text_ids, image_ids), dim=0))
        cells = tuple([self.cell(index) for index in range(sum(self.stacks))])
        if guidance is not None:
            sinusoids = self.times(guidance, dtype)
            guidance = embedder.guidance_embedder(sinusoids.to(pooled.dtype))
        prompt = embedder.text_embedder(pooled.reshape((-1, pooled.shape[-1])))
        attention = attention_arguments(transformer, input_or_none(inputs, "joint_attention_kwargs"))
        branch = {
            "text": context.reshape(text.shape[:-1] + context.shape[-1:]),
            "prompt": prompt.reshape(pooled.shape[:-1] + prompt.shape[-1:]),
            "attention": attention,
        }
        return branch, {
            "rotary": rotary,
            "guidance": guidance,
            "controlnet": input_or_none(inputs, "controlnet_block_samples"),
            "controlnet_single": input_or_none(inputs, "controlnet_single_block_samples"),
            "in_turn": constants is not None and constants["controlnet_blocks_repeat"],
            "places": kernels.places(cells, attention, dtype),
        }

    def hands_over_blocks(self, common):
        """See Model.hands_over_blocks."""
        for places in common["places"]:
            if places is None:
                return True
        return False

    def times(self, timesteps, dtype):
        """The sinusoids (N, 256) of timesteps (N,) in [0, 1], or of guidance scales."""
        return self.transformer.time_text_embed.time_proj(timesteps.to(dtype) * 1000)

    def condition(self, time, branch, common):
        """See Model.condition; the modulation vector is the sum of what time, guidance and prompt give."""
        prompt = branch["prompt"]
        temb = self.transformer.time_text_embed.timestep_embedder(time.to(prompt.dtype))
        if common["guidance"] is not None:
            temb = temb + common["guidance"]
        return branch["text"], {
            "temb": temb + prompt,
            "rotary": common["rotary"],
            "attention": branch["attention"],
            "controlnet": common["controlnet"],
            "controlnet_single": common["controlnet_single"],
            "in_turn": common["in_turn"],
            "places": common["places"],
        }

    def embed(self, latents):
        """See Model.embed."""
        return self.transformer.x_embedder(latents)

    def block(self, index, image, text, given):
        """See Model.block."""
        cell, places = self.cell(index), given["places"][index]
        text, image = whole_block(cell, image, text, given["temb"], given["rotary"], given["attention"], places)
        return self.controlled(index, image, given), text

    def controlled(self, index, image, given):
        """The image stream behind block number ``index``, with a ControlNet's residual for it if there is one."""
        doubles, singles = self.stacks
        residuals, blocks, in_turn = given["controlnet"], doubles, given["in_turn"]
        if index >= doubles:
            residuals, blocks, in_turn, index = given["controlnet_single"], singles, False, index - doubles
        if residuals is not None:
            image = image + residuals[controlnet_index(index, blocks, len(residuals), in_turn)]
        return image

    def head(self, image, given):
        """See Model.head."""
        return self.transformer.proj_out(self.transformer.norm_out(image, given["temb"]))

    def modulated(self, image, given):
        """See Model.modulated."""
        return self.transformer.transformer_blocks[0].norm1(image, emb=given["temb"])[0]

    def divides(self, index):
        """See Model.divides; a block of the user's own is run as it is."""
        return getattr(self.cell(index), "is_divisible", False)

    def divided_block(self, index, image, text, given):
        """See Model.divided_block."""
        cell, temb, rotary, attention = self.cell(index), given["temb"], given["rotary"], given["attention"] or {}
        if index < self.stacks[0]:
            places = given["places"][index]
            image, unfinished = divided_double(cell, image, text, temb, rotary, attention, places)
        else:
            image, unfinished = divided_single(cell, image, text, temb, rotary, attention)
        return self.controlled(index, image, given), unfinished

    def text_behind(self, index, unfinished, given):
        """See Model.text_behind."""
        if index < self.stacks[0]:
            return text_behind_double(self.cell(index), unfinished, given["places"][index])
        return behind_single(self.cell(index), *unfinished)

    def unfinished_shapes(self, index, image, text):
        """See Model.unfinished_shapes."""
        temb = image[0], image[2]
        return (text, text) + 4 * (temb,) if index < self.stacks[0] else (text, text, text, temb)

    def recorded_block(self, index, image, text, given):
        """See Model.recorded_block."""
        recorded = recorded_double if index < self.stacks[0] else recorded_single
        attention = given["attention"] or {}
        image, text, kept = recorded(self.cell(index), image, text, given["temb"], given["rotary"], attention)
        return self.controlled(index, image, given), text, kept

    def refreshed_block(self, index, image, text, given, kept, chosen):
        """See Model.refreshed_block."""
        refreshed = refreshed_double if index < self.stacks[0] else refreshed_single
        image, text, added = refreshed(self.cell(index), image, text, given["temb"], kept, chosen)
        return self.controlled(index, image, given), text, added


def attention_arguments(transformer, attention_kwargs):
    """joint_attention_kwargs as attention takes them, an IP adapter's image embeddings projected.

    Raises RuntimeError where they carry a LoRA "scale", which has to be set before.
    """
    if attention_kwargs is not None and "scale" in attention_kwargs:
        raise RuntimeError("set the LoRA scale with scale_lora_layers before the call, not in joint_attention_kwargs")
    if attention_kwargs is not None and "ip_adapter_image_embeds" in attention_kwargs:
        return {"ip_hidden_states": transformer.encoder_hid_proj(attention_kwargs["ip_adapter_image_embeds"])}
    return attention_kwargs


def is_divisible_double(cell):
    """Whether a double block runs divided_double's equations."""
    return is_mindones(cell, FluxTransformerBlock)


def is_divisible_single(cell):
    """Whether a single block runs divided_single's equations, and layers that see each token by itself."""
    if not is_mindones(cell, FluxSingleTransformerBlock):
        return False
    return is_by_token(cell.proj_mlp) and is_mindones(cell.act_mlp, GELU) and is_by_token(cell.proj_out)


def is_by_token(layer):
    """Whether a layer is a linear one, with or without adapters, quantised or not."""
    if is_mindones(layer, LoraLinear):
        return is_by_token(layer.base_layer)
    return any(is_mindones(layer, kind) for kind in (mint.nn.Linear, Int8WeightOnlyLinear, Int8Linear))


FluxTransformerBlock.is_divisible = AtParsing(is_divisible_double)
FluxSingleTransformerBlock.is_divisible = AtParsing(is_divisible_single)
FluxTransformer2DModel.cached_model = AtParsing(FluxModel)


def whole_block(cell, image, text, temb, rotary, attention_kwargs, places):
    """A block, by a device's kernel where there is one that does it: both streams, text first."""
    by_kernel = kernels.whole_block(cell, image, text, temb, rotary, attention_kwargs, places)
    if by_kernel is not None:
        return by_kernel
    return cell(
        hidden_states=image,
        encoder_hidden_states=text,
        temb=temb,
        image_rotary_emb=rotary,
        joint_attention_kwargs=attention_kwargs,
    )


def divided_double(cell, image, text, temb, rotary, attention_kwargs, places=None):
    """A double block, divided, by a device's kernel where there is one that does it."""
    by_kernel = kernels.divided_double(cell, image, text, temb, rotary, attention_kwargs, places)
    if by_kernel is not None:
        return by_kernel
    return double_equations(cell, image, text, temb, rotary, attention_kwargs)


def double_equations(cell, image, text, temb, rotary, attention_kwargs):
    """A double block, divided; the equations are those of mindone 0.5.0's FluxTransformerBlock."""
    normed, gate, shift, scale, mlp_gate = cell.norm1(image, emb=temb)
    text_normed, text_gate, text_shift, text_scale, text_mlp_gate = cell.norm1_context(text, emb=temb)
    attended = cell.attn(
        hidden_states=normed, encoder_hidden_states=text_normed, image_rotary_emb=rotary, **attention_kwargs
    )
    image = behind_double(cell.norm2, cell.ff, image, attended[0], gate, shift, scale, mlp_gate)
    if len(attended) == 3:
        image = image + attended[2]
    return image, (text, attended[1], text_gate, text_shift, text_scale, text_mlp_gate)


def divided_single(cell, image, text, temb, rotary, attention_kwargs):
    """A single block, divided; the equations are those of mindone 0.5.0's FluxSingleTransformerBlock."""
    text_len = text.shape[1]
    normed, gate = cell.norm(mint.cat((text, image), dim=1), emb=temb)
    attended = cell.attn(hidden_states=normed, image_rotary_emb=rotary, **attention_kwargs)
    image = behind_single(cell, image, normed[:, text_len:], attended[:, text_len:], gate)
    return image, (text, normed[:, :text_len], attended[:, :text_len], gate)


def text_behind_double(cell, unfinished, places):
    """A double block's text stream, of which divided_double has done the rest."""
    return finite(behind_double(cell.norm2_context, cell.ff_context, *unfinished, places=places))


def behind_single(cell, stream, normed, attended, gate):
    """A single block's stream: x + gate W (a, mlp(norm(x)))."""
    mlp = cell.act_mlp(cell.proj_mlp(normed))
    return finite(stream + gate.unsqueeze(1) * cell.proj_out(mint.cat((attended, mlp), dim=2)))


def recorded_double(cell, image, text, temb, rotary, attention_kwargs):
    """A double block, and what attention and the MLP give each stream."""
    normed, *vectors = cell.norm1(image, emb=temb)
    text_normed, *text_vectors = cell.norm1_context(text, emb=temb)
    attended, text_attended = cell.attn(
        hidden_states=normed, encoder_hidden_states=text_normed, image_rotary_emb=rotary, **attention_kwargs
    )
    text, text_added = behind_attention(cell.norm2_context, cell.ff_context, text, text_attended, *text_vectors)
    image, added = behind_attention(cell.norm2, cell.ff, image, attended, *vectors)
    return image, finite(text), ((text_attended, text_added), (attended, added))


def refreshed_double(cell, image, text, temb, kept, chosen):
    """A double block with its attention as it was, and what the MLPs give, of chosen tokens anew."""
    _, *vectors = cell.norm1(image, emb=temb)
    _, *text_vectors = cell.norm1_context(text, emb=temb)
    text, text_added = behind_attention(
        cell.norm2_context, cell.ff_context, text, kept[0][0], *text_vectors, kept[0][1], chosen[0]
    )
    image, added = behind_attention(cell.norm2, cell.ff, image, kept[1][0], *vectors, kept[1][1], chosen[1])
    return image, finite(text), (text_added, added)


def recorded_single(cell, image, text, temb, rotary, attention_kwargs):
    """A single block, and what attention and the block give the one stream."""
    text_len, stream = text.shape[1], mint.cat((text, image), dim=1)
    normed, gate = cell.norm(stream, emb=temb)
    attended = cell.attn(hidden_states=normed, image_rotary_emb=rotary, **attention_kwargs)
    added = cell.proj_out(mint.cat((attended, cell.act_mlp(cell.proj_mlp(normed))), dim=2))
    stream = finite(stream + gate.unsqueeze(1) * added)
    return stream[:, text_len:], stream[:, :text_len], ((attended, added),)


def refreshed_single(cell, image, text, temb, kept, chosen):
    """A single block with its attention as it was, and what it gives the one stream, of chosen tokens anew."""
    text_len, stream, tokens = text.shape[1], mint.cat((text, image), dim=1), chosen[0]
    attended, added = kept[0]
    normed, gate = cell.norm(ops.gather(stream, tokens, 1), emb=temb)
    mlp = cell.act_mlp(cell.proj_mlp(normed))
    added = with_tokens(added, tokens, cell.proj_out(mint.cat((ops.gather(attended, tokens, 1), mlp), dim=2)))
    stream = finite(stream + gate.unsqueeze(1) * added)
    return stream[:, text_len:], stream[:, :text_len], (added,)


ATTENTION_INPUTS = ("attention_mask", "ip_hidden_states", "ip_adapter_masks")
"""What mindone's FluxAttention takes of joint_attention_kwargs."""


def graph_inputs(transformer, arguments):
    """See base.py; raises ValueError as refuse_stg and attention_inputs do."""
    attention_kwargs = arguments["joint_attention_kwargs"]
    refuse_stg(attention_kwargs)
    # All texts of a generation are of one length.
    inputs = {name: value for name, value in arguments.items() if name != "longest"}
    return {**inputs, "joint_attention_kwargs": attention_inputs(transformer, attention_kwargs)}


def attention_inputs(transformer, attention_kwargs):
    """joint_attention_kwargs as the blocks take them, IP adapters' image embeddings projected; None for none.

    Those that mindone's FluxAttention would ignore with a warning are left out with one. Raises ValueError where an IP
    adapter is loaded and given no image, which mindone stumbles over.
    """
    taken = dict(attention_kwargs or {})
    image_prompted = [
        each for each in transformer.attn_processors.values() if isinstance(each, FluxIPAdapterAttnProcessor)
    ]
    if image_prompted and "ip_adapter_image_embeds" not in taken and "ip_hidden_states" not in taken:
        raise ValueError(
            "an IP adapter is loaded and no image is given for it; give ip_adapter_image or ip_adapter_image_embeds"
        )
    if "ip_adapter_image_embeds" in taken:
        with graph_mode(False):
            taken["ip_hidden_states"] = transformer.encoder_hid_proj(list(taken.pop("ip_adapter_image_embeds")))
    ignored = [name for name in taken if name not in ATTENTION_INPUTS]
    if ignored:
        logger.warning(f"joint_attention_kwargs {', '.join(ignored)} are not known to Flux's attention: ignored")
    for processor in image_prompted:
        # mindone's has a __call__ alone, where a graph looks for construct.
        vars(processor).setdefault("construct", processor.__call__)
    return {name: taken[name] for name in ATTENTION_INPUTS if name in taken} or None


def refuse_stg(attention_kwargs):
    """Raises ValueError if spatiotemporal guidance is asked for: its perturbed calls would mix with the others."""
    if any(name.startswith(("stg", "skip_layer")) for name in attention_kwargs or ()):
        raise ValueError("STG is not supported with FBCache yet")


def why_foreign(transformer):
    """Why this file cannot take a transformer's place, beside what every family asks; in words, None where it can."""
    embedder = transformer.time_text_embed
    kinds = CombinedTimestepTextProjEmbeddings, CombinedTimestepGuidanceTextProjEmbeddings
    if all(replaced(embedder, kind, ("construct",)) for kind in kinds):
        return f"time_text_embed {type(embedder).__name__} has a construct of its own"
    return None


def why_not_probed(transformer, probe):
    """What keeps a rule's probe from a transformer, in words; None if nothing does."""
    if probe != "modulated":
        return None
    if len(transformer.transformer_blocks) == 0:
        return "the transformer has no double block"
    block = transformer.transformer_blocks[0]
    norm = getattr(block, "norm1", None)
    if is_mindones(norm, AdaLayerNormZero):
        return None
    if norm is None:
        return f"the first block, {type(block).__name__}, has no norm1"
    return f"the first block's norm1, {type(norm).__name__}, is not mindone's AdaLayerNormZero as it is there"


def why_not_refreshed(transformer):
    """What keeps chosen tokens of a transformer from being refreshed, in words; None if nothing does."""
    for cell in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        layers = [getattr(cell, name) for name in ("ff", "ff_context") if hasattr(cell, name)]
        if not getattr(cell, "is_divisible", False) or not all(is_mindones(layer, FeedForward) for layer in layers):
            return f"block {type(cell).__name__} is not mindone's as it is there"
    for processor in transformer.attn_processors.values():
        if isinstance(processor, FluxIPAdapterAttnProcessor):
            return "what an IP adapter adds is not kept"
        if isinstance(processor, Gathered):
            return "several devices share a picture's tokens"
    return None


class FluxDenoiseLoop(DenoiseLoop):
    """The whole denoise loop of Flux, or a piece of it, in one call; DenoiseLoop, with the inputs one by one.

    Args:
        transformer: mindone's FluxTransformer2DModel.
        cache_context: a CacheContext for the latents' shape, with two branches for true CFG.
    """

    def __init__(self, transformer, cache_context):
        super().__init__(FluxModel(transformer), cache_context)

    def construct(
        self,
        latents,
        prompt_embeds,
        pooled_prompt_embeds,
        text_ids,
        latent_image_ids,
        guidance,
        true_cfg_scale,
        timesteps,
        sigmas,
        start,
        stop,
        limits,
        coordinates,
        numbers,
        attention_kwargs=None,
    ):
        """The latents after steps start to stop - 1; what is not named here is as in DenoiseLoop.denoise.

        Args:
            prompt_embeds, pooled_prompt_embeds: (B, T, E) and (B, P) a branch, stacked on a leading axis.
            text_ids, latent_image_ids: (T, 3), (S, 3).
            guidance: (B,), or None for a model without guidance embedding.
            attention_kwargs: what attention gets beside the streams, tensors and tuples of them by name, a branch each
                on a leading axis; None for nothing.
        """
        inputs = {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled_prompt_embeds,
            "txt_ids": text_ids,
            "img_ids": latent_image_ids,
            "guidance": guidance,
            "joint_attention_kwargs": attention_kwargs,
        }
        return self.denoise(
            latents, inputs, true_cfg_scale, timesteps, sigmas, start, stop, limits, coordinates, numbers
        )


def FBCache_transformer_construct(
    self,
    hidden_states: ms.Tensor,
    encoder_hidden_states: ms.Tensor = None,
    pooled_projections: ms.Tensor = None,
    timestep: ms.Tensor = None,
    img_ids: ms.Tensor = None,
    txt_ids: ms.Tensor = None,
    guidance: ms.Tensor = None,
    joint_attention_kwargs=None,
    controlnet_block_samples=None,
    controlnet_single_block_samples=None,
    return_dict: bool = False,
    controlnet_blocks_repeat: bool = False,
):
    """FluxTransformer2DModel.construct with the cache in it; takes and returns what mindone's takes and returns.

    Bind it with ``transformer.construct = MethodType(FBCache_transformer_construct, transformer)`` and set
    ``transformer.cache_context`` to a CacheContext for the latents' shape, before its first call: a compiled graph
    does not see that either was replaced (``transformer.compile_cache.clear()`` makes it look again), while
    ``cache_context.configure(config)`` is always seen. A generation starts where the timestep rises. A caller with
    true CFG has to enter ``transformer.cache_context("cond")`` and ``("uncond")`` around its calls, as mindone's
    FluxPipeline does.

    Raises:
        ValueError: the latents' shape is not the CacheContext's.
        RuntimeError: joint_attention_kwargs carries a LoRA "scale", which has to be set before.
    """
    inputs = {
        "encoder_hidden_states": encoder_hidden_states,
        "pooled_projections": pooled_projections,
        "img_ids": img_ids,
        "txt_ids": txt_ids,
        "guidance": guidance,
        "joint_attention_kwargs": joint_attention_kwargs,
        "controlnet_block_samples": controlnet_block_samples,
        "controlnet_single_block_samples": controlnet_single_block_samples,
    }
    constants = {"controlnet_blocks_repeat": controlnet_blocks_repeat}
    output = cached_call(self.cached_model, self.cache_context, hidden_states, timestep, inputs, constants)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)
