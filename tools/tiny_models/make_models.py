"""Makes a small checkpoint of another family than FLUX.1, in diffusers layout: qwenimage or flux2.

.venv/bin/python tools/tiny_models/make_models.py results/tiny_qwenimage qwenimage

Nothing is trained and nothing is downloaded: the weights are random, of one seed, and the tokenizer knows the words
below and spells all others. The pictures show nothing, but they differ with the prompt, and the scales of the weights
are such that First-Block Cache reuses some steps and computes others at thresholds between 0.05 and 0.5.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WORDS = """Describe image by detailing the color shape size texture quantity text spatial relationships of objects and
background a an big small huge tiny red green blue yellow white black purple orange circle square triangle diamond star
in on at with over under beside above below center left right top bottom behind before no blurry dark bright noisy
picture cat dog house tree river photo painting drawing"""
"""What follows a space and is one token, among it what Qwen-Image's template says."""

FIRST_WORDS = "system user assistant Describe"
"""What begins a line and is one token."""

FLUX2_WORDS = """are AI that reasons about descriptions You give structured responses focusing object actions without
speculation"""
"""What FLUX.2's system message says beside."""

FLUX2_FIRST_WORDS = "You attribution"
"""What begins its lines."""

FLUX2_LAYERS = [1, 2, 3]
"""The tiny FLUX.2's text_encoder_out_layers, which a call has to name: its text encoder has four layers."""


class Weights(dict):
    """Random tensors of one model by name, in the order in which they are asked for."""

    def __init__(self, seed):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def add(self, name, shape, scale, mean=0.0):
        """A tensor of normal numbers."""
        self[name] = (mean + scale * self.rng.standard_normal(shape)).astype(np.float32)

    def linear(self, name, outputs, inputs, scale=1.0, bias=0.1, kernel=()):
        """A layer (outputs, inputs, *kernel) that keeps its input's spread times scale; bias=None for none."""
        self.add(f"{name}.weight", (outputs, inputs, *kernel), scale / np.sqrt(inputs * np.prod(kernel)))
        if bias is not None:
            self.add(f"{name}.bias", (outputs,), bias)

    def norm(self, name, shape):
        """A normalization's weights, about 1."""
        self.add(name, shape, 0.1, 1.0)

    def save(self, path):
        """Writes the tensors into a new folder's file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self, path, metadata={"format": "pt"})


def write(path, content):
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def byte_symbols():
    """The character that stands for each of the 256 bytes in a byte-level vocabulary: itself where it is printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def byte_pairs(words, first_words):
    """The tokens of a byte-level vocabulary, and the merges that put these words together letter by letter."""
    symbols = byte_symbols()
    words = [symbols[ord(" ")] + word for word in words.split()] + first_words.split()
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    return [*symbols, *dict.fromkeys("".join(pair) for pair in merges)], merges


def make_qwen_tokenizer(folder):
    """Writes a Qwen2Tokenizer; returns {token: id}."""
    tokens, merges = byte_pairs(WORDS, FIRST_WORDS)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {token: index for index, token in enumerate([*tokens, *specials])}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(ids[token]): {"content": token, **flags} for token in specials},
        "additional_special_tokens": specials[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 2048,
    }
    write(folder / "tokenizer_config.json", settings)
    write(folder / "vocab.json", {token: ids[token] for token in tokens})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return ids


def add_decoder_layers(weights, prefix, config, bias):
    """The layers of a language model: attention with fewer heads of keys and values, and a gated feed-forward."""
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    rows = {"q": heads * head, "k": config["num_key_value_heads"] * head, "v": config["num_key_value_heads"] * head}
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}.layers.{layer}"
        for part, outputs in rows.items():
            weights.linear(f"{name}.self_attn.{part}_proj", outputs, width, bias=bias)
        weights.linear(f"{name}.self_attn.o_proj", width, heads * head, bias=None)
        for part, (outputs, inputs) in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            weights.linear(f"{name}.mlp.{part}_proj", outputs, inputs, bias=None)
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights.norm(f"{name}.{part}.weight", width)
    weights.norm(f"{prefix}.norm.weight", width)


