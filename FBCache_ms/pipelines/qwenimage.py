"""QwenImagePipeline: mindone's, with the denoise loop as one cached graph."""

from mindone.diffusers import QwenImagePipeline as MindoneQwenImagePipeline
from mindone.diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from mindone.diffusers.utils import logging

import mindspore as ms

from ..models import qwenimage
from ..models.blocks import refuse_kwargs
from ..models.padding import BUCKETS
from ..runtime.device import prepare_device
from .whole_loop import DEFAULT, WholeLoop, has_negative_prompt, spread, with_cache_config

logger = logging.get_logger(__name__)


class QwenImagePipeline(WholeLoop, MindoneQwenImagePipeline):
    """mindone's QwenImagePipeline with the cache, its denoise loop one compiled graph; WholeLoop says what that adds.

    Prompts of any length share a graph, up to each length in models.padding.BUCKETS. Encoder and autoencoder run
    operator by operator: mindone's do not compile.
    """

    FILE, MINDONES, OUTPUT = qwenimage, MindoneQwenImagePipeline, QwenImagePipelineOutput
    KWARGS = "attention_kwargs"
    ENCODERS, READERS = ("text_encoder",), ("text_encoder", "tokenizer")

    def __init__(self, scheduler, vae, text_encoder, tokenizer, transformer):
        prepare_device()
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self._set_up()

    def __call__(self, *args, cache_config=DEFAULT, **kwargs):
        """Draws; takes and returns what mindone's __call__ does, and for this call alone a cache_config.

        In a batch a shorter prompt's padding is not attended to, which mindone's does. Threads take turns, whatever
        pipelines they call.

        Raises:
            TypeError: cache_config is neither a CacheConfig nor None.
            ValueError: an input is not what it has to be, or does not fit another; the message names it.
        """
        return self._call(args, kwargs, cache_config)

    __call__.__signature__ = with_cache_config(MindoneQwenImagePipeline)

    def embeds_shapes(self):
        """See WholeLoop."""
        return {"prompt_embeds": (None, self.transformer.config.joint_attention_dim), "prompt_embeds_mask": (None,)}

    def check_kwargs(self, kwargs):
        """See WholeLoop."""
        refuse_kwargs(kwargs)

    @property
    def text_lengths(self):
        """See WholeLoop."""
        return tuple(length for shorter, length in zip((0, *BUCKETS), BUCKETS) if shorter < self.text_length)

    def begin(self, given):
        """See WholeLoop; warns where a negative prompt is without a scale, or the scale without it."""
        self._guidance_scale, self._attention_kwargs = given.guidance_scale, given.attention_kwargs
        guided = has_negative_prompt(self, given)
        if given.guidance_scale is not None:
            logger.warning(
                f"guidance_scale {given.guidance_scale} is ignored: the model takes none; see true_cfg_scale"
            )
        if given.true_cfg_scale > 1 and not guided:
            logger.warning(f"true_cfg_scale {given.true_cfg_scale} is ignored: there is no negative_prompt")
        elif guided and given.true_cfg_scale <= 1:
            logger.warning(f"negative_prompt is ignored: true_cfg_scale is {given.true_cfg_scale}, not above 1")

    def encode(self, given, kind):
        """See WholeLoop."""
        # mindone's repeats a mask for several pictures of a prompt in another order than its embeddings.
        embeds, mask = self.encode_prompt(
            getattr(given, f"{kind}prompt"),
            prompt_embeds=getattr(given, f"{kind}prompt_embeds"),
            prompt_embeds_mask=getattr(given, f"{kind}prompt_embeds_mask"),
            max_sequence_length=given.max_sequence_length,
        )
        return {
            "encoder_hidden_states": spread(embeds, given.pictures),
            "encoder_hidden_states_mask": spread(mask, given.pictures),
        }

    def noise(self, given, dtype):
        """See WholeLoop."""
        size = given.pictures, self.transformer.config.in_channels // 4, given.height, given.width
        latents = self.prepare_latents(*size, dtype, given.generator, given.latents)
        unit = self.vae_scale_factor * 2
        return latents, {"img_shapes": [[(1, given.height // unit, given.width // unit)]]}

    def picture(self, given, latents):
        """See WholeLoop."""
        latents = self._unpack_latents(latents, given.height, given.width, self.vae_scale_factor).to(self.vae.dtype)
        mean, std = (
            ms.Tensor(values, latents.dtype).reshape(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return self.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
