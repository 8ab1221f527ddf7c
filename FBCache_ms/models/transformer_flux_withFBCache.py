"""One denoise step of Flux with First-Block Cache and TaylorSeer, on mindone's FluxTransformer2DModel."""

from mindone.diffusers.models.modeling_outputs import Transformer2DModelOutput
from mindone.diffusers.models.normalization import AdaLayerNormZero
from mindone.diffusers.models.transformers.transformer_flux import (
    GELU,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from mindone.peft.tuners.lora.layer import Linear as LoraLinear

import mindspore as ms
from mindspore import mint

from . import kernels
from .mindones import AtParsing, is_mindones


def embed_condition(transformer, encoder_hidden_states, txt_ids, img_ids):
    """What no step changes: the text stream (B, T, D) and the rotary table, two of (T + S, head_dim)."""
    if txt_ids.ndim == 3:
        txt_ids = txt_ids[0]
    if img_ids.ndim == 3:
        img_ids = img_ids[0]
    rotary = transformer.pos_embed(mint.cat((txt_ids, img_ids), dim=0))
    return transformer.context_embedder(encoder_hidden_states), rotary


def project_time(transformer, timestep, dtype):
    """The sinusoids (N, 256) of timesteps (N,) in [0, 1], or of guidance scales."""
    return transformer.time_text_embed.time_proj(timestep.to(dtype) * 1000)


def embed_prompt(transformer, guidance, pooled_projections, dtype):
    """What no step changes of the modulation vector: its terms (B, D) of the guidance (B,), if any, and the prompt."""
    embedder, terms = transformer.time_text_embed, ()
    if guidance is not None:
        projected = project_time(transformer, guidance, dtype).to(pooled_projections.dtype)
        terms = (embedder.guidance_embedder(projected),)
    return terms + (embedder.text_embedder(pooled_projections),)


def embed_time(transformer, projected, terms):
    """The modulation vector (B, D) of a timestep's sinusoids (B, 256) and of embed_prompt's terms."""
    temb = transformer.time_text_embed.timestep_embedder(projected.to(terms[-1].dtype))
    for term in terms:
        temb = temb + term
    return temb


def stacks(transformer):
    """How many double and how many single blocks."""
    return len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)


def controlnet_index(index, blocks, samples, repeat):
    """Which of a ControlNet's residuals block number ``index`` gets: spread over the blocks, or in turn."""
    if repeat:
        return index % samples
    return index // ((blocks + samples - 1) // samples)


def block(transformer, index, image, text, given):
    """Block number ``index``, doubles and singles counted together: the image and the text stream behind it.

    ``given`` is what every block gets: the modulation vector, the rotary table, the attention's keyword arguments, the
    ControlNet's residuals for the double and for the single blocks, and whether the former are taken in turn.
    """
    doubles = stacks(transformer)[0]
    if index < doubles:
        cell = transformer.transformer_blocks[index]
    else:
        cell = transformer.single_transformer_blocks[index - doubles]
    text, image = cell(
        hidden_states=image,
        encoder_hidden_states=text,
        temb=given[0],
        image_rotary_emb=given[1],
        joint_attention_kwargs=given[2],
    )
    return controlled(transformer, index, image, given), text


def controlled(transformer, index, image, given):
    """The image stream behind block number ``index``, with a ControlNet's residual for that block if there is one."""
    doubles, singles = stacks(transformer)
    residuals, blocks, repeat = given[3], doubles, given[5]
    if index >= doubles:
        residuals, blocks, repeat, index = given[4], singles, False, index - doubles
    if residuals is not None:
        image = image + residuals[controlnet_index(index, blocks, len(residuals), repeat)]
    return image


def is_divisible_double(cell):
    """Whether a double block runs divided_double's equations."""
    return is_mindones(cell, FluxTransformerBlock)


