"""Trains a small Qwen-Image that draws the scenes of eval/shared/scenes.py, 64 x 64, for true classifier-free guidance.

    python -m venv tools/tiny_flux/venv
    tools/tiny_flux/venv/bin/pip install -r tools/tiny_flux/requirements.txt
    export PYTHONPATH=.:tools/tiny_flux:tools/tiny_models
    tools/tiny_flux/venv/bin/python tools/tiny_qwenimage/train_qwenimage.py --work results/training --out results/qwen

The tokenizer and the forms of the text encoder are those of tools/tiny_models; the autoencoder is Qwen-Image's own, of
a factor of 4, so that a picture has 64 tokens as with the embedded Flux. Two stages, each of which leaves its result in
the work folder: the autoencoder, and rectified flow in its latents, with the text encoder from random weights. A stage
that was killed goes on from its last checkpoint.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from make_models import make
from torch.nn import functional as F
from tqdm import tqdm
from train import descend, draw_batch, resume, save, set_rate, token_weights, update_average, watched
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

CHANNELS, SIDE = 4, 16
"""Of the latents."""


def make_vae():
    return AutoencoderKLQwenImage(
        base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True]
    )


def train_vae(work, steps, batch=16, peak=2e-3):
    """The autoencoder: L1 and a trace of KL; its latents' means and spreads go into its config."""
    torch.manual_seed(0)
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    begin = resume(work / "vae.pt", vae=vae, optimizer=optimizer)
    for step in watched("vae", begin, steps):
        set_rate(optimizer, peak, step, steps)
        _, pictures = draw_batch(np.random.default_rng((1, step)), batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures.unsqueeze(2)).latent_dist
            decoded = vae.decode(posterior.sample()).sample[:, :, 0]
        loss = F.l1_loss(decoded.float(), pictures) + 1e-6 * posterior.kl().float().mean() / 1024
        descend(optimizer, vae, loss)
        if step % 100 == 99:
            tqdm.write(f"vae {step + 1}: {loss.item():.4f}")
            save(work / "vae.pt", step + 1, vae=vae, optimizer=optimizer)
    vae.eval()
    latents = encode_scenes(vae, 512, seed=2)[1]
    means, spreads = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(latents_mean=means.tolist(), latents_std=spreads.tolist())
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode_scenes(vae, number, seed):
    """Captions and raw latents (number, 4, 16, 16) of fresh scenes."""
    captions, latents = [], []
    for start in tqdm(range(0, number, 64), desc="encode", mininterval=10):
        some, pictures = draw_batch(np.random.default_rng((seed, start)), min(64, number - start))
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(pictures.unsqueeze(2)).latent_dist.mode()[:, :, 0].float())
        captions += some
    return captions, torch.cat(latents)


class TinyQwenImage(torch.nn.Module):
    """What the flow stage trains: the transformer and the text encoder."""

    template, dropped = None, None

    def __init__(self, work):
        super().__init__()
        form = work / "form"
        if not form.exists():
            make(form, "qwenimage")
        self.tokenizer = Qwen2Tokenizer.from_pretrained(form / "tokenizer")
        self.text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(form / "text_encoder")
        self.transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=self.text_encoder.config.hidden_size,
            axes_dims_rope=(8, 12, 12),
        )
        for name, module in self.transformer.named_modules():
            if name.endswith(("img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out")):
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)
        pipeline = QwenImagePipeline(None, make_vae(), self.text_encoder, self.tokenizer, self.transformer)
        self.template, self.dropped = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx

    def forward(self, latents, sigma, captions):
        """The velocity (B, 64, 16) at packed latents of that shape and sigma (B,), for captions of the same length."""
        ids = self.tokenizer([self.template.format(each) for each in captions], return_tensors="pt").input_ids
        words = self.text_encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        words, number = words[:, self.dropped :], len(captions)
        return self.transformer(
            latents,
            encoder_hidden_states=words,
            encoder_hidden_states_mask=torch.ones(words.shape[:2]),
            timestep=sigma,
            img_shapes=number * [[(1, SIDE // 2, SIDE // 2)]],
            txt_seq_lens=number * [words.shape[1]],
            return_dict=False,
        )[0].float()


def make_optimizer(model):
    """AdamW, faster for the text encoder."""
    groups = {1: [], 3: []}
    for name, parameter in model.named_parameters():
        if not name.startswith(("text_encoder.visual", "text_encoder.model.visual", "text_encoder.lm_head")):
            groups[3 if name.startswith("text_encoder") else 1].append(parameter)
    groups = [{"params": parameters, "faster": faster} for faster, parameters in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)


def train_flow(work, steps, scenes, batch=32, peak=1e-3):
    """Rectified flow: the velocity noise - clean, times drawn logit-normally, weights averaged.

    One step in ten is without captions, for classifier-free guidance. All captions of a step have as many tokens, those
    of one object or those of two, so that there is no padding.
    """
    vae = AutoencoderKLQwenImage.from_pretrained(work / "vae").eval()
    path = work / "scenes.pt"
    if not path.exists():
        torch.save(encode_scenes(vae, scenes, seed=3), path)
    captions, latents = torch.load(path)
    means, spreads = (
        torch.tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = (latents - means) / spreads
    by_length = [[place for place, each in enumerate(captions) if (" and " in each) == two] for two in (False, True)]
    torch.manual_seed(0)
    model = TinyQwenImage(work)
    average = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    begin = resume(work / "flow.pt", model=model, average=average, optimizer=optimizer)
    for block in model.transformer.transformer_blocks:
        block.compile(dynamic=True)
    total = 0.0
    for step in watched("flow", begin, steps):
        set_rate(optimizer, peak, step, steps)
        rng = np.random.default_rng((4, step))
        chosen = rng.choice(by_length[int(rng.random() < len(by_length[1]) / len(captions))], batch)
        texts = [captions[place] for place in chosen] if step % 10 < 9 else batch * [""]
        clean = QwenImagePipeline._pack_latents(latents[chosen], batch, CHANNELS, SIDE, SIDE)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        sigma = torch.from_numpy(1 / (1 + np.exp(-rng.normal(0.47, 1.0, batch)))).float()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(torch.lerp(clean, noise, sigma[:, None, None]), sigma, texts)
        loss = (token_weights(texts) * (velocity - (noise - clean)) ** 2).mean()
        descend(optimizer, model, loss)
        update_average(average, model, min(0.999, (step + 1) / (step + 10)))
        total += loss.item()
        if step % 200 == 199:
            tqdm.write(f"flow {step + 1}: {total / 200:.4f}")
            total = 0.0
            save(work / "flow.pt", step + 1, model=model, average=average, optimizer=optimizer)
    torch.save(average.state_dict(), work / "flow_average.pt")


def export(work, out):
    """The pipeline in diffusers layout, float32."""
    model = TinyQwenImage(work)
    state = work / "flow_average.pt"
    model.load_state_dict(torch.load(state) if state.exists() else torch.load(work / "flow.pt")["average"])
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKLQwenImage.from_pretrained(work / "vae"),
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        transformer=model.transformer,
    ).save_pretrained(out)
    config = json.loads((out / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)
    (out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="where the finished pipeline goes")
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--flow-steps", type=int, default=10400)
    parser.add_argument("--scenes", type=int, default=32_000, help="that the flow is trained on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "vae").exists():
        train_vae(args.work, args.vae_steps)
    if not (args.work / "flow_average.pt").exists():
        train_flow(args.work, args.flow_steps, args.scenes)
    export(args.work, args.out)


if __name__ == "__main__":
    main()
