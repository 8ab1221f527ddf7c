"""Makes checkpoints of FLUX.1's other layouts from the embedded one: Control, ControlNet, Fill, Kontext and Krea.

.venv/bin/python tools/tiny_family/make_family.py results/family

Each is a folder in diffusers layout, and beside them is a LoRA adapter. Nothing is trained: what a layout feeds its
transformer beside the latents gets small random weights, so that pictures still show their prompts, and other inputs
give other pictures.
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
    "controlnet_xlabs": "FluxControlNetPipeline",
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


def hint_block(channels, rng):
    """The tensors of XLabs' convolutions, which bring a picture to a hint of so many channels, an eighth as wide."""
    layers = {"conv_in": (16, 3), **{f"blocks.{index}": (16, 16) for index in range(6)}, "conv_out": (channels, 16)}
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        weight = rng.normal(0, 1 / np.sqrt(9 * inputs), (outputs, inputs, 3, 3))
        tensors[f"input_hint_block.{name}.weight"] = weight.astype(np.float32)
        tensors[f"input_hint_block.{name}.bias"] = np.zeros(outputs, np.float32)
    return tensors


def add_controlnet(folder, rng, doubles=2, singles=1, hint=False):
    """Writes a FluxControlNetModel with the transformer's first blocks, into the folder controlnet beside it.

    With a hint block, as XLabs' have, it is fed the picture itself, and its residuals are taken in turn.
    """
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
    if hint:
        tensors.update(hint_block(config["in_channels"], rng))
        config["conditioning_embedding_channels"] = config["in_channels"]
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
    if layout.startswith("controlnet"):
        add_controlnet(folder, rng, hint=layout == "controlnet_xlabs")
        edit(index, controlnet=["diffusers", "FluxControlNetModel"])
    if layout in ("control", "fill"):
        entries = json.loads(index.read_text())
        kept = {name: entry for name, entry in entries.items() if name not in ("image_encoder", "feature_extractor")}
        index.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    return folder


def make_lora(folder, rank=4, source=TINY_FLUX):
    """Writes a LoRA adapter of the double blocks' attention, of random weights, into a new folder; returns it."""
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(source / "transformer" / WEIGHTS).items():
        if name.startswith("transformer_blocks.") and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            outputs, inputs = tensor.shape
            layer = f"transformer.{name.removesuffix('.weight')}"
            for part, shape in {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}.items():
                tensors[f"{layer}.{part}.weight"] = rng.normal(0, 0.15, shape).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "np"})
    return folder


if __name__ == "__main__":
    for each in PIPELINES:
        make(Path(sys.argv[1]) / each, each)
    make_lora(Path(sys.argv[1]) / "lora")
