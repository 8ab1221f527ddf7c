"""Makes checkpoints of FLUX.1's other layouts from the embedded one: Control, ControlNet, Fill, Kontext and Krea.

.venv/bin/python tools/tiny_family/make_family.py results/family

Each is a folder in diffusers layout. Nothing is trained: what a layout feeds its transformer beside the latents gets
small random weights, so that pictures still show their prompts, and other inputs give other pictures.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TINY_FLUX = Path(__file__).parents[2] / "FBCache_ms" / "tiny_flux"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALE = 0.03
"""Standard deviation of the random weights."""

PIPELINES = {
    "dev": "FluxPipeline",
    "krea": "FluxPipeline",
    "kontext": "FluxKontextPipeline",
    "control": "FluxControlPipeline",
    "controlnet": "FluxControlNetPipeline",
    "fill": "FluxFillPipeline",
}
"""The layouts, and the pipeline that each one's model_index.json names."""


def edit(path, **changes):
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2, sort_keys=True) + "\n")


def extra_channels(layout, source):
    """How many channels a layout's transformer is fed beside its latents, each packed 2 x 2."""
    vae = json.loads((source / "vae" / "config.json").read_text())
    latents = 4 * vae["latent_channels"]
    mask = 4 * (2 ** (len(vae["block_out_channels"]) - 1)) ** 2
    return {"control": latents, "fill": latents + mask}.get(layout, 0)


def widen(folder, extra, rng):
    """Gives a transformer inputs of so many more channels."""
    config, weights = folder / "config.json", folder / WEIGHTS
    channels, tensors = json.loads(config.read_text())["in_channels"], load_file(weights)
    columns = rng.normal(0, SCALE, (len(tensors["x_embedder.weight"]), extra)).astype(np.float32)
    tensors["x_embedder.weight"] = np.concatenate([tensors["x_embedder.weight"], columns], 1)
    save_file(tensors, weights, metadata={"format": "np"})
    edit(config, in_channels=channels + extra, out_channels=channels)


def add_controlnet(folder, rng, doubles=2, singles=1):
    """Writes a FluxControlNetModel with the transformer's first blocks, into the folder controlnet beside it."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    doubles, singles = min(doubles, config["num_layers"]), min(singles, config["num_single_layers"])
    stacks = {"transformer_blocks": doubles, "single_transformer_blocks": singles}
    tensors = {}
    for name, tensor in load_file(folder / "transformer" / WEIGHTS).items():
        stack, index = (name.split(".") + [""])[:2]
        if stack not in ("norm_out", "proj_out") and (stack not in stacks or int(index) < stacks[stack]):
            tensors[name] = tensor
    outputs = {f"controlnet_blocks.{index}": width for index in range(doubles)}
    outputs.update({f"controlnet_single_blocks.{index}": width for index in range(singles)})
    for name, inputs in {**outputs, "controlnet_x_embedder": config["in_channels"]}.items():
        tensors[f"{name}.weight"] = rng.normal(0, SCALE, (width, inputs)).astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(width, np.float32)
    (folder / "controlnet").mkdir()
    save_file(tensors, folder / "controlnet" / WEIGHTS, metadata={"format": "np"})
    for name in ("out_channels", "_class_name"):
        del config[name]
    config.update(_class_name="FluxControlNetModel", num_layers=doubles, num_single_layers=singles, num_mode=None)
    (folder / "controlnet" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(folder, layout, source=TINY_FLUX):
    """Writes one layout into a new folder, from a text-to-image checkpoint; returns the folder.

    Raises ValueError for a layout that is not in PIPELINES.
    """
    if layout not in PIPELINES:
        raise ValueError(f"layout must be one of {', '.join(PIPELINES)}, not {layout!r}")
    shutil.copytree(source, folder)
    rng, index = np.random.default_rng(0), folder / "model_index.json"
    edit(index, _class_name=PIPELINES[layout])
    if extra_channels(layout, source):
        widen(folder / "transformer", extra_channels(layout, source), rng)
    if layout == "controlnet":
        add_controlnet(folder, rng)
        edit(index, controlnet=["diffusers", "FluxControlNetModel"])
    if layout not in ("dev", "krea", "kontext", "controlnet"):
        entries = json.loads(index.read_text())
        kept = {name: entry for name, entry in entries.items() if name not in ("image_encoder", "feature_extractor")}
        index.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    return folder


if __name__ == "__main__":
    for each in PIPELINES:
        make(Path(sys.argv[1]) / each, each)
