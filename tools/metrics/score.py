"""Scores pictures with the metrics whose networks exist in torch alone: LPIPS, ImageReward and FID.

python -m venv tools/metrics/venv
tools/metrics/venv/bin/pip install -r tools/metrics/requirements.txt
tools/metrics/venv/bin/pip install --no-deps image-reward==1.5

FBCache_ms.eval.quality runs it. A job is a JSON object on stdin: "metric", "pictures" (paths), "weights" (a path), and
"references" (paths) for lpips and fid, "prompts" for image_reward. The answer is one on stdout: "values", a number a
picture, for fid one alone; or "error", one line, with exit status 2. Nothing is ever downloaded.
"""

import importlib.util
import json
import os
import sys
import types
import warnings
from contextlib import redirect_stdout
from pathlib import Path


def device():
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_picture(path):
    """A picture as PIL's RGB. Raises OSError, naming it, if it cannot be decoded."""
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"picture {path} cannot be read: {error}") from None


def read_weights(path):
    """A state_dict. Raises OSError, naming the file, if it is not there or no torch file of tensors alone."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"weights {path} cannot be read: {error.strerror}") from None
    except Exception:
        raise OSError(f"weights {path} are no torch file of tensors alone, or damaged") from None


def lpips_score(pictures, references, weights):
    """LPIPS (Zhang et al. 2018) of each picture and its reference, version 0.1 on AlexNet.

    The package brings the linear layers; ``weights`` are torchvision's of AlexNet.
    """
    from lpips import LPIPS
    from torchvision.transforms.functional import to_tensor
    from tqdm import tqdm

    model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = read_weights(weights)
    for part in model.net.children():
        part.load_state_dict({name: state[f"features.{name}"] for name in part.state_dict()})
    model.to(device())
    values = []
    for pair in tqdm(list(zip(pictures, references)), desc="lpips", disable=None):
        values.append(
            model(*(to_tensor(read_picture(path))[None].to(device()) for path in pair), normalize=True).item()
        )
    return values


def image_reward_score(pictures, prompts, weights):
    """ImageReward (Xu et al. 2023) of each picture and its prompt.

    ``weights`` is a folder of ImageReward.pt, med_config.json and the tokenizer bert-base-uncased.
    """
    skip_package_code("ImageReward", "ImageReward.models")
    from ImageReward.ImageReward import ImageReward
    from tqdm import tqdm

    weights, pictures = Path(weights), [os.path.abspath(path) for path in pictures]
    # The package asks for its tokenizer by this bare name, which is a folder's where the process stands beside one.
    os.chdir(weights)
    model = ImageReward("med_config.json", device())
    missing = model.load_state_dict(read_weights("ImageReward.pt"), strict=False).missing_keys
    if missing:
        raise OSError(f"weights {weights / 'ImageReward.pt'} have no {missing[0]}")
    model.to(device()).eval()
    pairs = tqdm(list(zip(pictures, prompts)), desc="image_reward", disable=None)
    return [model.score(prompt, read_picture(path)) for path, prompt in pairs]


def skip_package_code(*names):
    """Lets modules of packages be imported without the packages' own code.

    ImageReward's imports its training and other scores, and with them diffusers, datasets and OpenAI's clip.
    """
    if importlib.util.find_spec(names[0]) is None:
        raise ModuleNotFoundError(name=names[0])
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
        sys.modules[name] = package


def fid_score(pictures, references, weights):
    """FID (Heusel et al. 2017) of two sets of pictures of any sizes: shorter side to 299, center crop, Inception."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor
    from torchvision.transforms import CenterCrop, Compose, Resize

    transforms = Compose([read_picture, Resize(299), CenterCrop(299), TransformPILtoRGBTensor()])

    class Pictures(ImagesPathDataset):
        def __getitem__(self, index):
            return transforms(self.files[index])

    read_weights(weights)
    metrics = calculate_metrics(
        input1=Pictures(pictures),
        input2=Pictures(references),
        fid=True,
        feature_extractor_weights_path=weights,
        cuda=device() == "cuda",
        # No worker processes, so that an error keeps its own words.
        save_cpu_ram=True,
        cache=False,
        verbose=sys.stderr.isatty(),
    )
    return [metrics["frechet_inception_distance"]]


SCORES = {"lpips": lpips_score, "image_reward": image_reward_score, "fid": fid_score}


def main():
    """The program; returns its exit status."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    metric = job.pop("metric")
    try:
        import torch

        with redirect_stdout(sys.stderr), torch.inference_mode():
            answer = {"values": SCORES[metric](**job)}
    except ModuleNotFoundError as error:
        answer = {"error": f"{metric} needs {error.name}, which {sys.executable} does not have: see {__file__}"}
    except OSError as error:
        answer = {"error": str(error)}
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        answer = {"error": f"{metric} with {job['weights']}: {type(error).__name__}: {first}"}
    print(json.dumps(answer))
    return 2 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
