"""Flux2Pipeline: mindone's, with the denoise loop as one cached graph."""

from importlib.util import find_spec

import numpy as np
from mindone.diffusers import Flux2Pipeline as MindoneFlux2Pipeline
from mindone.diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from mindone.diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput

import mindspore as ms
from mindspore import ops

from ..models import flux2
from ..models.blocks import refuse_kwargs
from ..runtime.device import prepare_device
from .whole_loop import DEFAULT, WholeLoop, spread, with_cache_config

MOST_PIXELS = 1024 * 1024
"""Of a picture that is drawn after; a larger one is made smaller."""


class Flux2Pipeline(WholeLoop, MindoneFlux2Pipeline):
    """mindone's Flux2Pipeline with the cache, its denoise loop one compiled graph; WholeLoop says what that adds.

    Encoder and autoencoder run operator by operator.
    """

    FILE, MINDONES, OUTPUT = flux2, MindoneFlux2Pipeline, Flux2PipelineOutput
    KWARGS = "attention_kwargs"
    ENCODERS, READERS = ("text_encoder",), ("text_encoder", "tokenizer")

    def __init__(self, scheduler, vae, text_encoder, tokenizer, transformer):
        prepare_device()
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self._set_up()

    def __call__(self, *args, cache_config=DEFAULT, **kwargs):
        """Draws; takes and returns what mindone's __call__ does, and for this call alone a cache_config.

        The tokens of pictures to draw after, ``image``, stand behind the latents', and count where steps are compared.
        Threads take turns, whatever pipelines they call.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None.
            ValueError: an input is not what it has to be, or does not fit another; the message names it.
        """
        return self._call(args, kwargs, cache_config)

    __call__.__signature__ = with_cache_config(MindoneFlux2Pipeline)

    def embeds_shapes(self):
        """See WholeLoop."""
        return {"prompt_embeds": (None, self.transformer.config.joint_attention_dim)}

    def latents_shape(self, given):
        """See WholeLoop."""
        unit = self.vae_scale_factor * 2
        channels = self.transformer.config.in_channels // 4 * 4
        return given.pictures, channels, given.height // unit, given.width // unit

    def check_kwargs(self, kwargs):
        """See WholeLoop."""
        refuse_kwargs(kwargs)

    def begin(self, given):
        """See WholeLoop."""
        self._guidance_scale, self._attention_kwargs = given.guidance_scale, given.attention_kwargs

    def encode(self, given, kind):
        """See WholeLoop; with a caption_upsample_temperature the text encoder rewrites the prompt first."""
        prompt = given.prompt
        if given.prompt_embeds is None:
            check_layers(self.text_encoder, given.text_encoder_out_layers)
        if given.caption_upsample_temperature:
            prompt = self.upsample_prompt(prompt, images=given.image, temperature=given.caption_upsample_temperature)
        embeds, text_ids = self.encode_prompt(
            prompt,
            prompt_embeds=given.prompt_embeds,
            max_sequence_length=given.max_sequence_length,
            text_encoder_out_layers=given.text_encoder_out_layers,
        )
        return {"encoder_hidden_states": spread(embeds, given.pictures), "txt_ids": text_ids}

    def _draw(self, given, config):
        given.after = self._to_draw_after(given)
        return super()._draw(given, config)

    def _to_draw_after(self, given):
        """The call's pictures as the autoencoder takes them, of at most 1024 x 1024 pixels, None for none.

        The first one says the size of what is drawn, unless the call does.
        """
        if given.image is None:
            return None
        after, processor, unit = [], self.image_processor, self.vae_scale_factor * 2
        for image in given.image if isinstance(given.image, list) else [given.image]:
            processor.check_image_input(image)
            if image.width * image.height > MOST_PIXELS:
                image = processor._resize_to_target_area(image, MOST_PIXELS)
            width, height = image.width // unit * unit, image.height // unit * unit
            given.height, given.width = given.height or height, given.width or width
            after.append(processor.preprocess(image, height=height, width=width, resize_mode="crop"))
        return after

    def encode_prompt(self, prompt, *args, **kwargs):
        """mindone's. Raises ValueError for a text where there is no jinja2, which fills transformers' templates."""
        if prompt is not None and find_spec("jinja2") is None:
            raise ValueError("a prompt of FLUX.2 needs jinja2; install FBCache_ms[flux2]")
        return super().encode_prompt(prompt, *args, **kwargs)

    def noise(self, given, dtype):
        """See WholeLoop."""
        size = given.pictures, self.transformer.config.in_channels // 4, given.height, given.width
        latents, ids = self.prepare_latents(*size, dtype, given.generator, given.latents)
        others = {"img_ids": ids, "guidance": ms.Tensor(np.full(given.pictures, given.guidance_scale), ms.float32)}
        if given.after is not None:
            still, still_ids = self.prepare_image_latents(given.after, given.pictures, given.generator, self.vae.dtype)
            others.update(still=still.to(dtype), img_ids=ops.concat((ids, still_ids.to(ids.dtype)), 1))
        return latents, others

    def _encode_vae_image(self, image, generator):
        """The latents of a picture, the mean that the autoencoder gives. mindone 0.5.0's own fails."""
        moments = self.vae._encode(image)
        mean, deviation = self._moments(moments.dtype)
        return (self._patchify_latents(moments[:, : moments.shape[1] // 2]) - mean) / deviation

    @staticmethod
    def _unpack_latents_with_ids(x, x_ids):
        """Latents (B, S, C) as (B, C, H, W), by the positions of their tokens. mindone 0.5.0's own fails."""
        height, width = x_ids[0, -1, 1:3].asnumpy() + 1
        return as_grid(x, int(height), int(width))

    def _moments(self, dtype):
        """Mean and standard deviation of the autoencoder's latents, (1, 4 C, 1, 1)."""
        norm = self.vae.bn
        mean, variance = (value.reshape(1, -1, 1, 1).to(dtype) for value in (norm.running_mean, norm.running_var))
        return mean, ops.sqrt(variance + self.vae.config.batch_norm_eps)

    def shift(self, given, tokens):
        """See WholeLoop."""
        return compute_empirical_mu(tokens, given.num_inference_steps)

    def picture(self, given, latents):
        """See WholeLoop."""
        unit = self.vae_scale_factor * 2
        latents = as_grid(latents, given.height // unit, given.width // unit)
        mean, deviation = self._moments(latents.dtype)
        return self.vae.decode(self._unpatchify_latents(latents * deviation + mean), return_dict=False)[0]


def as_grid(latents, height, width):
    """Latents (B, S, C), their tokens row by row, as (B, C, H, W)."""
    return latents.reshape(latents.shape[0], height, width, -1).permute(0, 3, 1, 2)


def check_layers(text_encoder, chosen):
    """Raises ValueError where a text encoder has fewer layers than those whose hidden states are chosen."""
    layers = text_encoder.config.text_config.num_hidden_layers
    if not all(0 <= layer <= layers for layer in chosen):
        raise ValueError(f"text_encoder_out_layers must be 0 to {layers}, the text encoder's layers, not {chosen}")
