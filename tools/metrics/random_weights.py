"""Writes weights of random numbers in the published formats, to try score.py without the published ones.

tools/metrics/venv/bin/python tools/metrics/random_weights.py FOLDER lpips fid image_reward

FOLDER/lpips.pth, FOLDER/fid.pth and the folder FOLDER/image_reward (1.8 GB): what comes out means nothing.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from score import skip_package_code

MED_CONFIG = {
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def randomise(model):
    """A model's state_dict, its matrices redrawn so that the signal neither fades nor grows from layer to layer."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model.state_dict()


def lpips_weights(folder):
    """AlexNet's features, as torchvision names them."""
    from torchvision.models import alexnet

    state = randomise(alexnet().features)
    torch.save({f"features.{name}": value for name, value in state.items()}, folder / "lpips.pth")


def fid_weights(folder):
    """torch-fidelity's Inception."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        model = inception.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(randomise(model), folder / "fid.pth")


def image_reward_weights(folder):
    """ImageReward, its configuration, and a tokenizer of single letters."""
    skip_package_code("ImageReward", "ImageReward.models")
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain

    folder = folder / "image_reward"
    (folder / "bert-base-uncased").mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words += [f"[unused{index}]" for index in range(30522 - len(words))]
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words))
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    with mock.patch.object(blip_pretrain, "init_tokenizer"):
        model = ImageReward(str(folder / "med_config.json"))
    torch.save(randomise(model), folder / "ImageReward.pt")


WEIGHTS = {"lpips": lpips_weights, "fid": fid_weights, "image_reward": image_reward_weights}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[2:]:
        WEIGHTS[name](Path(sys.argv[1]))
