"""Trains the embedded checkpoint, FBCache_ms/tiny_flux: a small Flux that draws the scenes of eval/shared/scenes.py.

    python -m venv tools/tiny_flux/venv
    tools/tiny_flux/venv/bin/pip install -r tools/tiny_flux/requirements.txt
    export PYTHONPATH=.
    tools/tiny_flux/venv/bin/python tools/tiny_flux/train.py --work /tmp/tiny_flux --out FBCache_ms/tiny_flux

Four stages, each of which leaves its result in the work folder and is passed over when that is there already:
tokenizers, an autoencoder, rectified flow in its latents (with both text encoders, from random weights), and guidance
distillation (https://arxiv.org/abs/2210.03142). A stage that was killed goes on from its last checkpoint.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from FBCache_ms.eval.shared.scenes import JITTER, PLACES, SIZES, draw, is_held_out, parse_caption, random_scene

IMAGE_SIZE = 64
TEXT_LENGTH = 32
OBJECT_WEIGHT = 8
LONG_TEXT_LENGTH = 512
"""The padding that mindone and diffusers ask for unless told otherwise; the model has to be at home there too."""


def draw_batch(rng, number):
    """``number`` captions that are not held out, and their pictures as (number, 3, 64, 64) in [-1, 1]."""
    captions, pictures = [], []
    while len(captions) < number:
        scene = random_scene(rng)
        if not is_held_out(str(scene)):
            captions.append(str(scene))
            pictures.append(np.asarray(draw(scene, IMAGE_SIZE, rng)))
    return captions, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_tokenizers(work):
    """Both tokenizers, over the words of the captions; letter by letter they can spell any other English text."""
    rng = np.random.default_rng(0)
    captions = [str(random_scene(rng)) for _ in range(5000)]

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=TEXT_LENGTH).save_pretrained(folder)

    vocabulary = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in vocabulary] + [(",", -1.0)]
    pieces += [(letter, -10.0) for letter in ["▁", *map(chr, range(33, 127))] if letter != ","]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=TEXT_LENGTH).save_pretrained(
        work / "tokenizer_2"
    )


def make_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(work, steps, batch=16, peak=2e-3):
    """The autoencoder: L1 and a trace of KL; its latents' mean and spread go into its config."""
    torch.manual_seed(0)
    vae = make_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    begin = resume(work / "vae.pt", vae=vae, optimizer=optimizer)
    for step in watched("vae", begin, steps):
        set_rate(optimizer, peak, step, steps)
        _, pictures = draw_batch(np.random.default_rng((1, step)), batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures.to(memory_format=torch.channels_last)).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded.float(), pictures) + 1e-6 * posterior.kl().float().mean() / 1024
        descend(optimizer, vae, loss)
        if step % 100 == 99:
            tqdm.write(f"vae {step + 1}: {loss.item():.4f}")
            save(work / "vae.pt", step + 1, vae=vae, optimizer=optimizer)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    latents = encode_scenes(vae, 512, seed=2)[1]
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode_scenes(vae, number, seed):
    """Captions and raw latents (number, 4, 16, 16) of fresh scenes."""
    captions, latents = [], []
    for start in tqdm(range(0, number, 64), desc="encode", mininterval=10):
        some, pictures = draw_batch(np.random.default_rng((seed, start)), min(64, number - start))
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(pictures).latent_dist.mode().float())
        captions += some
    return captions, torch.cat(latents)


