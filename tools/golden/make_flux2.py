"""Makes tests/golden/flux2.npz: a tiny FLUX.2 by torch's diffusers, uncached and under cache-dit.

python -m venv /tmp/golden_env && /tmp/golden_env/bin/pip install -r tools/golden/requirements_cache_dit.txt
/tmp/golden_env/bin/pip install --no-deps cache-dit==1.5.3
PYTHONPATH=.:tools/tiny_models /tmp/golden_env/bin/python tools/golden/make_flux2.py

The uncached pictures are (B, H, W, 3). Under cache-dit it is the final latents, (B, S, 32), and for each gate which
steps were reused, and the differences. cache-dit has a gate for the double blocks and one for the single ones, which is
span=stacks here. To have one gate over all blocks, as it has on FLUX.1, the single blocks are dressed as double ones.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import cache_dit
import diffusers
import numpy as np
import torch
from cases import FLUX2_CACHED, FLUX2_IMAGES, call_arguments, save
from dbcache import branches, nearest, settings
from make_models import make

from FBCache_ms.config import CacheConfig


def load(folder):
    """The pipeline."""
    pipe = diffusers.Flux2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class AsDouble(torch.nn.Module):
    """A single block that takes and returns both streams; ``modulation`` is a list with that of the step."""

    def __init__(self, block, modulation):
        super().__init__()
        self.single, self.modulation = block, modulation

    def forward(self, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, **others):
        """Text (B, T, D) and image (B, S, D)."""
        streams = hidden_states, encoder_hidden_states
        return self.single(*streams, temb_mod=self.modulation[0], split_hidden_states=True, **others)


def one_stack(pipe):
    """cache-dit's adapter of a pipeline whose single blocks stand behind the double ones, in one list."""
    transformer, modulation = pipe.transformer, [None]
    transformer.single_stream_modulation.register_forward_hook(
        lambda layer, inputs, output: modulation.__setitem__(0, output)
    )
    singles = [AsDouble(block, modulation) for block in transformer.single_transformer_blocks]
    return cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=transformer,
        blocks=torch.nn.ModuleList([*transformer.transformer_blocks, *singles]),
        blocks_name="transformer_blocks",
        dummy_blocks_names=["single_transformer_blocks"],
        forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        check_forward_pattern=True,
    )


def two_stacks(pipe, config):
    """cache-dit's own adapter of a FLUX.2, with a threshold for each stack."""
    adapter = cache_dit.BlockAdapterRegister.get_adapter(pipe)
    thresholds = config.residual_diff_threshold, config.residual_diff_threshold_single
    adapter.params_modifiers = [
        cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig().reset(residual_diff_threshold=threshold))
        for threshold in thresholds
    ]
    return adapter


def run(case, folder):
    """The latents, decisions and differences of a cached case."""
    pipe, config = load(folder), CacheConfig.from_tag(case["config"])
    thresholds = [config.residual_diff_threshold]
    if config.span == "stacks":
        adapter = two_stacks(pipe, config)
        thresholds.append(config.residual_diff_threshold_single)
    else:
        adapter = one_stack(pipe)
    cache, calibrator = settings(config, separate_cfg=False)
    cache_dit.enable_cache(adapter, cache_config=cache, calibrator_config=calibrator)
    arguments = call_arguments(case, torch.from_numpy, "flux2")
    latents = pipe(**arguments).images
    # It tells of the single stack first.
    stats = cache_dit.summary(pipe, logging=False)[: len(thresholds)][::-1]
    reused, diffs = zip(*[branches(each, arguments["num_inference_steps"], False) for each in stats])
    reused, diffs = np.concatenate(reused), np.concatenate(diffs)
    gaps = [nearest(row, config.changed(residual_diff_threshold=limit)) for row, limit in zip(diffs, thresholds)]
    print(case["config"], *("".join(map(str, gate.astype(int))) for gate in reused), *gaps)
    return {"latents": latents.numpy(), "reused": reused, "diffs": diffs}


with tempfile.TemporaryDirectory() as folder:
    make(Path(folder) / "model", "flux2")
    pipe = load(Path(folder) / "model")
    results = [{"images": pipe(**call_arguments(case, torch.from_numpy, "flux2")).images} for case in FLUX2_IMAGES]
    results += [run(case, Path(folder) / "model") for case in FLUX2_CACHED]
versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "cache-dit")}
save("tests/golden/flux2.npz", [*FLUX2_IMAGES, *FLUX2_CACHED], results, versions)
