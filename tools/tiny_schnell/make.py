"""Makes a checkpoint of schnell's kind from the embedded one: FLUX.1's 19 + 38 blocks and no guidance embedding.

.venv/bin/python tools/tiny_schnell/make.py results/tiny_schnell

The embedded blocks are spread over the 57; those between them have weights of zero, so that they add nothing and cost
as much as any. The embedding of guidance 3.5 goes into the time embedding's bias. Without rounding, both transformers
are the same function; like schnell's, the scheduler does not shift the noise levels with the size.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TINY_FLUX = Path(__file__).parents[2] / "FBCache_ms" / "tiny_flux"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
GUIDANCE = 3.5


def places(number, wide):
    """Where ``number`` blocks lie among ``wide``, the first and the last at the ends."""
    return np.round(np.linspace(0, wide - 1, number)).astype(int).tolist()


def spread(tensors, stack, wide):
    """A stack's tensors at their new places, and zeros for the blocks between; the norms of queries and keys stay."""
    first = {name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{stack}.0.")}
    number = len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})
    homes = {place: index for index, place in enumerate(places(number, wide))}
    for place in range(wide):
        for part, example in first.items():
            if place in homes:
                tensor = tensors[f"{stack}.{homes[place]}.{part}"]
            else:
                tensor = np.ones_like(example) if "attn.norm" in part else np.zeros_like(example)
            yield f"{stack}.{place}.{part}", tensor


def guidance_vector(tensors, guidance):
    """What the guidance embedder adds to the modulation vector, (D,): two layers on cosines and sines of 1000 g."""
    angles = guidance * 1000 * np.exp(-np.log(10000) * np.arange(128) / 128)
    hidden = np.concatenate([np.cos(angles), np.sin(angles)])
    for layer in ("linear_1", "linear_2"):
        name = f"time_text_embed.guidance_embedder.{layer}"
        hidden = tensors[f"{name}.weight"] @ hidden + tensors[f"{name}.bias"]
        if layer == "linear_1":
            hidden = hidden / (1 + np.exp(-hidden))
    return hidden.astype(np.float32)


def make(folder):
    """Writes the checkpoint into a new folder."""
    shutil.copytree(TINY_FLUX, folder)
    tensors = load_file(TINY_FLUX / WEIGHTS)
    made = {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[0] not in BLOCKS and "guidance_embedder" not in name
    }
    for stack, wide in BLOCKS.items():
        made.update(spread(tensors, stack, wide))
    bias = "time_text_embed.timestep_embedder.linear_2.bias"
    made[bias] = made[bias] + guidance_vector(tensors, GUIDANCE)
    save_file(made, folder / WEIGHTS)
    changes = {
        "transformer/config.json": {"guidance_embeds": False, "num_layers": 19, "num_single_layers": 38},
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": False, "shift": 1.0},
    }
    for file, change in changes.items():
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
