"""Makes tests/golden/para_attention.npz: decisions and pictures of ParaAttention on the embedded checkpoint.

python -m venv /tmp/peer && /tmp/peer/bin/pip install -r tools/golden/requirements_para_attention.txt
/tmp/peer/bin/pip install --no-deps para-attn==0.3.38
/tmp/peer/bin/python tools/golden/make_para_attention.py
"""

from importlib.metadata import version

import diffusers
import numpy as np
import torch
from cases import CACHED, call_arguments, save
from para_attn.first_block_cache import utils
from para_attn.first_block_cache.diffusers_adapters.flux import apply_cache_on_transformer

decisions = []
decide = utils.get_can_use_cache


def recorded(*args, **kwargs):
    decisions.append(bool(decide(*args, **kwargs)))
    return decisions[-1]


utils.get_can_use_cache = recorded
pipe = diffusers.FluxPipeline.from_pretrained("FBCache_ms/tiny_flux")
pipe.set_progress_bar_config(disable=True)
apply_cache_on_transformer(pipe.transformer)
results = []
for case in CACHED:
    settings = {"residual_diff_threshold": case["residual_diff_threshold"], "warmup_steps": case.get("warmup_steps", 0)}
    if "taylorseer_derivative" in case:
        settings["enable_taylorseer"] = True
        settings["taylorseer_kwargs"] = {"n_derivatives": case["taylorseer_derivative"]}
    decisions.clear()
    with utils.cache_context(utils.create_cache_context(**settings)):
        images = pipe(**call_arguments(case, torch.from_numpy)).images
    results.append({"images": images, "reused": np.array(decisions)})
    print(case, sum(decisions))
versions = {name: version(name) for name in ("torch", "diffusers", "para-attn")}
save("tests/golden/para_attention.npz", CACHED, results, versions)
