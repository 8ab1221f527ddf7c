"""A checkpoint that compiles and draws in no time: the embedded one with a double and a single block."""

import json
import shutil

from safetensors.numpy import load_file, save_file

from FBCache_ms.checkpoint import TINY_FLUX

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make_narrow(folder):
    """Writes it into a folder, in diffusers layout."""
    shutil.copytree(TINY_FLUX, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1, "num_single_layers": 1}))
    tensors = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "blocks" not in name or "blocks.0." in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "np"})
    return folder
