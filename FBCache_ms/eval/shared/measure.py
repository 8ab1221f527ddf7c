"""What a configuration gains and loses, from the pictures that were drawn with it and without."""

import statistics
from importlib.util import find_spec

from FBCache_ms.eval.quality import TINY_CLIP, ClipScore, clip_lacks, is_scene, prompt_score, summary
from FBCache_ms.eval.shared.metrics import SSIM_WINDOW, psnr, read_picture, ssim
from FBCache_ms.eval.shared.tables import markdown, write_tables
from FBCache_ms.rules.when import GATES


def clip_folder(args):
    """The folder of the CLIP that scores a program's pictures: --clip, the embedded one for scenes, or None.

    Raises ValueError if what scoring needs is not there, or the pictures are too small for it.
    """
    if find_spec("skimage") is None:
        raise ValueError("PSNR and SSIM need scikit-image; install FBCache_ms[eval]")
    if args.image_size is not None and min(args.image_size) < SSIM_WINDOW:
        height, width = args.image_size
        raise ValueError(f"--image_size must be {SSIM_WINDOW} pixels or more, for SSIM, not {height} {width}")
    folder = args.clip or (TINY_CLIP if all(map(is_scene, args.prompts)) else None)
    lack = folder and clip_lacks(folder)
    if lack:
        raise ValueError(f"--clip needs {lack}")
    return folder


class Judge:
    """Compares the pictures of a setting with the uncached ones.

    Args:
        prompts: list of texts.
        uncached: the PictureFolder of the uncached pictures.
        clip: the folder of a CLIPModel, or None for no CLIP score.
    """

    def __init__(self, prompts, uncached, clip=None):
        self.prompts, self.clip = prompts, clip and ClipScore(clip)
        self.uncached = uncached
        self.uncached_seconds = [line["denoise"] for line in uncached.seconds(len(prompts))]

    def judge(self, setting, folder):
        """A setting's figures; "pictures" has them a prompt."""
        number = len(self.prompts)
        files = list(map(folder.file, range(number)))
        similarities = self.clip(map(read_picture, files), self.prompts) if self.clip else [None] * number
        lines = folder.seconds(number)
        entries = []
        for index, prompt in enumerate(self.prompts):
            picture, reference = read_picture(files[index]), read_picture(self.uncached.file(index))
            record = folder.record(index)
            entries.append(
                {
                    "index": index,
                    "seconds": lines[index]["denoise"],
                    "psnr": psnr(reference, picture),
                    "ssim": ssim(reference, picture),
                    "prompt_score": prompt_score(picture, prompt),
                    "clip_score": similarities[index],
                    "computed_steps": record["reused"].count(False),
                    "skipped": record["skipped"],
                    "tflops": record["tflops"],
                    "reused": record["reused"],
                    "residual_diffs": record["residual_diffs"],
                }
            )
        # Timed beside these pictures where they were, since a machine's speed changes in the course of a long run.
        beside = [line["uncached"] for line in lines if "uncached" in line] or self.uncached_seconds
        return {"steps": setting.steps, "config": str(setting.config), **means(entries, beside), "pictures": entries}


def means(entries, uncached_seconds):
    """The figures of all pictures from those of each: medians of seconds, means of everything else."""
    seconds = statistics.median(entry["seconds"] for entry in entries)
    uncached = statistics.median(uncached_seconds)
    names = ("computed_steps", "skipped", "tflops", "ssim", "prompt_score", "clip_score")
    return {
        "seconds": seconds,
        "uncached_seconds": uncached,
        "speedup": uncached / seconds,
        "psnr": mean_psnr(entries),
        **{name: mean(entries, name) for name in names},
    }


def mean(entries, name):
    """The mean of a figure, None where a picture lacks it."""
    values = [entry[name] for entry in entries]
    return None if None in values else statistics.mean(values)


def mean_psnr(entries):
    """The mean PSNR of the pictures that differ from the uncached ones; infinite where none does."""
    return summary([entry["psnr"] for entry in entries])["mean"]


def cell_of(row, setting, folder, root, judge):
    """What sweep.json says of a row: who it is, where its pictures lie within ``root``, and its figures."""
    return {
        "case": row.case,
        "name": row.name,
        "cache": row.cache_at(setting.steps),
        "threshold": row.threshold,
        "difference_limit": difference_limit(setting.config),
        "folder": folder.path.relative_to(root).as_posix(),
        **judge.judge(setting, folder),
    }


def difference_limit(config):
    """What CacheStats.residual_diffs have to stay below, None where a rule's score is another quantity."""
    if not (GATES[config.gate].probes_alone and config.rules[0].compares_itself):
        return None
    limit = getattr(config, config.rules[0].threshold)
    # The double stack's gate is not asked where it never reuses.
    return config.residual_diff_threshold_single if config.span == "stacks" and limit == 0 else limit


def table_of(cells):
    """The cells as a Markdown table; scores that were not taken have no column."""
    columns = {
        "Case": lambda cell: cell["case"],
        "Setting": lambda cell: cell["name"],
        "`--cache`": lambda cell: f"`{cell['cache']}`",
        "Computed": lambda cell: f"{cell['computed_steps']:.1f} of {cell['steps']}",
        "TFLOPs": lambda cell: f"{cell['tflops']:.4g}",
        "Uncached (s)": lambda cell: f"{cell['uncached_seconds']:.3f}",
        "Time (s)": lambda cell: f"{cell['seconds']:.3f}",
        "Speedup": lambda cell: f"{cell['speedup']:.2f}x",
        "PSNR": lambda cell: "equal" if cell["psnr"] == float("inf") else f"{cell['psnr']:.1f}",
        "SSIM": lambda cell: f"{cell['ssim']:.4f}",
        "Prompt Score": lambda cell: f"{cell['prompt_score']:.1%}",
        "CLIP Score": lambda cell: f"{cell['clip_score']:.4f}",
    }
    for name, key in (("Prompt Score", "prompt_score"), ("CLIP Score", "clip_score")):
        if cells[0][key] is None:
            del columns[name]
    return markdown([{name: text(cell) for name, text in columns.items()} for cell in cells])


def write_sweep(folder, settings, prompts, cells):
    """Writes sweep.md, sweep.csv and sweep.json, of which the report is made; returns the table."""
    text = table_of(cells)
    rows = [{name: value for name, value in cell.items() if name != "pictures"} for cell in cells]
    write_tables(folder, "sweep", text, rows, {"settings": settings, "prompts": prompts, "cells": cells})
    return text