class TinyFlux(torch.nn.Module):
    """What the flow stage trains: the transformer and both text encoders."""

    def __init__(self, work):
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.tokenizer_2 = T5TokenizerFast.from_pretrained(work / "tokenizer_2")
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=64,
                intermediate_size=256,
                projection_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer_2),
                d_model=64,
                d_kv=16,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                use_cache=False,
                is_encoder_decoder=False,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        self.transformer.set_attention_backend("_native_math")
        for name, module in self.transformer.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")):
                if "single_transformer_blocks" not in name or name.endswith("norm.linear"):
                    torch.nn.init.zeros_(module.weight)
                    torch.nn.init.zeros_(module.bias)

    def tokenize(self, captions, length):
        clip = self.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
        t5 = self.tokenizer_2(captions, padding="max_length", max_length=length, truncation=True)
        return torch.tensor(clip.input_ids), torch.tensor(t5.input_ids)

    def forward(self, latents, sigma, guidance, clip_ids, t5_ids):
        """The velocity (B, 64, 16) at packed latents of that shape, sigma (B,) in (0, 1], guidance (B,)."""
        pooled = self.text_encoder(clip_ids).pooler_output
        words = self.text_encoder_2(t5_ids).last_hidden_state
        side = IMAGE_SIZE // 8
        image_ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, side, side)), indexing="ij"), -1).view(-1, 3)
        return self.transformer(
            latents,
            words,
            pooled,
            sigma,
            image_ids.float(),
            torch.zeros(t5_ids.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0].float()


def training_batch(rng, captions, latents, batch):
    """Clean and noisy packed latents, sigma, the noise, guidance in [1, 5], and captions, one in ten left empty."""
    chosen = rng.integers(len(captions), size=batch)
    texts = [captions[index] if rng.random() > 0.1 else "" for index in chosen]
    clean = FluxPipeline._pack_latents(latents[chosen], batch, 4, 16, 16)
    noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
    sigma = torch.from_numpy(1 / (1 + np.exp(-rng.normal(0.47, 1.0, batch)))).float()
    guidance = torch.from_numpy(rng.uniform(1, 5, batch)).float()
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    return clean, noisy, noise, sigma, guidance, texts


def token_weights(captions):
    """How much each of the 64 latent tokens counts, (B, 64, 1), of mean 1: those where the caption puts an object more.

    They depend on the caption alone, so that the velocity which minimises the loss stays the same.
    """
    side = IMAGE_SIZE // 8
    centres = (np.arange(side) + 0.5) / side
    weights = np.ones((len(captions), side, side), np.float32)
    for index, caption in enumerate(captions):
        for thing in parse_caption(caption).things if caption else ():
            x, y = PLACES[thing.place]
            reach = 1.2 * SIZES[thing.size] + JITTER + 0.5 / side
            weights[index][(abs(centres - y) < reach)[:, None] & (abs(centres - x) < reach)] = OBJECT_WEIGHT
    weights /= weights.mean((1, 2), keepdims=True)
    return torch.from_numpy(weights).view(len(captions), -1, 1)


def scene_latents(work, vae, number):
    """Captions and raw latents of the scenes that the flow is trained on, kept in the work folder."""
    path = work / "scenes.pt"
    if not path.exists():
        torch.save(encode_scenes(vae, number, seed=3), path)
    return torch.load(path)


def train_flow(work, steps, batch=32, peak=1e-3, scenes=48_000):
    """Rectified flow: the velocity noise - clean, times drawn logit-normally, weights averaged."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    captions, latents = scene_latents(work, vae, scenes)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    torch.manual_seed(0)
    model = TinyFlux(work)
    average = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    begin = resume(work / "flow.pt", model=model, average=average, optimizer=optimizer)
    compile_blocks(model)
    total = 0.0
    for step in watched("flow", begin, steps):
        set_rate(optimizer, peak, step, steps)
        rng = np.random.default_rng((4, step))
        length, size = (LONG_TEXT_LENGTH, batch // 4) if step % 16 == 15 else (TEXT_LENGTH, batch)
        clean, noisy, noise, sigma, guidance, texts = training_batch(rng, captions, latents, size)
        ids = model.tokenize(texts, length)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(noisy, sigma, guidance, *ids)
        loss = (token_weights(texts) * (velocity - (noise - clean)) ** 2).mean()
        descend(optimizer, model, loss)
        update_average(average, model, min(0.999, (step + 1) / (step + 10)))
        total += loss.item()
        if step % 200 == 199:
            tqdm.write(f"flow {step + 1}: {total / 200:.4f}")
            total = 0.0
            save(work / "flow.pt", step + 1, model=model, average=average, optimizer=optimizer)
    torch.save(average.state_dict(), work / "flow_average.pt")


def distill_guidance(work, steps, batch=32, peak=3e-4, scenes=48_000):
    """Teaches the guidance input: at guidance g the velocity is u + g (c - u), c and u the flow stage's own.

    c is its velocity for the caption, u the one for no caption.
    """
    vae = AutoencoderKL.from_pretrained(work / "vae")
    captions, latents = scene_latents(work, vae, scenes)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    teacher = TinyFlux(work)
    teacher.load_state_dict(torch.load(work / "flow_average.pt"))
    model, average = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizer = make_optimizer(model)
    begin = resume(work / "distill.pt", model=model, average=average, optimizer=optimizer)
    compile_blocks(model)
    compile_blocks(teacher)
    for step in watched("distill", begin, steps):
        set_rate(optimizer, peak, step, steps)
        rng = np.random.default_rng((5, step))
        length, size = (LONG_TEXT_LENGTH, batch // 4) if step % 16 == 15 else (TEXT_LENGTH, batch)
        _, noisy, _, sigma, guidance, texts = training_batch(rng, captions, latents, size)
        ids, no_ids = model.tokenize(texts, length), model.tokenize([""] * size, length)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                without = teacher(noisy, sigma, guidance, *no_ids)
                target = without + guidance[:, None, None] * (teacher(noisy, sigma, guidance, *ids) - without)
            velocity = model(noisy, sigma, guidance, *ids)
        loss = (token_weights(texts) * (velocity - target) ** 2).mean()
        descend(optimizer, model, loss)
        update_average(average, model, min(0.99, (step + 1) / (step + 10)))
        if step % 100 == 99:
            tqdm.write(f"distill {step + 1}: {loss.item():.4f}")
            save(work / "distill.pt", step + 1, model=model, average=average, optimizer=optimizer)
    torch.save(average.state_dict(), work / "distilled.pt")


def export(work, out):
    """The pipeline in diffusers layout, float32."""
    model = TinyFlux(work)
    state = work / "distilled.pt"
    model.load_state_dict(torch.load(state if state.exists() else work / "flow_average.pt"))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer_2,
        transformer=model.transformer,
    )
    pipeline.save_pretrained(out)
    config = json.loads((out / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)
    (out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def compile_blocks(model):
    for block in [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]:
        block.compile()


def make_optimizer(model):
    """AdamW, faster for the text encoders and faster still for T5's position biases.

    Only these tell T5 which words stand together, and they begin near 0 where they have to grow to several units.
    """
    groups = {1: [], 3: [], 20: []}
    for name, parameter in model.named_parameters():
        faster = 20 if "relative_attention_bias" in name else 3 if name.startswith("text_encoder") else 1
        groups[faster].append(parameter)
    groups = [{"params": parameters, "faster": faster} for faster, parameters in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)


def set_rate(optimizer, peak, step, steps):
    rate = peak * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = max(rate, 1e-2 * peak) * group.get("faster", 1)


def descend(optimizer, model, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_average(average, model, decay):
    for kept, new in zip(average.parameters(), model.parameters()):
        kept.lerp_(new, 1 - decay)


def watched(name, begin, steps):
    return tqdm(range(begin, steps), desc=name, initial=begin, total=steps, mininterval=10)


def save(path, step, **parts):
    new = path.with_suffix(".new")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, new)
    new.replace(path)


def resume(path, **parts):
    """Loads a stage's last checkpoint, if there is one, and says at which step to go on."""
    if not path.exists():
        return 0
    state = torch.load(path)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="where the finished pipeline goes")
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--flow-steps", type=int, default=10400)
    parser.add_argument("--distill-steps", type=int, default=800)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "tokenizer_2").exists():
        make_tokenizers(args.work)
    if not (args.work / "vae").exists():
        train_vae(args.work, args.vae_steps)
    if not (args.work / "flow_average.pt").exists():
        train_flow(args.work, args.flow_steps)
    if args.distill_steps and not (args.work / "distilled.pt").exists():
        distill_guidance(args.work, args.distill_steps)
    export(args.work, args.out)


if __name__ == "__main__":
    main()
