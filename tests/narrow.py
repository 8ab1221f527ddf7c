"""What several tests draw with: the embedded checkpoint with its first blocks alone, a LoRA, a cached step."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

import mindspore as ms

from FBCache_ms import FluxPipeline
from FBCache_ms.pipelines.cached_transformer import graph_input
from FBCache_ms.runtime.checkpoint import TINY_FLUX

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a big red circle in the center, blue background"


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


def load(folder, **settings):
    """A FluxPipeline without a bar."""
    pipe = FluxPipeline.from_pretrained(folder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **settings):
    """The picture of PROMPT, the same noise each time."""
    settings = {"num_inference_steps": 8, "output_type": "np", "generator": np.random.default_rng(0), **settings}
    return pipe(PROMPT, **settings)[0][0]


def adapter():
    """A LoRA's state dict for a layer of the first block and one of the last, of a transformer with two single ones."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"):
        outputs = 512 if layer.endswith("mlp") else 128
        for part, shape in {"lora_A": (4, 128), "lora_B": (outputs, 4)}.items():
            name = f"transformer.{layer}.{part}.weight"
            tensors[name] = ms.Parameter(ms.Tensor(0.1 * rng.standard_normal(shape), ms.float32), name=name)
    return tensors


def text_lora(seed):
    """A LoRA's state dict for a layer of each of CLIP's blocks."""
    rng, tensors = np.random.default_rng(seed), {}
    for part, shape in {"lora_A": (4, 64), "lora_B": (64, 4)}.items():
        name = f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.{part}.weight"
        tensors[name] = ms.Parameter(ms.Tensor(rng.normal(0, 0.5, shape), ms.float32), name=name)
    return tensors


def run_step(step, hidden_states, timestep, controlnet_blocks_repeat=False, **inputs):
    """The velocity that a CachedStep gives for the arguments of the transformer's construct."""
    constants = {"controlnet_blocks_repeat": controlnet_blocks_repeat}
    return step(hidden_states, timestep, graph_input(inputs), constants).asnumpy()
