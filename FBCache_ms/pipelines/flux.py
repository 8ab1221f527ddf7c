"""FluxPipeline: mindone's, with the denoise loop as one cached graph."""

import numpy as np
from mindone.diffusers import FluxPipeline as MindoneFluxPipeline
from mindone.diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

import mindspore as ms

from ..models import transformer_flux_withFBCache
from ..models.transformer_flux_withFBCache import attention_inputs, refuse_stg
from ..runtime.device import prepare_device
from .whole_loop import DEFAULT, WholeLoop, spread, with_cache_config

_PROMPT = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")


class FluxPipeline(WholeLoop, MindoneFluxPipeline):
    """mindone's FluxPipeline with the cache, its denoise loop one compiled graph; WholeLoop says what that adds."""

    FILE, MINDONES, OUTPUT = transformer_flux_withFBCache, MindoneFluxPipeline, FluxPipelineOutput
    KWARGS, COMPILES_PARTS = "joint_attention_kwargs", True
    ENCODERS = ("text_encoder", "text_encoder_2")
    READERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
        image_encoder=None,
        feature_extractor=None,
    ):
        prepare_device()
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        if vae is not None:
            self.default_sample_size = vae.config.sample_size // self.vae_scale_factor
        self._set_up()

    def __call__(self, *args, cache_config=DEFAULT, **kwargs):
        """Draws; takes and returns what mindone's __call__ does, and for this call alone a cache_config.

        Prompts are padded to what the T5 tokenizer names as its length, at most mindone's 512, unless
        max_sequence_length says otherwise. Threads take turns, whatever pipelines they call.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None.
            ValueError: an input is not what it has to be, or does not fit another; the message names it.
        """
        return self._call(args, kwargs, cache_config)

    __call__.__signature__ = with_cache_config(MindoneFluxPipeline)

    @property
    def text_length(self):
        """See WholeLoop; what the T5 tokenizer names, at most mindone's."""
        most = super().text_length
        return most if self.tokenizer_2 is None else min(most, self.tokenizer_2.model_max_length)

    def _draw(self, given, config):
        if given.max_sequence_length == super().text_length:
            given.max_sequence_length = self.text_length
        return super()._draw(given, config)

    def embeds_shapes(self):
        """See WholeLoop."""
        layers = self.transformer.config
        return {
            "prompt_embeds": (None, layers.get("joint_attention_dim")),
            "pooled_prompt_embeds": (layers.get("pooled_projection_dim"),),
        }

    def check_kwargs(self, kwargs):
        """See WholeLoop."""
        refuse_stg(kwargs)

    def begin(self, given):
        """See WholeLoop."""
        self._guidance_scale, self._joint_attention_kwargs = given.guidance_scale, given.joint_attention_kwargs

    def encode(self, given, kind):
        """See WholeLoop; an IP adapter's images are part of the prompts."""
        embeds, pooled, text_ids = self.encode_prompt(
            **{part: getattr(given, kind + part) for part in _PROMPT},
            num_images_per_prompt=given.num_images_per_prompt,
            max_sequence_length=given.max_sequence_length,
        )
        return {
            "encoder_hidden_states": spread(embeds, given.pictures),
            "pooled_projections": spread(pooled, given.pictures),
            "txt_ids": text_ids,
            "joint_attention_kwargs": self._attention_inputs(given, kind),
        }

    def _attention_inputs(self, given, kind):
        """What attention gets beside the streams; of the images that are not given, black ones take the places."""
        inputs = dict(given.joint_attention_kwargs)
        images = {
            each: (getattr(given, f"{each}ip_adapter_image"), getattr(given, f"{each}ip_adapter_image_embeds"))
            for each in ("", "negative_")
        }
        if any(image is not None for pair in images.values() for image in pair):
            image, embeds = images[kind]
            if image is None and embeds is None:
                black = np.zeros((given.width, given.height, 3), np.uint8)
                image = [black] * self.transformer.encoder_hid_proj.num_ip_adapters
            inputs["ip_adapter_image_embeds"] = self.prepare_ip_adapter_image_embeds(image, embeds, given.pictures)
        return attention_inputs(self.transformer, inputs)

    def noise(self, given, dtype):
        """See WholeLoop."""
        layers = self.transformer.config
        size = given.pictures, layers.in_channels // 4, given.height, given.width
        latents, image_ids = self.prepare_latents(*size, dtype, given.generator, given.latents)
        scales = ms.Tensor(np.full(given.pictures, given.guidance_scale), ms.float32)
        return latents, {"img_ids": image_ids, "guidance": scales if layers.guidance_embeds else None}

    @staticmethod
    def _prepare_latent_image_ids(batch_size, height, width, dtype):
        """mindone's (height * width, 3): zero, row and column of each token. Without assigning to parts of a tensor,
        which takes MindSpore ten milliseconds."""
        return ms.Tensor(np.indices((1, height, width)).reshape(3, -1).T, dtype)

    def picture(self, given, latents):
        """See WholeLoop."""
        latents = self._unpack_latents(latents, given.height, given.width, self.vae_scale_factor)
        scaling = self.vae.config
        latents = latents / scaling.scaling_factor + scaling.shift_factor
        tiles = getattr(self.vae, "use_tiling", True) or getattr(self.vae, "use_slicing", True)
        if self.use_graph_mode and self.device.compile_cache is not None and not tiles:
            self.device.compile(self.vae.decoder, (latents,), self.vae)
        return self.vae.decode(latents, return_dict=False)[0]
