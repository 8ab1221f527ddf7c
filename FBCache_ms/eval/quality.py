"""Scores a folder of pictures: against a reference's of the same names, against their prompts, and as a set.

psnr (dB), ssim and lpips compare with the reference's picture of the same name; clip_score, prompt_score (the share
of a scene's attributes that the picture shows) and image_reward with the prompt; fid and clip_frechet (the same
distance of CLIP's features) compare the two folders as sets, whatever their names and sizes.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into, json_bytes, put_into, say_written, write_file
from FBCache_ms.eval.shared.metrics import (
    SSIM_WINDOW,
    cosine_similarity,
    frechet_distance,
    open_picture,
    psnr,
    read_picture,
    ssim,
)
from FBCache_ms.eval.shared.tables import markdown, show

TINY_CLIP = Path(__file__).parents[1] / "tiny_clip"
"""The embedded CLIP, which knows the scenes of FBCache_ms.eval.shared.scenes alone."""

SCORE = Path(__file__).parents[2] / "tools" / "metrics" / "score.py"
METRICS_PYTHON = SCORE.parent / "venv" / "bin" / "python"
"""The Python of the environment in which SCORE finds torch."""

METRICS = ("psnr", "ssim", "lpips", "clip_score", "prompt_score", "image_reward", "fid", "clip_frechet")
PAIRED = ("psnr", "ssim", "lpips")
PROMPTED = ("clip_score", "prompt_score", "image_reward")
SETS = ("fid", "clip_frechet")
CLIP_METRICS = ("clip_score", "clip_frechet")

CLIP_BATCH = 16
"""CLIP always gets so many pictures or prompts at once, so that a number does not depend on how many there are."""


@dataclass(frozen=True)
class Weights:
    """What a metric's network is made of: the option that names it, the files in that folder, and their publisher."""

    option: str
    files: tuple
    source: str


WEIGHTS = {
    "clip": Weights(
        "--clip FOLDER",
        ("config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt"),
        "a CLIP in transformers' layout, such as OpenAI's at https://huggingface.co/openai/clip-vit-large-patch14",
    ),
    "lpips": Weights(
        "--lpips FILE",
        (),
        "torchvision's AlexNet at https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
    "image_reward": Weights(
        "--image_reward FOLDER",
        ("ImageReward.pt", "med_config.json", "bert-base-uncased/vocab.txt"),
        "ImageReward.pt and med_config.json at https://huggingface.co/THUDM/ImageReward, and in it bert-base-uncased "
        "with the vocab.txt of https://huggingface.co/google-bert/bert-base-uncased",
    ),
    "fid": Weights(
        "--inception FILE",
        (),
        "torch-fidelity's Inception at https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
    ),
}


def list_pictures(folder):
    """The paths of a folder's PNG and JPEG files, by name. Raises OSError if there are none."""
    suffixes = (".png", ".jpg", ".jpeg")
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    if not pictures:
        raise OSError(f"{folder} holds no picture: no file that ends in {', '.join(suffixes)}")
    return pictures


def prompt_score(picture, prompt):
    """The share in [0, 1] of a prompt's attributes that a picture (H, W, 3) shows, as scenes.score_picture counts them.

    None for a prompt that is not of the scenes' grammar.
    """
    from PIL import Image

    from FBCache_ms.eval.shared.scenes import parse_caption, score_picture

    try:
        scene = parse_caption(prompt)
    except ValueError:
        return None
    return float(np.mean([right for _, right in score_picture(Image.fromarray(_bytes(picture)), scene)]))


class ClipScore:
    """CLIP's view of pictures and prompts (Radford et al. 2021), computed in MindSpore.

    Args:
        folder: a CLIP in transformers' layout.

    Called with pictures (H, W, 3) in [0, 1] of any sizes, in any iterable, and as many prompts, it returns for each
    the cosine of the angle between the two embeddings, in [-1, 1]: neither scaled nor cut off at 0. A prompt longer
    than the model allows is cut short.

    Raises OSError, naming the file, if one is missing or cannot be loaded.
    """

    def __init__(self, folder):
        lack = _lack("clip", folder)
        if lack:
            raise OSError(f"CLIP {folder}: {lack}")
        from mindone.transformers import CLIPModel
        from transformers import CLIPImageProcessor, CLIPTokenizer

        from FBCache_ms.runtime.device import prepare_device

        prepare_device()
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._model = CLIPModel.from_pretrained(str(folder), local_files_only=True)
        # Each loader has exceptions of its own.
        except Exception as error:
            raise OSError(f"CLIP {folder} cannot be loaded: {error}") from error
        self._model.set_train(False)

    def __call__(self, pictures, prompts):
        return cosine_similarity(self.image_features(pictures), self.text_features(prompts)).tolist()

    def image_features(self, pictures):
        """The embeddings (N, D) of pictures, not normalised."""
        return _in_batches(self._encode_pictures, pictures)

    def text_features(self, prompts):
        """The embeddings (N, D) of prompts, not normalised."""
        return _in_batches(self._encode_prompts, prompts)

    def _encode_pictures(self, pictures):
        import mindspore as ms

        pixels = self._processor(list(map(_bytes, pictures)), input_data_format="channels_last", return_tensors="np")
        return self._model.get_image_features(ms.Tensor(pixels["pixel_values"], ms.float32)).asnumpy()

    def _encode_prompts(self, prompts):
        import mindspore as ms

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np"
        )["input_ids"]
        return self._model.get_text_features(ms.Tensor(tokens, ms.int32)).asnumpy()


