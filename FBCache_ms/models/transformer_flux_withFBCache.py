"""One denoise step of Flux with First-Block Cache and TaylorSeer, on mindone's FluxTransformer2DModel."""

from mindone.diffusers.models.modeling_outputs import Transformer2DModelOutput

import mindspore as ms
from mindspore import mint


def embed_condition(transformer, encoder_hidden_states, txt_ids, img_ids):
    """What no step changes: the text stream (B, T, D) and the rotary table, two of (T + S, head_dim)."""
    if txt_ids.ndim == 3:
        txt_ids = txt_ids[0]
    if img_ids.ndim == 3:
        img_ids = img_ids[0]
    rotary = transformer.pos_embed(mint.cat((txt_ids, img_ids), dim=0))
    return transformer.context_embedder(encoder_hidden_states), rotary


def embed_time(transformer, timestep, guidance, pooled_projections, dtype):
    """The modulation vector (B, D) of timestep and guidance, both (B,), in [0, 1] and in the user's units."""
    timestep = timestep.to(dtype) * 1000
    if guidance is None:
        return transformer.time_text_embed(timestep, pooled_projections)
    return transformer.time_text_embed(timestep, guidance.to(dtype) * 1000, pooled_projections)


def controlnet_index(index, blocks, samples, repeat):
    """Which of a ControlNet's residuals block number ``index`` gets: spread over the blocks, or in turn."""
    if repeat:
        return index % samples
    return index // ((blocks + samples - 1) // samples)


def double_block(transformer, index, hidden_states, context, temb, rotary, attention_kwargs, residuals, repeat):
    """Double-stream block ``index`` and the ControlNet residual that follows it: (image stream, text stream)."""
    context, hidden_states = transformer.transformer_blocks[index](
        hidden_states=hidden_states,
        encoder_hidden_states=context,
        temb=temb,
        image_rotary_emb=rotary,
        joint_attention_kwargs=attention_kwargs,
    )
    if residuals is not None:
        blocks = len(transformer.transformer_blocks)
        hidden_states = hidden_states + residuals[controlnet_index(index, blocks, len(residuals), repeat)]
    return hidden_states, context


def single_block(transformer, index, hidden_states, context, temb, rotary, attention_kwargs, residuals):
    """Single-stream block ``index`` and the ControlNet residual that follows it: (image stream, text stream)."""
    context, hidden_states = transformer.single_transformer_blocks[index](
        hidden_states=hidden_states,
        encoder_hidden_states=context,
        temb=temb,
        image_rotary_emb=rotary,
        joint_attention_kwargs=attention_kwargs,
    )
    if residuals is not None:
        blocks = len(transformer.single_transformer_blocks)
        hidden_states = hidden_states + residuals[controlnet_index(index, blocks, len(residuals), False)]
    return hidden_states, context


def cached_step(
    transformer,
    cache,
    hidden_states,
    context,
    temb,
    rotary,
    attention_kwargs=None,
    controlnet_residuals=None,
    controlnet_single_residuals=None,
    controlnet_repeat=False,
):
    """The velocity (B, S, C) at latents of that shape: the first block always, the others unless they are reused."""
    before = transformer.x_embedder(hidden_states)
    hidden_states, context = double_block(
        transformer, 0, before, context, temb, rotary, attention_kwargs, controlnet_residuals, controlnet_repeat
    )
    probe = hidden_states - before
    reuse, difference = cache.decide(probe)
    if reuse:
        hidden_states = hidden_states + cache.forecast().to(hidden_states.dtype)
    else:
        first = hidden_states
        for index in range(1, len(transformer.transformer_blocks)):
            hidden_states, context = double_block(
                transformer,
                index,
                hidden_states,
                context,
                temb,
                rotary,
                attention_kwargs,
                controlnet_residuals,
                controlnet_repeat,
            )
        for index in range(len(transformer.single_transformer_blocks)):
            hidden_states, context = single_block(
                transformer, index, hidden_states, context, temb, rotary, attention_kwargs, controlnet_single_residuals
            )
        cache.store(probe, hidden_states - first)
    cache.end_step(reuse, difference)
    return transformer.proj_out(transformer.norm_out(hidden_states, temb))


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
    cache = self.cache_context
    if (hidden_states.shape[0], hidden_states.shape[1], self.inner_dim) != cache.shape:
        raise ValueError(
            f"Invalid cache state: the latents are {hidden_states.shape[0]} x {hidden_states.shape[1]} tokens of width "
            f"{self.inner_dim}, the CacheContext is for {cache.shape}"
        )
    if joint_attention_kwargs is not None and "scale" in joint_attention_kwargs:
        raise RuntimeError("set the LoRA scale with scale_lora_layers before the call, not in joint_attention_kwargs")
    if joint_attention_kwargs is not None and "ip_adapter_image_embeds" in joint_attention_kwargs:
        image_embeds = joint_attention_kwargs.pop("ip_adapter_image_embeds")
        joint_attention_kwargs.update({"ip_hidden_states": self.encoder_hid_proj(image_embeds)})
    cache.begin_step(timestep[0])
    context, rotary = embed_condition(self, encoder_hidden_states, txt_ids, img_ids)
    temb = embed_time(self, timestep, guidance, pooled_projections, hidden_states.dtype)
    output = cached_step(
        self,
        cache,
        hidden_states,
        context,
        temb,
        rotary,
        joint_attention_kwargs,
        controlnet_block_samples,
        controlnet_single_block_samples,
        controlnet_blocks_repeat,
    )
    if not return_dict:
        return (output,)
    return Transformer2DModelOutput(sample=output)