def is_divisible_single(cell):
    """Whether a single block runs divided_single's equations, and layers that see each token by itself."""
    if not is_mindones(cell, FluxSingleTransformerBlock):
        return False
    return is_by_token(cell.proj_mlp) and is_mindones(cell.act_mlp, GELU) and is_by_token(cell.proj_out)


def is_by_token(layer):
    """Whether a layer is a linear one, with or without adapters."""
    if is_mindones(layer, LoraLinear):
        return is_by_token(layer.base_layer)
    return is_mindones(layer, mint.nn.Linear)


FluxTransformerBlock.is_divisible = AtParsing(is_divisible_double)
FluxSingleTransformerBlock.is_divisible = AtParsing(is_divisible_single)


def divided_block(transformer, index, image, text, given):
    """Block number ``index`` without what only the text stream behind it needs: the image stream, and what finishes it.

    The latter is text_behind's argument.
    """
    doubles, attention_kwargs = stacks(transformer)[0], given[2] or {}
    if index < doubles:
        cell = transformer.transformer_blocks[index]
        image, unfinished = divided_double(cell, image, text, given[0], given[1], attention_kwargs)
    else:
        cell = transformer.single_transformer_blocks[index - doubles]
        image, unfinished = divided_single(cell, image, text, given[0], given[1], attention_kwargs)
    return controlled(transformer, index, image, given), unfinished


def divided_double(cell, image, text, temb, rotary, attention_kwargs):
    """A double block, divided, by a device's kernel where there is one that does it."""
    by_kernel = kernels.divided_double(cell, image, text, temb, rotary, attention_kwargs)
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


def text_behind(transformer, index, unfinished):
    """The text stream behind block number ``index``, of which divided_block has done the rest."""
    doubles = stacks(transformer)[0]
    if index >= doubles:
        return behind_single(transformer.single_transformer_blocks[index - doubles], *unfinished)
    return text_behind_double(transformer.transformer_blocks[index], unfinished)


def text_behind_double(cell, unfinished):
    """A double block's text stream, of which divided_double has done the rest."""
    return finite(behind_double(cell.norm2_context, cell.ff_context, *unfinished))


def behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """A double block's stream behind attention, by a device's kernel where there is one that does it."""
    by_kernel = kernels.behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate)
    if by_kernel is not None:
        return by_kernel
    return behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate)


def behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """A double block's stream: y = x + gate a, then y + mlp_gate ff((1 + scale) norm(y) + shift)."""
    stream = stream + gate.unsqueeze(1) * attended
    modulated = norm(stream) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return stream + mlp_gate.unsqueeze(1) * feed_forward(modulated)


def behind_single(cell, stream, normed, attended, gate):
    """A single block's stream: x + gate W (a, mlp(norm(x)))."""
    mlp = cell.act_mlp(cell.proj_mlp(normed))
    return finite(stream + gate.unsqueeze(1) * cell.proj_out(mint.cat((attended, mlp), dim=2)))


def finite(stream):
    """A stream of float16 within what that can hold."""
    return stream.clip(-65504, 65504) if stream.dtype == ms.float16 else stream


def run_blocks(transformer, start, stop, image, text, given):
    """Blocks start to stop - 1."""
    for index in range(start, stop):
        image, text = block(transformer, index, image, text, given)
    return image, text


def probed(gate, stream):
    """The part of a stream, (image, text), that a gate's rules look at: (B, S, D), or (B, T + S, D) with the text."""
    image, text = stream
    whole = mint.cat((text, image), dim=1) if gate.probes_text else image
    return whole[..., :: gate.factor] if gate.factor > 1 else whole


def residual(transformer, gate, before, now, temb):
    """What the blocks between ``before`` and ``now`` added."""
    return probed(gate, now) - probed(gate, before)


def hidden(transformer, gate, before, now, temb):
    """The stream behind those blocks."""
    return probed(gate, now)


def modulated(transformer, gate, before, now, temb):
    """The first block's modulated input, before any block has run."""
    return transformer.transformer_blocks[0].norm1(before[0], emb=temb)[0]