def make_qwen_encoder(folder, ids, width):
    """Writes a Qwen2_5_VLForConditionalGeneration whose hidden states are so wide, with a vision tower for form."""
    text = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "default",
            "rope_type": "default",
            "mrope_section": [width // 16, width // 16, width // 8],
        },
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "hidden_act": "silu",
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision,
        "hidden_size": width,
        "vocab_size": len(ids),
        "rope_scaling": text["rope_scaling"],
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    # The prompts have no pictures: these tokens are never there.
    for token in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        config[token] = len(ids) + 1
    weights = Weights(1)
    weights.add("model.embed_tokens.weight", (len(ids), width), 1.0)
    add_decoder_layers(weights, "model", text, bias=0.1)
    weights.linear("lm_head", len(ids), width, bias=None)
    inner, patch = vision["hidden_size"], (vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    weights.linear("visual.patch_embed.proj", inner, vision["in_channels"], bias=None, kernel=patch)
    block, merged = "visual.blocks.0", inner * vision["spatial_merge_size"] ** 2
    layers = {"attn.qkv": 3 * inner, "attn.proj": inner, "mlp.gate_proj": inner, "mlp.up_proj": inner}
    for name, outputs in {**layers, "mlp.down_proj": inner}.items():
        weights.linear(f"{block}.{name}", outputs, inner)
    weights.linear("visual.merger.mlp.0", merged, merged)
    weights.linear("visual.merger.mlp.2", width, merged)
    for name in (f"{block}.norm1", f"{block}.norm2", "visual.merger.ln_q"):
        weights.norm(f"{name}.weight", inner)
    write(folder / "config.json", config)
    weights.save(folder / "model.safetensors")


def add_timestep_embedder(weights, name, width, bias=0.1):
    """Two layers on 256 cosines and sines of 1000 t; the fast ones count little, so that steps are like the next."""
    weights.linear(f"{name}.linear_1", width, 256, scale=18.0, bias=bias)
    frequencies = 1000 * 10000 ** (-np.arange(128) / 128)
    weights[f"{name}.linear_1.weight"] /= (1 + np.tile(frequencies / 2, 2) ** 2).astype(np.float32)
    weights.linear(f"{name}.linear_2", width, width, bias=bias)


def make_qwen_transformer(folder, width, blocks=6):
    """Writes a QwenImageTransformer2DModel of so many blocks for hidden states so wide."""
    config = {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": "0.35.2",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": width,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    }
    inner, weights = config["num_attention_heads"] * config["attention_head_dim"], Weights(2)
    weights.linear("img_in", inner, config["in_channels"])
    weights.norm("txt_norm.weight", width)
    weights.linear("txt_in", inner, width)
    add_timestep_embedder(weights, "time_text_embed.timestep_embedder", inner)
    for layer in range(config["num_layers"]):
        block = f"transformer_blocks.{layer}"
        for stream in ("img", "txt"):
            weights.linear(f"{block}.{stream}_mod.1", 6 * inner, inner, bias=0.3)
            weights.linear(f"{block}.{stream}_mlp.net.0.proj", 4 * inner, inner)
            weights.linear(f"{block}.{stream}_mlp.net.2", inner, 4 * inner)
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            # The text has a loud voice, so that both branches of true CFG decide each in its own way.
            weights.linear(f"{block}.attn.{part}", inner, inner, scale=4.0 if part == "add_v_proj" else 1.0)
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            weights.norm(f"{block}.attn.{part}.weight", config["attention_head_dim"])
    weights.linear("norm_out.linear", 2 * inner, inner, scale=0.5)
    weights.linear("proj_out", config["patch_size"] ** 2 * config["out_channels"], inner)
    write(folder / "config.json", config)
    weights.save(folder / "diffusion_pytorch_model.safetensors")


class VideoWeights(Weights):
    """Those of Qwen-Image's autoencoder."""

    def residual(self, name, inputs, outputs):
        """A residual block."""
        self.norm(f"{name}.norm1.gamma", (inputs, 1, 1, 1))
        self.linear(f"{name}.conv1", outputs, inputs, kernel=(3, 3, 3))
        self.norm(f"{name}.norm2.gamma", (outputs, 1, 1, 1))
        self.linear(f"{name}.conv2", outputs, outputs, kernel=(3, 3, 3))
        if inputs != outputs:
            self.linear(f"{name}.conv_shortcut", outputs, inputs, kernel=(1, 1, 1))

    def middle(self, name, channels):
        """Two residual blocks and the attention between them."""
        for index in range(2):
            self.residual(f"{name}.resnets.{index}", channels, channels)
        self.norm(f"{name}.attentions.0.norm.gamma", (channels, 1, 1))
        self.linear(f"{name}.attentions.0.to_qkv", 3 * channels, channels, kernel=(1, 1))
        self.linear(f"{name}.attentions.0.proj", channels, channels, kernel=(1, 1))

    def resampling(self, name, outputs, inputs, frames=None):
        """A change of size, with so many channels of frames where the number of frames changes too."""
        self.linear(f"{name}.resample.1", outputs, inputs, kernel=(3, 3))
        if frames is not None:
            self.linear(f"{name}.time_conv", frames, inputs, kernel=(3, 1, 1))

    def ends(self, name, first, last):
        """The convolutions at both ends, (outputs, inputs), and the norm before the last."""
        self.linear(f"{name}.conv_in", *first, kernel=(3, 3, 3))
        self.norm(f"{name}.norm_out.gamma", (last[1], 1, 1, 1))
        self.linear(f"{name}.conv_out", *last, scale=0.5, kernel=(3, 3, 3))


def make_qwen_vae(folder):
    """Writes an AutoencoderKLQwenImage with 16 latent channels and a factor of 8."""
    config = {
        "_class_name": "AutoencoderKLQwenImage",
        "_diffusers_version": "0.35.2",
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": np.round(np.linspace(-0.5, 0.5, 16), 4).tolist(),
        "latents_std": np.round(np.linspace(0.8, 1.6, 16), 4).tolist(),
    }
    latent, down, weights = config["z_dim"], config["temperal_downsample"], VideoWeights(3)
    widths = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
    weights.ends("encoder", (widths[0], 3), (2 * latent, widths[-1]))
    index = 0
    for level, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        weights.residual(f"encoder.down_blocks.{index}", inputs, outputs)
        index += 1
        if level < len(down):
            frames = outputs if down[level] else None
            weights.resampling(f"encoder.down_blocks.{index}", outputs, outputs, frames)
            index += 1
    weights.middle("encoder.mid_block", widths[-1])
    weights.linear("quant_conv", 2 * latent, 2 * latent, kernel=(1, 1, 1))
    weights.linear("post_quant_conv", latent, latent, kernel=(1, 1, 1))
    widths = [config["base_dim"] * factor for factor in (config["dim_mult"][-1], *config["dim_mult"][::-1])]
    weights.ends("decoder", (widths[0], latent), (3, widths[-1]))
    weights.middle("decoder.mid_block", widths[0])
    for level, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        block = f"decoder.up_blocks.{level}"
        # Every change of size but the first leaves half as many channels to the next level.
        weights.residual(f"{block}.resnets.0", inputs // 2 if level else inputs, outputs)
        weights.residual(f"{block}.resnets.1", outputs, outputs)
        if level < len(down):
            frames = 2 * outputs if down[::-1][level] else None
            weights.resampling(f"{block}.upsamplers.0", outputs // 2, outputs, frames)
    write(folder / "config.json", config)
    weights.save(folder / "diffusion_pytorch_model.safetensors")


class PictureWeights(Weights):
    """Those of FLUX.2's autoencoder."""

    def residual(self, name, inputs, outputs):
        """A residual block."""
        for index, channels in (("1", inputs), ("2", outputs)):
            self.norm(f"{name}.norm{index}.weight", (channels,))
            self.add(f"{name}.norm{index}.bias", (channels,), 0.1)
            self.linear(f"{name}.conv{index}", outputs, channels, kernel=(3, 3))
        if inputs != outputs:
            self.linear(f"{name}.conv_shortcut", outputs, inputs, kernel=(1, 1))

    def middle(self, name, channels):
        """Two residual blocks and the attention between them."""
        for index in range(2):
            self.residual(f"{name}.resnets.{index}", channels, channels)
        self.norm(f"{name}.attentions.0.group_norm.weight", (channels,))
        self.add(f"{name}.attentions.0.group_norm.bias", (channels,), 0.1)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            self.linear(f"{name}.attentions.0.{part}", channels, channels)

    def ends(self, name, first, last):
        """The convolutions at both ends, (outputs, inputs), and the norm before the last."""
        self.linear(f"{name}.conv_in", *first, kernel=(3, 3))
        self.norm(f"{name}.conv_norm_out.weight", (last[1],))
        self.add(f"{name}.conv_norm_out.bias", (last[1],), 0.1)
        self.linear(f"{name}.conv_out", *last, scale=0.3, kernel=(3, 3))

    def level(self, name, inputs, outputs, blocks, change):
        """Residual blocks, and a change of size where one has a name."""
        for index in range(blocks):
            self.residual(f"{name}.resnets.{index}", inputs if index == 0 else outputs, outputs)
        if change is not None:
            self.linear(f"{name}.{change}.0.conv", outputs, outputs, kernel=(3, 3))


def make_flux2_vae(folder):
    """Writes an AutoencoderKLFlux2 with 8 latent channels and a factor of 8; returns the number of channels."""
    widths = [8, 16, 16, 32]
    config = {
        "_class_name": "AutoencoderKLFlux2",
        "_diffusers_version": "0.36.0",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 8,
        "norm_num_groups": 4,
        "sample_size": 64,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    }
    latent, weights, last = config["latent_channels"], PictureWeights(3), len(widths) - 1
    weights.ends("encoder", (widths[0], 3), (2 * latent, widths[-1]))
    weights.middle("encoder.mid_block", widths[-1])
    weights.ends("decoder", (widths[-1], latent), (3, widths[0]))
    weights.middle("decoder.mid_block", widths[-1])
    for index, outputs in enumerate(widths):
        change = "downsamplers" if index < last else None
        weights.level(f"encoder.down_blocks.{index}", widths[max(index - 1, 0)], outputs, 1, change)
    for index, outputs in enumerate(widths[::-1]):
        change = "upsamplers" if index < last else None
        weights.level(f"decoder.up_blocks.{index}", widths[::-1][max(index - 1, 0)], outputs, 2, change)
    weights.linear("quant_conv", 2 * latent, 2 * latent, kernel=(1, 1))
    weights.linear("post_quant_conv", latent, latent, kernel=(1, 1))
    weights.add("bn.running_mean", (4 * latent,), 0.3)
    weights["bn.running_var"] = np.linspace(0.6, 1.8, 4 * latent).astype(np.float32)
    weights["bn.num_batches_tracked"] = np.array(1)
    write(folder / "config.json", config)
    weights.save(folder / "diffusion_pytorch_model.safetensors")
    return latent


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- set kind = "SYSTEM_PROMPT" if message.role == "system" else "INST" %}[{{ kind }}]
{%- for part in message.content %}{{ part.text if part.type == "text" else "[IMG]" }}{% endfor %}[/{{ kind }}]
{%- endfor %}"""
"""Each message between tokens that say whose it is."""


def make_flux2_tokenizer(folder):
    """Writes a PixtralProcessor; returns {token: id}."""
    tokens, merges = byte_pairs(f"{WORDS} {FLUX2_WORDS}", f"{FIRST_WORDS} {FLUX2_FIRST_WORDS}")
    specials = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    specials += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    ids = {token: index for index, token in enumerate([*specials, *tokens])}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    bytes_of_words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in specials],
        "normalizer": None,
        "pre_tokenizer": bytes_of_words,
        "post_processor": None,
        "decoder": bytes_of_words,
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "PixtralProcessor",
        "added_tokens_decoder": {str(ids[token]): {"content": token, **flags} for token in specials},
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    pictures = {"image_processor_type": "PixtralImageProcessor", "patch_size": 4, "size": {"longest_edge": 64}}
    write(folder / "tokenizer.json", tokenizer)
    write(folder / "tokenizer_config.json", settings)
    write(folder / "preprocessor_config.json", {"processor_class": "PixtralProcessor", **pictures})
    write(
        folder / "processor_config.json",
        {"processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return ids


def make_mistral_encoder(folder, ids, width, layers):
    """Writes a Mistral3ForConditionalGeneration of so many layers and so wide, with a vision tower for form."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_channels": 3,
        "image_size": 64,
        "patch_size": 4,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
    }
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": ids["[IMG]"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
        "spatial_merge_size": 2,
        "dtype": "float32",
    }
    weights = Weights(1)
    weights.add("language_model.model.embed_tokens.weight", (len(ids), width), 1.0)
    add_decoder_layers(weights, "language_model.model", text, bias=None)
    weights.linear("language_model.lm_head", len(ids), width, bias=None)
    inner, patch = vision["hidden_size"], (vision["patch_size"], vision["patch_size"])
    weights.linear("vision_tower.patch_conv", inner, vision["num_channels"], bias=None, kernel=patch)
    layer = "vision_tower.transformer.layers.0"
    for part in ("q", "k", "v", "o"):
        weights.linear(f"{layer}.attention.{part}_proj", inner, inner, bias=None)
    for part in ("gate", "up", "down"):
        weights.linear(f"{layer}.feed_forward.{part}_proj", inner, inner, bias=None)
    merged = inner * config["spatial_merge_size"] ** 2
    weights.linear("multi_modal_projector.patch_merger.merging_layer", inner, merged, bias=None)
    weights.linear("multi_modal_projector.linear_1", width, inner, bias=None)
    weights.linear("multi_modal_projector.linear_2", width, width, bias=None)
    norms = "vision_tower.ln_pre", f"{layer}.attention_norm", f"{layer}.ffn_norm", "multi_modal_projector.norm"
    for name in norms:
        weights.norm(f"{name}.weight", inner)
    write(folder / "config.json", config)
    weights.save(folder / "model.safetensors")


