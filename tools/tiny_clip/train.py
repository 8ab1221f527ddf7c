"""Trains FBCache_ms/tiny_clip: a small CLIP for the scenes of FBCache_ms.eval.shared.scenes, so that a CLIP score means
something on the embedded checkpoint.

    python -m venv tools/tiny_flux/venv
    tools/tiny_flux/venv/bin/pip install -r tools/tiny_flux/requirements.txt
    export PYTHONPATH=.
    tools/tiny_flux/venv/bin/python tools/tiny_clip/train.py --work /tmp/tiny_clip --out FBCache_ms/tiny_clip

The tokenizer is the embedded checkpoint's. Training never sees the held-out captions. A run that was killed goes on
from its last checkpoint.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from FBCache_ms.eval.shared.scenes import draw, held_out_captions, is_held_out, parse_caption, random_scene
from FBCache_ms.runtime.checkpoint import TINY_FLUX

IMAGE_SIZE = 64
BATCH = 256
HELD_OUT = 512
SAVE_EVERY = 250


def make_model(tokenizer):
    """A CLIPModel of 0.9 million parameters, from random weights."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def blurred(picture, rng):
    """A picture as the embedded checkpoint's autoencoder would give it back: a little soft, a little noisy."""
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noise = rng.normal(0, rng.uniform(0, 6), (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def draw_batch(rng, number):
    """``number`` captions that are not held out, and their pictures."""
    captions, pictures = [], []
    while len(captions) < number:
        scene = random_scene(rng)
        if not is_held_out(str(scene)):
            captions.append(str(scene))
            pictures.append(blurred(draw(scene, IMAGE_SIZE, rng), rng))
    return captions, pictures


def logits(model, tokenizer, processor, captions, pictures):
    """Scaled cosine similarities, a row a picture and a column a caption."""
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    return model(**inputs, pixel_values=pixels).logits_per_image


@torch.no_grad()
def accuracy(model, tokenizer, processor):
    """How often a held-out caption's picture is nearest to its own caption, among HELD_OUT of them."""
    rng = np.random.default_rng(1)
    captions = held_out_captions(HELD_OUT, 1)
    pictures = [draw(parse_caption(caption), IMAGE_SIZE, rng) for caption in captions]
    scores = logits(model.eval(), tokenizer, processor, captions, pictures)
    return (scores.argmax(1) == torch.arange(len(captions))).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_FLUX / "tokenizer")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.05)
    checkpoint = args.work / "last.pt"
    begin = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        begin = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    bar = tqdm(range(begin, args.steps), initial=begin, total=args.steps)
    for step in bar:
        captions, pictures = draw_batch(np.random.default_rng((0, step)), BATCH)
        scores = logits(model.train(), tokenizer, processor, captions, pictures)
        own = torch.arange(BATCH)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}, held out {accuracy(model, tokenizer, processor):.1%}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step + 1, "schedule": schedule.state_dict(), **state}, args.work / "new.pt")
            (args.work / "new.pt").replace(checkpoint)

    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
