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

DBCACHE = [
    {"prompt": CIRCLE, "seed": 0, "config": tag}
    for tag in (
        "F1B0_W0M0MC0_T0O0_R0.12",
        "F1B0_W2M5MC0_T0O0_R0.3",
        "F1B0_W0M0MC1_T0O0_R0.4",
        "F1B0_W4M0MC3_T0O0_R0.24",
        "F1B0_W8I2M0MC8_T0O0_R0.8",
        "F1B0_W8I4M0MC10_T0O0_R0.8",
        "F1B0_W0M0MC0_T0O0_R1",
        "F1B0_W0M0MC0_T0O0_R0.3,max_accumulated_residual_diff=1.5",
        "F1B0_W0M0MC0_T0O0_R0.2,steps_computation_mask=1111110111000000000000000001",
        "F1B0_W0M0MC0_T0O0_R0.12,gate=static,steps_computation_mask=1111110110001100011000110001",
        "F3B2_W2M0MC3_T0O0_R0.15",
        "F6B3_W2M0MC0_T0O0_R0.15",
        "F1B0_W4M0MC4_T1O1_R0.2",
        "F1B0_W5M0MC0_T1O2_R0.12",
    )
] + [
    {"prompt": SQUARE, "seed": 1, "num_inference_steps": 50, "config": tag}
    for tag in ("F1B0_W8I2M0MC8_T0O0_R0.8", "F1B0_W8I4M0MC10_T0O0_R0.8")
]

LEAK = {"prompt": CIRCLE, "seed": 0, "num_inference_steps": 10, "config": "F1B0_W0M0MC0_T0O0_R1"}

PUBLISHED = [
    {"code": code, "prompt": prompt, "seed": seed, "config": config}
    for seed, prompt in enumerate((CIRCLE, SQUARE))
    for code, config in (
        ("TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.25"),
        ("TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.4"),
        ("TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.6"),
        ("TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.8"),
        ("MagCache", "F0B0_W0_R0.12,gate=static,schedule=magcache"),
        ("DiCache", "F1B0_W6_T1O1_R0.4,gate=dicache,forecast=dicache,probe=hidden,end=0.95"),
        ("DiCache", "F1B0_W6_T1O1_R0.2,gate=dicache,forecast=dicache,probe=hidden,end=0.95"),
    )
]

TAYLORSEER = [{"steps": 50, "interval": interval, "order": order} for interval in (4, 5, 6, 7, 8) for order in (1, 2)]


NEGATIVE = "blurry, noisy, dark picture with an umbrella"
WITH_NEGATIVE = {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}

QWENIMAGE_IMAGES = [
    {"prompt": CIRCLE, "seed": 0, "num_inference_steps": 8},
    {"prompt": SQUARE, **WITH_NEGATIVE, "seed": 5, "num_inference_steps": 10},
    {"prompt": CIRCLE, "seed": 8, "num_inference_steps": 12, "height": 48, "width": 80},
    {
        "prompt": [CIRCLE, DIAMOND],
        "negative_prompt": [NEGATIVE, NEGATIVE],
        "true_cfg_scale": 2.0,
        "seed": 3,
        "num_inference_steps": 8,
        "height": 32,
        "width": 48,
    },
    {"prompt": SQUARE, "seed": 4, "num_images_per_prompt": 2, "num_inference_steps": 8, "height": 48, "width": 32},
    {
        "prompt": [CIRCLE, "a dog"],
        "negative_prompt": ["blurry", NEGATIVE],
        "true_cfg_scale": 4.0,
        "seed": 6,
        "num_inference_steps": 8,
        "height": 32,
        "width": 48,
    },
]
"""The last one's prompts are not equally long, so that the shorter ones are padded, and the padding masked."""

QWENIMAGE_CACHED = [
    {"prompt": CIRCLE, **WITH_NEGATIVE, "seed": 0, "output_type": "latent", "config": tag}
    for tag in (
        "F1B0_W0M0MC0_T0O0_R0.13",
        "F1B0_W0M0MC0_T0O0_R0.27",
        "F1B0_W4M0MC3_T0O0_R0.24",
        "F3B2_W2M0MC3_T0O0_R0.13",
        "F1B0_W4M0MC0_T1O1_R0.2",
        "F1B0_W5M0MC3_T1O2_R0.3",
        "F1B0_W8I2M0MC8_T0O0_R0.8",
        "F1B0_W2M5MC0_T0O0_R0.3",
        "F1B0_W0M0MC0_T0O0_R0.3,max_accumulated_residual_diff=1.5",
        "F1B0_W0M0MC0_T0O0_R0.12,gate=static,steps_computation_mask=1111110110001100011000110001",
    )
]
QWENIMAGE_CACHED += [
    {"prompt": CIRCLE, **WITH_NEGATIVE, "seed": 2, "output_type": "latent", "num_inference_steps": 4, "config": tag}
    for tag in ("F1B0_W2M0MC1_T0O0_R0.8", "F2B2_W2M0MC1_T0O0_R0.8")
]
QWENIMAGE_CACHED.append({"prompt": SQUARE, "seed": 1, "output_type": "latent", "config": "F1B0_W0M0MC0_T0O0_R0.15"})

