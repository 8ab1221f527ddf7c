"""What a call is given is checked before anything runs."""

from types import SimpleNamespace

import numpy as np
import pytest

import mindspore as ms

from FBCache_ms.pipelines.call_inputs import check_call, levels, whole

PROMPTS = ["a red circle", "a green square"]


def floats(*shape, dtype=ms.float32):
    return ms.Tensor(np.zeros(shape), dtype)


DEFAULTS = {
    "prompt": PROMPTS,
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "true_cfg_scale": 1.0,
    "num_images_per_prompt": 1,
    "max_sequence_length": 32,
    "output_type": "pil",
}
OTHERS = """prompt_2 negative_prompt negative_prompt_2 height width sigmas generator latents prompt_embeds
pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds negative_ip_adapter_image negative_ip_adapter_image_embeds
negative_prompt_embeds negative_pooled_prompt_embeds joint_attention_kwargs callback_on_step_end
callback_on_step_end_tensor_inputs""".split()


def check(pipe, **settings):
    given = SimpleNamespace(**{**dict.fromkeys(OTHERS), **DEFAULTS, **settings})
    check_call(pipe, given)
    return given


EMBEDS = {"prompt": None, "prompt_embeds": floats(2, 8, 64), "pooled_prompt_embeds": floats(2, 64)}
NEGATIVE = {"negative_prompt_embeds": floats(1, 8, 64), "negative_pooled_prompt_embeds": floats(1, 64)}


@pytest.mark.parametrize(
    "settings, pictures",
    [
        ({}, 2),
        ({"prompt": PROMPTS[0]}, 1),
        ({"prompt": PROMPTS[0], "num_images_per_prompt": 3, "latents": floats(3, 64, 16)}, 3),
        ({"num_inference_steps": np.int64(28), "height": np.int32(64), "width": 96, "latents": floats(2, 96, 16)}, 2),
        ({"prompt_2": PROMPTS, "negative_prompt": PROMPTS[0], "negative_prompt_2": PROMPTS}, 2),
        ({**EMBEDS, "num_images_per_prompt": 2, "generator": [np.random.default_rng(0)] * 4}, 4),
        ({**EMBEDS, **NEGATIVE}, 2),
        ({"sigmas": np.linspace(1, 0.1, 5), "generator": np.random.RandomState(0)}, 2),
        ({"joint_attention_kwargs": {"scale": 0.5}, "callback_on_step_end": print}, 2),
    ],
)
def test_what_can_be_drawn_passes(pipe, settings, pictures):
    given = check(pipe, **settings)
    assert given.pictures == pictures
    assert all(type(size) is int for size in (given.height, given.width, given.num_inference_steps))


@pytest.mark.parametrize(
    "settings, named",
    [
        *[({"num_inference_steps": steps}, "num_inference_steps") for steps in (6.0, True, "6", None, 0, 1001)],
        *[({"height": size}, "height") for size in (64.0, 65, -64, "64")],
        *[({name: value}, name) for name in ("guidance_scale", "true_cfg_scale") for value in (np.nan, "1", None)],
        *[({"num_images_per_prompt": number}, "num_images_per_prompt") for number in (0, 1.5, True)],
        *[({"max_sequence_length": length}, "max_sequence_length") for length in (0, 32.0, 513)],
        *[({"sigmas": values}, "sigmas") for values in ([1, np.nan], [[1, 0.5]], "abc", [1, "x"], 3)],
        ({"sigmas": []}, "sigmas"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [PROMPTS[0], 5]}, "prompt"),
        ({"prompt_2": PROMPTS * 2}, "prompt_2 lists 4 prompts; give one, or 2"),
        ({"prompt": PROMPTS[0], "negative_prompt": PROMPTS}, "negative_prompt lists 2 prompts; give one"),
        ({"negative_prompt": PROMPTS[0], "negative_prompt_2": PROMPTS * 2}, "negative_prompt_2"),
        ({**EMBEDS, "negative_prompt": [PROMPTS[0]] * 3}, "negative_prompt lists 3"),
        ({**EMBEDS, "prompt_embeds": np.zeros((2, 8, 64))}, "prompt_embeds must be a mindspore Tensor"),
        ({**EMBEDS, "prompt_embeds": floats(2, 8, 32)}, "prompt_embeds must be a .* of 2 x any x 64"),
        ({**EMBEDS, "prompt_embeds": floats(2, 64)}, "prompt_embeds"),
        ({**EMBEDS, "pooled_prompt_embeds": floats(3, 64)}, "pooled_prompt_embeds are for 3 prompts"),
        ({**EMBEDS, "pooled_prompt_embeds": floats(2, 65)}, "pooled_prompt_embeds must be a .* of 2 x 64"),
        ({**EMBEDS, **NEGATIVE, "negative_prompt_embeds": floats(3, 8, 64)}, "negative_prompt_embeds are for 3"),
        ({**NEGATIVE, "negative_pooled_prompt_embeds": floats(5, 64)}, "negative_pooled_prompt_embeds are for 5"),
        *[
            ({"latents": latents}, "latents must be a floating-point mindspore Tensor of 2 x 64 x 16, not")
            for latents in (
                floats(1, 64, 16),
                floats(2, 24, 16),
                floats(2, 64, 4),
                floats(2, 4, 16, 16),
                floats(2, 64, 16, dtype=ms.int32),
                np.zeros((2, 64, 16)),
                "noise",
            )
        ],
        ({"generator": 0}, "generator"),
        ({"generator": [np.random.default_rng(0)] * 3}, "generator lists 3 for 2 pictures"),
        ({"generator": [1, 2]}, "generator"),
        ({"ip_adapter_image": np.zeros((64, 64, 3))}, "ip_adapter_image is given, but no IP adapter is loaded"),
        ({"joint_attention_kwargs": [1]}, "joint_attention_kwargs"),
        ({"joint_attention_kwargs": {"scale": "half"}}, "scale"),
        ({"callback_on_step_end": 5}, "callback_on_step_end"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(pipe, settings, named):
    with pytest.raises(ValueError, match=named) as caught:
        check(pipe, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part, settings, named",
    [
        ("vae", {}, "output_type must be 'latent'"),
        ("text_encoder_2", {}, "text_encoder_2 is None, so prompt cannot be read; give prompt_embeds"),
        ("tokenizer", {**EMBEDS, "negative_prompt": "x"}, "tokenizer is None, so negative_prompt"),
        ("transformer", {}, "transformer is None"),
        ("scheduler", {}, "scheduler is None"),
    ],
)
def test_a_part_that_is_not_there_is_named(pipe, monkeypatch, part, settings, named):
    monkeypatch.setitem(pipe.__dict__, part, None)
    with pytest.raises(ValueError, match=named):
        check(pipe, **settings)


def test_noise_levels_may_come_as_any_list():
    for given in ([1, 0.5], (1, 0.5), np.array([1, 0.5]), ms.Tensor([1, 0.5], ms.float32)):
        np.testing.assert_array_equal(levels(given), [1, 0.5])


def test_a_whole_numbers_range_is_told():
    for bounds, words in (((), "a whole number,"), ((1,), "from 1 on,"), ((1, 5), r"in \[1, 5\],")):
        with pytest.raises(ValueError, match=f"n must be {'a whole number ' if 'whole' not in words else ''}{words}"):
            whole("n", 0.5, *bounds)