def latents(transformer, gate, before, now, temb):
    """The latents, of as many channels as the velocity has, before the embedding."""
    return now[0][..., : gate.channels]


def why_not_probed(transformer, probe):
    """What keeps a rule's probe from a transformer, in words; None if nothing does."""
    if probe != "modulated":
        return None
    if stacks(transformer)[0] == 0:
        return "the transformer has no double block"
    block = transformer.transformer_blocks[0]
    norm = getattr(block, "norm1", None)
    if is_mindones(norm, AdaLayerNormZero):
        return None
    if norm is None:
        return f"the first block, {type(block).__name__}, has no norm1"
    return f"the first block's norm1, {type(norm).__name__}, is not mindone's AdaLayerNormZero as it is there"


PROBES = {"residual": residual, "hidden": hidden, "modulated": modulated, "latents": latents}


def divides(transformer, gate, start, first):
    """Whether block number first - 1, before a gate's span, is divided: only the span needs the text stream behind.

    A block of the user's own is run as it is.
    """
    if start >= first or gate.needs_text or gate.probes_text:
        return False
    doubles = stacks(transformer)[0]
    if first > doubles:
        return getattr(transformer.single_transformer_blocks[first - 1 - doubles], "is_divisible", False)
    return getattr(transformer.transformer_blocks[first - 1], "is_divisible", False)


def approach(transformer, gate, start, image, text, given):
    """Blocks ``start`` up to a gate's span: the image and the text stream there, what the gate looks at, and last what
    text_behind takes where the block before the span is divided.
    """
    first, before, unfinished = gate.span(*stacks(transformer))[0], (image, text), ()
    divided = divides(transformer, gate, start, first)
    image, text = run_blocks(transformer, start, first - 1 if divided else first, image, text, given)
    if divided:
        image, unfinished = divided_block(transformer, first - 1, image, text, given)
    now = image, text
    seen = tuple([PROBES[name](transformer, gate, before, now, given[0]) for name in gate.seen])
    return (image, text) + seen + unfinished


def reached_shapes(transformer, gate, image, text, temb):
    """The shapes of what approach returns from the first block on, from those of streams and modulation vector."""
    doubles, first = stacks(transformer)[0], gate.span(*stacks(transformer))[0]
    unfinished = (text, text, text, temb) if first > doubles else (text, text, temb, temb, temb, temb)
    return (image, text) + gate.seen_shapes + (unfinished if divides(transformer, gate, 0, first) else ())


def enter(transformer, cache, latents):
    """The image stream that the first block gets, or the latents where a gate is asked before the embedding."""
    return latents if cache.whole_model else transformer.x_embedder(latents)


def head(transformer, image, given):
    """The velocity (B, S, C) of the image stream behind the last block."""
    return transformer.proj_out(transformer.norm_out(image, given[0]))


def before_span(gate, image):
    """What a gate's span adds to: the image stream, or the latents, of as many channels as the velocity has."""
    return image[..., : gate.channels] if gate.whole_model else image


def reuse(gate, reached):
    """Both streams behind a gate's span, forecast from where ``approach`` has come to."""
    image, text = before_span(gate, reached[0]), reached[1]
    gate.tallies.hit()
    image_residual, text_residual = gate.forecast(reached[2:])
    if gate.needs_text:
        text = text + text_residual.to(text.dtype)
    return image + image_residual.to(image.dtype), text


def compute(transformer, gate, reached, given):
    """Both streams behind a gate's span, from where ``approach`` has come to; the gate keeps what the span adds."""
    first, last = gate.span(*stacks(transformer))
    image, text = reached[:2]
    unfinished = reached[2 + len(gate.seen) :]
    if not gate.inner:
        gate.tallies.miss()
    if len(unfinished) > 0:
        text = text_behind(transformer, first - 1, unfinished)
    before = before_span(gate, image)
    if gate.whole_model:
        image = transformer.x_embedder(image)
    behind, text_behind_span = run_gates(transformer, gate.inner, first, last, image, text, given)
    if gate.whole_model:
        behind = head(transformer, behind, given)
    gate.store(reached[2:], before, behind, text_behind_span - text)
    return behind, text_behind_span