def make_flux2_transformer(folder, channels, width):
    """Writes a Flux2Transformer2DModel of 3 + 5 blocks for so many channels of latents and hidden states so wide."""
    config = {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": "0.36.0",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None,
        "num_layers": 3,
        "num_single_layers": 5,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": width,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": [8, 8, 8, 8],
        "rope_theta": 2000,
        "eps": 1e-6,
    }
    inner, head, weights = config["num_attention_heads"] * config["attention_head_dim"], 32, Weights(2)
    hidden = int(inner * config["mlp_ratio"])
    weights.linear("x_embedder", inner, channels, bias=None)
    weights.linear("context_embedder", inner, width, bias=None)
    for part in ("timestep", "guidance"):
        add_timestep_embedder(weights, f"time_guidance_embed.{part}_embedder", inner, bias=None)
    for name, sets in {"double_stream_modulation_img": 2, "double_stream_modulation_txt": 2}.items():
        weights.linear(f"{name}.linear", 3 * sets * inner, inner, bias=None)
    weights.linear("single_stream_modulation.linear", 3 * inner, inner, bias=None)
    for layer in range(config["num_layers"]):
        block = f"transformer_blocks.{layer}"
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            weights.linear(f"{block}.attn.{part}", inner, inner, scale=4.0 if part == "add_v_proj" else 1.0, bias=None)
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            weights.norm(f"{block}.attn.{part}.weight", head)
        for part in ("ff", "ff_context"):
            weights.linear(f"{block}.{part}.linear_in", 2 * hidden, inner, bias=None)
            weights.linear(f"{block}.{part}.linear_out", inner, hidden, bias=None)
    for layer in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{layer}"
        weights.linear(f"{block}.attn.to_qkv_mlp_proj", 3 * inner + 2 * hidden, inner, bias=None)
        weights.linear(f"{block}.attn.to_out", inner, inner + hidden, bias=None)
        for part in ("norm_q", "norm_k"):
            weights.norm(f"{block}.attn.{part}.weight", head)
    weights.linear("norm_out.linear", 2 * inner, inner, scale=0.5, bias=None)
    weights.linear("proj_out", channels, inner, bias=None)
    write(folder / "config.json", config)
    weights.save(folder / "diffusion_pytorch_model.safetensors")


