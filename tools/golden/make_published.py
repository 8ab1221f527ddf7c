"""Makes tests/golden/published.npz and taylorseer.npz: what the methods' own published code does.

git clone https://github.com/ali-vilab/TeaCache /tmp/published/TeaCache          # 7c10efc4702c
git clone https://github.com/Zehong-Ma/MagCache /tmp/published/MagCache          # df81cb181776
git clone https://github.com/Bujiazi/DiCache /tmp/published/DiCache              # dd7f0de10be1
git clone https://github.com/Shenyi-Z/TaylorSeer /tmp/published/TaylorSeer       # 288776dfd0cb
python -m venv /tmp/peer && /tmp/peer/bin/pip install -r tools/golden/requirements_para_attention.txt
PYTHONPATH=. /tmp/peer/bin/python tools/golden/make_published.py /tmp/published
"""

import ast
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
from cases import PUBLISHED, TAYLORSEER, call_arguments, save

from FBCache_ms.config import CacheConfig

STEPS = 28
FILES = {
    "TeaCache": ("TeaCache4FLUX/teacache_flux.py", "teacache_forward"),
    "MagCache": ("MagCache4FLUX/magcache_flux.py", "magcache_forward"),
    "DiCache": ("FLUX/run_flux_dicache.py", "dicache_forward"),
}


def definitions(path):
    """A published script's imports and functions, without running what stands below them."""
    tree = ast.parse(path.read_text())
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kept) and "matplotlib" not in ast.unparse(node)[:40]]
    names = {"logger": diffusers.utils.logging.get_logger(__name__)}
    exec(compile(tree, str(path), "exec"), names)
    return names


def literal(path, name):
    """The value of ``...name = value`` in a published script."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(f".{name}"):
            return eval(ast.unparse(node.value), {"np": np})
    raise LookupError(name)


def settings(case, path):
    """The attributes that the published code reads, with the case's values."""
    config = CacheConfig.from_tag(case["config"])
    common = {"cnt": 0, "num_steps": STEPS, "previous_residual": None}
    if case["code"] == "TeaCache":
        return {**common, "enable_teacache": True, "rel_l1_thresh": config.teacache_threshold}
    if case["code"] == "MagCache":
        ours = {"K": 5, "magcache_thresh": 0.24, "retention_ratio": 0.1, "mag_ratios": literal(path, "mag_ratios")}
        return {**common, **ours, "accumulated_ratio": 1.0, "accumulated_err": 0.0, "accumulated_steps": 0}
    ours = {"probe_depth": 1, "error_choice": "delta_y", "rel_l1_thresh": config.residual_diff_threshold}
    windows = {"residual_window": [], "probe_residual_window": []}
    return {**common, **ours, **windows, "enable_dicache": True, "ret_ratio": 0.2}


def run(case, folder):
    """The picture, the steps that ran no last block, and DiCache's differences."""
    file, name = FILES[case["code"]]
    path = folder / case["code"] / file
    pipe = diffusers.FluxPipeline.from_pretrained("FBCache_ms/tiny_flux")
    pipe.set_progress_bar_config(disable=True)
    transformer, computed, behind_first = pipe.transformer, [], []
    for attribute, value in settings(case, path).items():
        setattr(transformer, attribute, value)
    transformer.forward = types.MethodType(definitions(path)[name], transformer)
    transformer.register_forward_pre_hook(lambda *args: computed.append(False))
    transformer.single_transformer_blocks[-1].register_forward_hook(lambda *args: computed.__setitem__(-1, True))
    transformer.transformer_blocks[0].register_forward_hook(
        lambda block, inputs, output: behind_first.append(output[1])
    )
    images = pipe(**call_arguments(case, torch.from_numpy)).images
    result = {"images": images, "reused": ~np.array(computed)}
    if case["code"] == "DiCache":
        pairs = zip(behind_first, behind_first[1:])
        changes = [float((new - old).abs().mean() / old.abs().mean()) for old, new in pairs]
        result["changes"] = np.array([0.0, *changes])
    return result


def taylorseer(case, folder):
    """Which of so many steps TaylorSeer computes, and what its formula gives at every step of a series of numbers."""
    functions = folder / "TaylorSeer/TaylorSeer-FLUX/src/flux/modules/cache_functions"
    decide = {**definitions(functions / "force_scheduler.py")}
    source = (functions / "cal_type.py").read_text().replace("from .force_scheduler import force_scheduler", "")
    exec(source, decide)
    formula = definitions(folder / "TaylorSeer/TaylorSeer-FLUX/src/flux/taylor_utils/__init__.py")
    place = {"stream": "image", "layer": 0, "module": "block"}
    cache = {
        "cache": {-1: {"image": {0: {"block": {}}}}},
        "cache_counter": 0,
        "taylor_cache": True,
        "Delta-DiT": False,
        "fresh_ratio": 0.0,
        "force_fresh": "global",
        "fresh_threshold": case["interval"],
        "max_order": case["order"],
        "first_enhance": 3,
    }
    current = {**place, "activated_steps": [0], "num_steps": case["steps"]}
    values = np.cumsum(np.random.default_rng(0).normal(size=case["steps"]))
    computed, outputs = [], []
    for step in range(case["steps"]):
        current["step"] = step
        decide["cal_type"](cache, current)
        computed.append(current["type"] == "full")
        if computed[-1]:
            formula["derivative_approximation"](cache, current, torch.tensor(values[step]))
        outputs.append(float(formula["taylor_formula"](cache, current)))
    return {"values": values, "computed": np.array(computed), "outputs": np.array(outputs)}


folder = Path(sys.argv[1])
versions = {name: version(name) for name in ("torch", "diffusers")}
for code in (*FILES, "TaylorSeer"):
    command = ["git", "-C", str(folder / code), "rev-parse", "HEAD"]
    versions[code] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
results = []
for case in PUBLISHED:
    results.append(run(case, folder))
    print(case["code"], case["config"], np.flatnonzero(~results[-1]["reused"]).tolist())
save("tests/golden/published.npz", PUBLISHED, results, versions)
save("tests/golden/taylorseer.npz", TAYLORSEER, [taylorseer(case, folder) for case in TAYLORSEER], versions)
