"""Makes tests/golden/qwenimage.npz: a tiny Qwen-Image by torch's diffusers, uncached and under cache-dit.

python -m venv /tmp/golden_env && /tmp/golden_env/bin/pip install -r tools/golden/requirements_cache_dit.txt
/tmp/golden_env/bin/pip install --no-deps cache-dit==1.5.3
PYTHONPATH=.:tools/tiny_models /tmp/golden_env/bin/python tools/golden/make_qwenimage.py

The uncached pictures are (B, H, W, 3). Under cache-dit it is the final latents, (B, S, 64), and for the prompt and the
negative prompt, or for the prompt alone, which steps were reused, and the differences.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import cache_dit
import diffusers
import torch
from cases import QWENIMAGE_CACHED, QWENIMAGE_IMAGES, call_arguments, save
from dbcache import branches, nearest, settings
from make_models import make

from FBCache_ms.config import CacheConfig


def load(folder):
    """The pipeline."""
    pipe = diffusers.QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(case, folder):
    """The latents, decisions and differences of a cached case."""
    pipe, config = load(folder), CacheConfig.from_tag(case["config"])
    both = "negative_prompt" in case
    cache, calibrator = settings(config, separate_cfg=both)
    cache_dit.enable_cache(pipe, cache_config=cache, calibrator_config=calibrator)
    arguments = call_arguments(case, torch.from_numpy, "qwenimage")
    latents = pipe(**arguments).images
    stats = cache_dit.summary(pipe, logging=False)[0]
    reused, diffs = branches(stats, arguments["num_inference_steps"], both)
    print(case["config"], *("".join(map(str, branch.astype(int))) for branch in reused), nearest(diffs, config))
    return {"latents": latents.numpy(), "reused": reused, "diffs": diffs}


with tempfile.TemporaryDirectory() as folder:
    make(Path(folder) / "model", "qwenimage")
    pipe = load(Path(folder) / "model")
    results = [
        {"images": pipe(**call_arguments(case, torch.from_numpy, "qwenimage")).images} for case in QWENIMAGE_IMAGES
    ]
    results += [run(case, Path(folder) / "model") for case in QWENIMAGE_CACHED]
versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "cache-dit")}
save("tests/golden/qwenimage.npz", [*QWENIMAGE_IMAGES, *QWENIMAGE_CACHED], results, versions)