def make_scheduler(folder, **settings):
    """Writes a FlowMatchEulerDiscreteScheduler."""
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.35.2",
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "base_image_seq_len": 256,
        "time_shift_type": "exponential",
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }
    write(folder / "scheduler_config.json", {**config, **settings})


def make_qwenimage(folder):
    """Writes a checkpoint of Qwen-Image's kind."""
    ids = make_qwen_tokenizer(folder / "tokenizer")
    make_qwen_encoder(folder / "text_encoder", ids, 64)
    make_qwen_transformer(folder / "transformer", 64)
    make_qwen_vae(folder / "vae")
    make_scheduler(folder / "scheduler", max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02)
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    write(
        folder / "model_index.json", {"_class_name": "QwenImagePipeline", "_diffusers_version": "0.35.2", **components}
    )


def make_flux2(folder, layers=max(FLUX2_LAYERS) + 1):
    """Writes a checkpoint of FLUX.2's kind, with so many layers in its text encoder."""
    ids, width = make_flux2_tokenizer(folder / "tokenizer"), 32
    make_mistral_encoder(folder / "text_encoder", ids, width, layers)
    latent = make_flux2_vae(folder / "vae")
    make_flux2_transformer(folder / "transformer", 4 * latent, len(FLUX2_LAYERS) * width)
    make_scheduler(folder / "scheduler", max_image_seq_len=4096, max_shift=1.15, shift=3.0, shift_terminal=None)
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write(folder / "model_index.json", {"_class_name": "Flux2Pipeline", "_diffusers_version": "0.36.0", **components})


FAMILIES = {"qwenimage": make_qwenimage, "flux2": make_flux2}


def make(folder, family, **settings):
    """Writes a family's checkpoint into a new folder; returns the folder. ``settings`` are those of its function.

    Raises ValueError for a family that is not in FAMILIES.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    FAMILIES[family](Path(folder), **settings)
    return Path(folder)


if __name__ == "__main__":
    # So many that programs, which name no layers, find those that FLUX.2's are.
    make(sys.argv[1], sys.argv[2], **({"layers": 31} if sys.argv[2] == "flux2" else {}))