def _bytes(picture):
    return (np.asarray(picture) * 255).round().astype(np.uint8)


def _in_batches(encode, inputs):
    inputs, parts = iter(inputs), []
    while batch := list(islice(inputs, CLIP_BATCH)):
        parts.append(encode(batch + batch[-1:] * (CLIP_BATCH - len(batch)))[: len(batch)])
    return np.concatenate(parts).astype(np.float64)


def lpips(pictures, references, weights, python=METRICS_PYTHON):
    """LPIPS (Zhang et al. 2018, version 0.1 on AlexNet) of each picture and its reference: 0 for equal ones.

    Args:
        pictures, references: lists of paths, each pair of the same size.
        weights: the file of torchvision's AlexNet.
        python: of the environment that tools/metrics/score.py describes.

    Raises OSError or ValueError for pictures, weights or an environment that cannot be used.
    """
    check_pairs(pictures, references)
    return _score(python, "lpips", pictures, weights, references=list(map(str, references)))


def image_reward(pictures, prompts, weights, python=METRICS_PYTHON):
    """ImageReward (Xu et al. 2023) of each picture and its prompt: about 0 on average, higher is better.

    Args:
        pictures: list of paths.
        prompts: list of as many texts.
        weights: the folder of ImageReward.pt, med_config.json and bert-base-uncased.
        python: as in lpips.

    Raises OSError or ValueError as lpips does.
    """
    return _score(python, "image_reward", pictures, weights, prompts=prompts)


def fid(pictures, references, weights, python=METRICS_PYTHON):
    """The Frechet inception distance (Heusel et al. 2017) of two sets of pictures of any sizes, by torch-fidelity.

    Each picture's shorter side is brought to 299, and its center taken.

    Args:
        pictures, references: lists of at least 2 paths each.
        weights: the file of torch-fidelity's Inception.
        python: as in lpips.

    Raises OSError or ValueError as lpips does.
    """
    return _score(python, "fid", pictures, weights, references=list(map(str, references)))[0]


def clip_lacks(folder):
    """What a CLIP's folder lacks, in words, or None."""
    return _lack("clip", folder)


def fid_lacks(weights, python=METRICS_PYTHON):
    """What fid would lack with these arguments, in words, or None."""
    return _lack("fid", weights) or _lacking_environment(python)


