"""What the golden files hold: the calls that are made both by torch's pipelines and, in the tests, by ours."""

import json

import numpy as np

CIRCLE = "a big red circle in the center, blue background"
SQUARE = "a small green square on the left, black background"
DIAMOND = "a big white diamond at the top, purple background"

IMAGES = [
    {"prompt": CIRCLE, "seed": 0},
    {"prompt": SQUARE, "seed": 5, "num_inference_steps": 10, "guidance_scale": 1.5},
    {"prompt": CIRCLE, "seed": 8, "num_inference_steps": 12, "height": 64, "width": 96},
    {"prompt": [CIRCLE, DIAMOND], "seed": 3, "num_inference_steps": 8},
    {
        "prompt": CIRCLE,
        "negative_prompt": DIAMOND,
        "true_cfg_scale": 2.0,
        "seed": 4,
        "num_inference_steps": 10,
    },
]

CACHED = [
    {"prompt": prompt, "seed": seed, "residual_diff_threshold": threshold}
    for seed, prompt in enumerate((CIRCLE, SQUARE))
    for threshold in (0.05, 0.08, 0.12, 0.2, 0.4)
]
CACHED += [
    {
        "prompt": CIRCLE,
        "seed": 0,
        "residual_diff_threshold": 0.12,
        "taylorseer_derivative": order,
        "warmup_steps": order + 2,
    }
    for order in (1, 2)
]


def call_arguments(case, tensor):
    """A case's keyword arguments for a pipeline; ``tensor`` makes the framework's tensor of a NumPy array."""
    arguments = {"height": 64, "width": 64, "num_inference_steps": 28, "max_sequence_length": 32, **case}
    for name in ("residual_diff_threshold", "taylorseer_derivative", "warmup_steps"):
        arguments.pop(name, None)
    batch = len(case["prompt"]) if isinstance(case["prompt"], list) else 1
    tokens = arguments["height"] * arguments["width"] // 64
    noise = np.random.default_rng(arguments.pop("seed")).standard_normal((batch, tokens, 16))
    return {**arguments, "latents": tensor(noise.astype(np.float32)), "output_type": "np"}


def save(path, cases, results, versions):
    """Writes the cases, what each gave ({name: array}) and the versions that it came from."""
    arrays = {f"{name}_{index}": array for index, result in enumerate(results) for name, array in result.items()}
    np.savez_compressed(path, about=json.dumps({"cases": cases, "versions": versions}), **arrays)