def run_gates(transformer, gates, start, stop, image, text, given):
    """Blocks start to stop - 1, each gate deciding over its span; the blocks outside the spans always run."""
    for gate in gates:
        reached = approach(transformer, gate, start, image, text, given)
        if gate.decide(reached[2:]):
            image, text = reuse(gate, reached)
        else:
            image, text = compute(transformer, gate, reached, given)
        start = gate.span(*stacks(transformer))[1]
    return run_blocks(transformer, start, stop, image, text, given)


def velocity(transformer, cache, start, image, text, given):
    """The velocity (B, S, C) from the streams that block number ``start`` gets, through the blocks from there on.

    Behind a span that is the whole model the image stream is the velocity.
    """
    image = run_blocks(transformer, start, sum(stacks(transformer)), image, text, given)[0]
    cache.end_step()
    return image if cache.whole_model else head(transformer, image, given)


def cached_step(transformer, cache, hidden_states, context, given):
    """The velocity (B, S, C) at latents of that shape, through those blocks that the cache's gates let run."""
    blocks, image = sum(stacks(transformer)), enter(transformer, cache, hidden_states)
    image, text = run_gates(transformer, cache.gates, 0, blocks, image, context, given)
    return velocity(transformer, cache, blocks, image, text, given)


def cached_forward(
    transformer,
    cache,
    hidden_states,
    encoder_hidden_states=None,
    pooled_projections=None,
    timestep=None,
    img_ids=None,
    txt_ids=None,
    guidance=None,
    joint_attention_kwargs=None,
    controlnet_block_samples=None,
    controlnet_single_block_samples=None,
    return_dict=False,
    controlnet_blocks_repeat=False,
):
    """FluxTransformer2DModel.construct of a transformer with a CacheContext in it.

    Raises:
        ValueError: the latents' shape is not the CacheContext's.
        RuntimeError: joint_attention_kwargs carries a LoRA "scale", which has to be set before.
    """
    if (hidden_states.shape[0], hidden_states.shape[1], transformer.inner_dim) != cache.shape:
        raise ValueError(
            f"Invalid cache state: the latents are {hidden_states.shape[0]} x {hidden_states.shape[1]} tokens of width "
            f"{transformer.inner_dim}, the CacheContext is for {cache.shape}"
        )
    if joint_attention_kwargs is not None and "scale" in joint_attention_kwargs:
        raise RuntimeError("set the LoRA scale with scale_lora_layers before the call, not in joint_attention_kwargs")
    if joint_attention_kwargs is not None and "ip_adapter_image_embeds" in joint_attention_kwargs:
        joint_attention_kwargs = {
            "ip_hidden_states": transformer.encoder_hid_proj(joint_attention_kwargs["ip_adapter_image_embeds"])
        }
    cache.begin_step(timestep[0])
    context, rotary = embed_condition(transformer, encoder_hidden_states, txt_ids, img_ids)
    terms = embed_prompt(transformer, guidance, pooled_projections, hidden_states.dtype)
    temb = embed_time(transformer, project_time(transformer, timestep, hidden_states.dtype), terms)
    residuals = controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
    output = cached_step(transformer, cache, hidden_states, context, (temb, rotary, joint_attention_kwargs) + residuals)
    if not return_dict:
        return (output,)
    return Transformer2DModelOutput(sample=output)


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

    Raises ValueError and RuntimeError as cached_forward does.
    """
    return cached_forward(
        self,
        self.cache_context,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        guidance,
        joint_attention_kwargs,
        controlnet_block_samples,
        controlnet_single_block_samples,
        return_dict,
        controlnet_blocks_repeat,
    )