def _score(python, metric, pictures, weights, **inputs):
    lack = _lack(metric, weights) or _lacking_environment(python)
    if lack:
        raise OSError(f"{metric} needs {lack}")
    job = {"metric": metric, "pictures": list(map(str, pictures)), "weights": str(weights), **inputs}
    done = subprocess.run([str(python), str(SCORE)], input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise OSError(f"{metric}: {SCORE} ended with status {done.returncode} under {python}") from None
    if "error" in answer:
        raise OSError(answer["error"])
    return answer["values"]


def _lacking_environment(python):
    if not SCORE.is_file():
        return f"{SCORE}, which is not there: it is part of FBCache_ms's repository, not of the installed package"
    if shutil.which(str(python)) is None:
        return (
            f"an environment of its own, and {python} is not there: python -m venv tools/metrics/venv && "
            "tools/metrics/venv/bin/pip install -r tools/metrics/requirements.txt && "
            "tools/metrics/venv/bin/pip install --no-deps image-reward==1.5"
        )


def _lack(name, path):
    weights = WEIGHTS[name]
    if path is None:
        return f"{weights.option}: {weights.source}"
    for file in (path / part for part in weights.files) if weights.files else (path,):
        if not file.is_file():
            return f"{file}, which is not there: {weights.source}"


def check_pairs(pictures, references, least=1):
    """Raises OSError for a file that is no picture, ValueError for a size that is not its reference's, or too small."""
    for pair in zip(pictures, references):
        sizes = []
        for path in pair:
            with open_picture(path) as picture:
                sizes.append("{}x{}".format(*picture.size))
                if min(picture.size) < least:
                    raise ValueError(f"picture {path} is {sizes[-1]}; ssim needs {least} pixels or more")
        if sizes[0] != sizes[1]:
            raise ValueError(f"picture {pair[0]} is {sizes[0]}, but its reference {pair[1]} is {sizes[1]}")


def summary(values):
    """{"mean", "std" (of the sample), "min", "max", "pictures"} of the finite numbers of a list.

    Equal pictures have an infinite PSNR; the mean is of the others, and "pictures" says how many those are. It is
    infinite only where all pictures are equal.
    """
    finite = [value for value in values if np.isfinite(value)] or values
    return {
        "mean": float(np.mean(finite)),
        "std": float(np.std(finite, ddof=1)) if len(finite) > 1 and np.isfinite(finite).all() else None,
        "min": float(np.min(finite)),
        "max": float(np.max(finite)),
        "pictures": len(finite),
    }


def parse_arguments(argv=None):
    """The command line, checked before anything is scored; exits with 2 and one line if it is off."""
    parser = Parser(__name__, "quality", "PICTURES [--reference FOLDER] [options]", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="PICTURES", help="folder of PNG or JPEG files; taken by name")
    add("--reference", type=Path, metavar="FOLDER", help="the pictures to compare with")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="of the pictures in their order (default: 00003.json has 00003.png's)",
    )
    add(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"of {', '.join(METRICS)} (default: what can be had)",
    )
    for name, weights in WEIGHTS.items():
        option, metavar = weights.option.split()
        add(option, type=Path, metavar=metavar, dest=f"{name}_weights", help=weights.source)
    add("--metrics_python", type=Path, default=METRICS_PYTHON, metavar="PATH", help="for lpips, image_reward and fid")
    add("--limit", type=int, metavar="N", help="the first N pictures alone; a set to compare with stays whole")
    add("--save_path", type=Path, default=Path("./results/quality.json"), metavar="FILE", help="each picture's numbers")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        if args.limit is not None:
            check_range("limit", args.limit, 1)
        args.pictures = list_pictures(args.folder)[: args.limit]
        args.references = None if args.reference is None else list_pictures(args.reference)
        args.prompts = prompts_of(args.pictures, args.prompts)
        args.metrics = choose_metrics(args)
        if set(PAIRED) & set(args.metrics):
            check_pairs(args.pictures, counterparts(args), SSIM_WINDOW if "ssim" in args.metrics else 1)
        if args.save_path.is_dir():
            raise OSError(f"--save_path {args.save_path} is a folder, not a file")
        check_folder(args.save_path.parent)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def prompts_of(pictures, file=None):
    """The prompt of each picture: of a file, in the pictures' order, or of the JSON beside it; None where none is.

    Raises OSError or ValueError for a file that cannot be read or holds fewer.
    """
    if file is not None:
        from FBCache_ms.eval.shared.prompts import read_prompts

        prompts = read_prompts(file)
        if len(prompts) < len(pictures):
            raise ValueError(f"--prompts {file} holds {len(prompts)} prompts for {len(pictures)} pictures")
        return prompts[: len(pictures)]
    return [_own_prompt(picture.with_suffix(".json")) for picture in pictures]


def _own_prompt(path):
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'{path} is not a JSON object with a "prompt"') from None


def counterparts(args):
    """The reference's picture of each picture's name."""
    return [args.reference / picture.name for picture in args.pictures]


def choose_metrics(args):
    """The metrics asked for, or all that can be had. Raises ValueError that says what one lacks.

    Weights that are given ask for their metric; a reference that has some of the pictures ought to have them all.
    """
    asked = args.metrics or [name for name in WEIGHTS if name != "clip" and getattr(args, f"{name}_weights")]
    if not args.metrics and args.reference and any(path.is_file() for path in counterparts(args)):
        asked += ["psnr", "ssim"] if importlib.util.find_spec("skimage") else []
    if not args.metrics and args.clip_weights and args.prompts[0] is not None:
        asked.append("clip_score")
    chosen = []
    for metric in METRICS:
        lack = lacking(metric, args)
        if lack and metric in asked:
            raise ValueError(f"{metric} needs {lack}")
        if not lack and (metric in asked or not args.metrics):
            chosen.append(metric)
    if not chosen:
        raise ValueError(f"no metric can be had of {args.folder} alone: give --reference FOLDER or --prompts FILE")
    return chosen


