"""A checkpoint that compiles and draws in no time: the embedded one with its first blocks alone."""

import json
import shutil

from safetensors.numpy import load_file, save_file

from FBCache_ms.checkpoint import TINY_FLUX

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make_narrow(folder, doubles=1, singles=1):
    """Writes it into a folder, in diffusers layout, with so many double and single blocks."""
    shutil.copytree(TINY_FLUX, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "num_layers": doubles, "num_single_layers": singles})
    )
    tensors = load_file(folder / WEIGHTS)
    for name in list(tensors):
        stack, _, rest = name.partition("blocks.")
        kept = {"transformer_": doubles, "single_transformer_": singles}.get(stack)
        if kept is not None and int(rest.partition(".")[0]) >= kept:
            del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    return folder