FLUX2_CALL = {"max_sequence_length": 42, "text_encoder_out_layers": [1, 2, 3]}
"""So long is each of these prompts behind the system message: diffusers and mindone differ in what padding says."""

FLUX2_IMAGES = [
    {"prompt": CIRCLE, **FLUX2_CALL, "seed": 0, "num_inference_steps": 8},
    {
        "prompt": SQUARE,
        **FLUX2_CALL,
        "seed": 5,
        "num_inference_steps": 10,
        "guidance_scale": 2.5,
        "height": 64,
        "width": 96,
    },
    {"prompt": [CIRCLE, DIAMOND], **FLUX2_CALL, "seed": 3, "num_inference_steps": 8, "height": 32, "width": 48},
    {
        "prompt": SQUARE,
        **FLUX2_CALL,
        "seed": 4,
        "num_images_per_prompt": 2,
        "num_inference_steps": 8,
        "height": 48,
        "width": 32,
    },
]

FLUX2_CACHED = [
    {"prompt": CIRCLE, **FLUX2_CALL, "seed": 0, "output_type": "latent", "config": tag}
    for tag in (
        "F1B0_W0M0MC0_T0O0_R0.1",
        "F1B0_W0M0MC0_T0O0_R0.25",
        "F1B0_W4M0MC3_T0O0_R0.24",
        "F2B2_W2M0MC3_T0O0_R0.16",
        "F4B1_W2M0MC3_T0O0_R0.15",
        "F1B0_W4M0MC0_T1O1_R0.2",
        "F1B0_W5M0MC3_T1O2_R0.3",
        "F1B0_W0M0MC0_T0O0_R0.12,gate=static,steps_computation_mask=1111110110001100011000110001",
        "F1B0_W0M0MC0_T0O0_R0.1,span=stacks,residual_diff_threshold_single=0.2",
        "F1B0_W2M0MC3_T0O0_R0.2,span=stacks,residual_diff_threshold_single=0.08",
        "F1B0_W4M0MC0_T1O1_R0.2,span=stacks,residual_diff_threshold_single=0.15",
    )
]
FLUX2_CACHED += [
    {"prompt": SQUARE, **FLUX2_CALL, "seed": 2, "output_type": "latent", "num_inference_steps": 4, "config": tag}
    for tag in ("F1B0_W2M0MC1_T0O0_R0.8", "F4B2_W2M0MC1_T0O0_R0.8")
]

BFLOAT16 = [
    {"seed": seed, "change": change, "apart": apart} for seed, change in ((0, 0.1), (1, 0.3)) for apart in (1, 3)
]
DISTANCES = (1, 2, 5)

LINEAR = [
    {"seed": 0, "rows": 1, "inputs": 96, "outputs": 40},
    {"seed": 1, "rows": 13, "inputs": 75, "outputs": 33},
    {"seed": 2, "rows": 40, "inputs": 1100, "outputs": 70},
]


def walk(case):
    """Five tensors (64, 48) of float32, each a little further from the first."""
    rng = np.random.default_rng(case["seed"])
    return (rng.normal(size=(64, 48)) + np.cumsum(rng.normal(size=(5, 64, 48)) * case["change"], 0)).astype(np.float32)


LATENTS = {
    "flux": lambda batch, height, width: (batch, height * width // 8**2, 16),
    "qwenimage": lambda batch, height, width: (batch, height * width // 16**2, 64),
    "flux2": lambda batch, height, width: (batch, 32, height // 16, width // 16),
}
"""The shape of the latents of a batch of pictures of so many pixels, by family."""


def call_arguments(case, tensor, family="flux"):
    """A case's keyword arguments for a pipeline; ``tensor`` makes the framework's tensor of a NumPy array."""
    arguments = {"height": 64, "width": 64, "num_inference_steps": 28, "max_sequence_length": 32, "output_type": "np"}
    arguments.update(case)
    for name in ("residual_diff_threshold", "taylorseer_derivative", "warmup_steps", "config", "code"):
        arguments.pop(name, None)
    batch = len(case["prompt"]) if isinstance(case["prompt"], list) else 1
    batch *= arguments.get("num_images_per_prompt", 1)
    shape = LATENTS[family](batch, arguments["height"], arguments["width"])
    noise = np.random.default_rng(arguments.pop("seed")).standard_normal(shape)
    return {**arguments, "latents": tensor(noise.astype(np.float32))}


def save(path, cases, results, versions):
    """Writes the cases, what each gave ({name: array}) and the versions that it came from."""
    arrays = {f"{name}_{index}": array for index, result in enumerate(results) for name, array in result.items()}
    np.savez_compressed(path, about=json.dumps({"cases": cases, "versions": versions}), **arrays)