def lacking(metric, args):
    """What a metric lacks, in words, or None."""
    if metric in (*PAIRED, *SETS) and args.reference is None:
        return "--reference FOLDER"
    if metric in PAIRED:
        for picture, reference in zip(args.pictures, counterparts(args)):
            if not reference.is_file():
                return f"{reference}, the reference of {picture}, which is not there"
    if metric in SETS and min(len(args.pictures), len(args.references)) < 2:
        return "2 pictures or more in either folder"
    if metric in ("psnr", "ssim") and importlib.util.find_spec("skimage") is None:
        return "scikit-image: pip install FBCache_ms[eval]"
    if metric in PROMPTED and None in args.prompts:
        picture = args.pictures[args.prompts.index(None)]
        return f"prompts: give --prompts FILE, or {picture} its own in {picture.with_suffix('.json')}"
    if metric == "prompt_score" or metric in CLIP_METRICS and args.clip_weights is None:
        strange = [prompt for prompt in args.prompts if not is_scene(prompt)]
        if strange and metric == "prompt_score":
            return f"prompts of the grammar of FBCache_ms.eval.shared.scenes, unlike {strange[0]!r}"
        if strange:
            return _lack("clip", None)
    if metric in CLIP_METRICS:
        return _lack("clip", args.clip_weights or TINY_CLIP)
    if metric in WEIGHTS:
        return _lack(metric, getattr(args, f"{metric}_weights")) or _lacking_environment(args.metrics_python)


def is_scene(prompt):
    """Whether a prompt is of the scenes' grammar; None is not."""
    from FBCache_ms.eval.shared.scenes import parse_caption

    try:
        return prompt is not None and bool(parse_caption(prompt))
    except ValueError:
        return False


def score(args):
    """{metric: a number a picture, or for a set one number}."""
    pictures, wanted = args.pictures, set(args.metrics)
    values = {metric: [] for metric in args.metrics}
    if wanted & {"psnr", "ssim", "prompt_score"}:
        for index, picture in enumerate(decoded(pictures, "pictures")):
            if wanted & {"psnr", "ssim"}:
                reference = read_picture(args.reference / pictures[index].name)
            for metric, of_pair in (("psnr", psnr), ("ssim", ssim)):
                if metric in wanted:
                    values[metric].append(of_pair(reference, picture))
            if "prompt_score" in wanted:
                values["prompt_score"].append(prompt_score(picture, args.prompts[index]))
    if wanted & set(CLIP_METRICS):
        clip = ClipScore(args.clip_weights or TINY_CLIP)
        features = clip.image_features(decoded(pictures, "CLIP"))
        if "clip_score" in wanted:
            values["clip_score"] = cosine_similarity(features, clip.text_features(args.prompts)).tolist()
        if "clip_frechet" in wanted:
            values["clip_frechet"] = frechet_distance(
                features, clip.image_features(decoded(args.references, "CLIP, reference"))
            )
    if "lpips" in wanted:
        values["lpips"] = lpips(pictures, counterparts(args), args.lpips_weights, args.metrics_python)
    if "image_reward" in wanted:
        values["image_reward"] = image_reward(pictures, args.prompts, args.image_reward_weights, args.metrics_python)
    if "fid" in wanted:
        values["fid"] = fid(pictures, args.references, args.fid_weights, args.metrics_python)
    return values


def decoded(paths, name):
    """The pictures of paths, one after the other, with a progress bar where a person sees it."""
    from tqdm import tqdm

    return map(read_picture, tqdm(paths, desc=name, disable=None))


def report_of(args, values):
    """What the program writes: a summary of each metric, and each picture's numbers."""
    summaries = {
        metric: {"mean": value, "pictures": len(args.pictures)} if metric in SETS else summary(value)
        for metric, value in values.items()
    }
    each = []
    for index, (picture, prompt) in enumerate(zip(args.pictures, args.prompts)):
        numbers = {metric: value[index] for metric, value in values.items() if metric not in SETS}
        each.append({"picture": picture.name, "prompt": prompt, **numbers})
    clip = str(args.clip_weights or TINY_CLIP.name) if set(CLIP_METRICS) & set(values) else None
    folders = {"pictures": str(args.folder), "reference": args.reference and str(args.reference), "clip": clip}
    return {**folders, "metrics": summaries, "per_picture": each}


def text_of(report):
    """The table."""
    rows = []
    for metric, figures in report["metrics"].items():
        numbers = {name: figures.get(name) for name in ("mean", "std", "min", "max")}
        cells = {name: "-" if value is None else f"{value:.4f}" for name, value in numbers.items()}
        rows.append({"metric": metric, **cells, "pictures": figures["pictures"]})
    return markdown(rows)


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        report = report_of(args, score(args))
        write_file(args.save_path, lambda stream: stream.write(json_bytes(report)))
        put_into(args.into, text_of(report))
        show(text_of(report))
        say_written(args.save_path.parent, args.save_path.name)

    return exit_status("quality", work)


if __name__ == "__main__":
    sys.exit(main())
