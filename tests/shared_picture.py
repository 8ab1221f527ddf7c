"""Draws what test_parallel.py compares; under msrun, as one of the devices that share each picture."""

import sys
from pathlib import Path

import mindone.diffusers
import numpy as np

from FBCache_ms import (
    CacheConfig,
    ContextParallelConfig,
    Flux2Pipeline,
    FluxPipeline,
    QuantizeConfig,
    QwenImagePipeline,
    apply_cache_on_pipe,
    choose_device,
    quantize,
)
from FBCache_ms.runtime.device import graph_mode

CFG = {"negative_prompt": "a small green square on the left, black background", "true_cfg_scale": 2.0}
QWEN_CFG = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
EASYCACHE = "F0B0_W3_R0.12,gate=easycache,easycache_threshold=2"
FLUX, QWEN, FLUX2 = "flux", "qwenimage", "flux2"

CASES = {
    "order 1, true CFG": (FLUX, "F1B0_W0_T1O1_R0.3", CFG),
    "EasyCache": (FLUX, EASYCACHE, {}),
    "uncached": (FLUX, "F0B0_W0_R0.12,gate=none", {}),
    "last blocks, limits, two pictures": (FLUX, "F1B1_W2MC3_T1O1_R0.4", {"num_images_per_prompt": 2}),
    "the worst sample decides": (FLUX, "F1B0_W0_R0.3,batch_reduction=max", {"num_images_per_prompt": 2}),
    "double gate": (FLUX, "F1B0_W0_R0.2,span=stacks,residual_diff_threshold_single=0.3", {}),
    "TeaCache": (FLUX, "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.6", {}),
    "both rules": (FLUX, "F1B0_W0_R0.3,gate=fbcache_or_teacache", {}),
    "CG-Taylor": (FLUX, "F1B0_W0_T1O1_R0.3,gate=cg_taylor", {}),
    "DiCache": (FLUX, "F1B0_W0_T1O1_R0.4,gate=dicache,forecast=dicache", {}),
    "static": (FLUX, "taylorseer", {}),
    "SpeCa": (FLUX, "F0B0_W0_T1O2_R0.12,gate=speca,speca_threshold=0.5,speca_decay=1", {}),
    "MeanCache": (FLUX, "meancache", CFG),
    "cfg_parallel": (FLUX, "F1B0_W0_T1O1_R0.3", {"cfg_parallel": True, **CFG}),
    "Ulysses, true CFG": (FLUX, "F1B0_W0_T1O1_R0.3", {"scheme": "ulysses", **CFG}),
    "Ulysses, Qwen-Image": (QWEN, "F1B0_W0_R0.3", {"scheme": "ulysses", **QWEN_CFG}),
    "Ulysses, FLUX.2": (FLUX2, "F1B0_W0_R0.3", {"scheme": "ulysses", "text_encoder_out_layers": [1, 2, 3]}),
    "Ulysses, applied": (FLUX, "F1B0_W0_R0.3", {"scheme": "ulysses", "applied": True, **CFG}),
    "cfg_parallel, Qwen-Image": (QWEN, "taylorseer", {"cfg_parallel": True, **QWEN_CFG}),
    "cfg_parallel, EasyCache": (FLUX, EASYCACHE, {"cfg_parallel": True, **CFG}),
    "Qwen-Image, true CFG": (QWEN, "F1B0_W0_T1O1_R0.3", QWEN_CFG),
    "FLUX.2": (FLUX2, "F1B0_W0_T1O1_R0.3", {"text_encoder_out_layers": [1, 2, 3]}),
    "int8 weights": (FLUX, "F1B0_W0_R0.3", {"quantized": "int8_weight_only"}),
    "int8": (FLUX, "F1B0_W0_R0.3", {"quantized": "int8"}),
    "applied": (FLUX, "F1B0_W0_R0.3", {"applied": True, **CFG}),
    "pieces": (FLUX, "F1B0_W0_R0.3", {"pieces": True}),
    "interrupted": (FLUX, "F1B0_W0_R0.3", {"interrupted": 3}),
}
"""A model's folder, a CacheConfig, and what else a pipeline is called with."""

KINDS = {FLUX: FluxPipeline, QWEN: QwenImagePipeline, FLUX2: Flux2Pipeline}
STEPS = 8


def draw(folder, name, shared=False):
    """A case's latents, decisions and bytes of the cache, as arrays by name."""
    family, tag, settings = CASES[name]
    pipe, settings = KINDS[family].from_pretrained(Path(folder) / family), dict(settings)
    if "quantized" in settings:
        quantize(pipe, QuantizeConfig(settings.pop("quantized")))
    if settings.pop("applied", False):
        pipe = apply_cache_on_pipe(mindone.diffusers.FluxPipeline(**pipe.components), CacheConfig.named(tag))
        shares, stats = pipe.transformer, lambda: pipe.transformer.cache_stats
    else:
        pipe.cache_config = CacheConfig.named(tag)
        shares, stats = pipe, lambda: pipe.cache_stats
    pipe.set_progress_bar_config(disable=True)
    how = {name: settings.pop(name) for name in ("cfg_parallel", "scheme") if name in settings}
    if shared:
        shares.enable_parallelism(ContextParallelConfig(**how))
    stop = settings.pop("interrupted", None)
    if settings.pop("pieces", False) or stop:

        def called(pipe, step, timestep, tensors):
            # One rank's word is enough.
            pipe._interrupt = step == stop and (not shared or shares.sharing.ranks.rank == 1)
            return tensors

        settings["callback_on_step_end"] = called
    settings = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent", **settings}
    with graph_mode(True):
        generator = np.random.default_rng(0)
        latents = pipe(prompt="a big red circle in the center, blue background", **settings, generator=generator)
    branches = [each for each in (stats(), stats().uncond) if each is not None]
    found = {"latents": latents[0].asnumpy(), "reused": np.array([each.reused for each in branches])}
    found["diffs"] = np.array([each.residual_diffs for each in branches], float)
    if shares is pipe:
        found["bytes"] = np.array(pipe.cache_bytes)
    return found


def main(folder, where, *names):
    """Draws cases as a rank, and writes what it has into RANK.npz."""
    choose_device("CPU")
    found = {}
    for name in names:
        for kind, value in draw(folder, name, shared=True).items():
            found[f"{name}: {kind}"] = value
    from mindspore.communication import get_rank

    np.savez(Path(where) / f"{get_rank()}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
