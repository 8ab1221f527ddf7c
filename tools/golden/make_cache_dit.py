"""Makes tests/golden/cache_dit.npz: decisions, differences and pictures of cache-dit on the embedded checkpoint.

python -m venv /tmp/cache_dit && /tmp/cache_dit/bin/pip install -r tools/golden/requirements_cache_dit.txt
/tmp/cache_dit/bin/pip install --no-deps cache-dit==1.5.3
PYTHONPATH=. /tmp/cache_dit/bin/python tools/golden/make_cache_dit.py
"""

from importlib.metadata import version

import cache_dit
import diffusers
import numpy as np
import torch
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from cases import DBCACHE, LEAK, call_arguments, save
from dbcache import branches, settings

from FBCache_ms.config import CacheConfig


def leak():
    """The last of two equal generations under a transformer's own cache: what its first step does with the other's."""
    pipe = diffusers.FluxPipeline.from_pretrained("FBCache_ms/tiny_flux")
    pipe.set_progress_bar_config(disable=True)
    cache, _ = settings(CacheConfig.from_tag(LEAK["config"]))
    cache_dit.enable_cache(pipe.transformer, cache_config=cache)
    decisions, decide = [], CachedContextManager.can_cache

    def recorded(*args, **kwargs):
        decisions.append(bool(decide(*args, **kwargs)))
        return decisions[-1]

    CachedContextManager.can_cache = recorded
    for _ in range(2):
        pipe(**call_arguments(LEAK, torch.from_numpy))
    CachedContextManager.can_cache = decide
    return {"reused": np.array(decisions[-LEAK["num_inference_steps"] :])}


results = []
for case in DBCACHE:
    # A pipeline each: without a refresh the first step of the next picture may reuse the last picture's cache.
    pipe = diffusers.FluxPipeline.from_pretrained("FBCache_ms/tiny_flux")
    pipe.set_progress_bar_config(disable=True)
    cache, calibrator = settings(CacheConfig.from_tag(case["config"]))
    cache_dit.enable_cache(pipe, cache_config=cache, calibrator_config=calibrator)
    images = pipe(**call_arguments(case, torch.from_numpy)).images
    (stats,) = cache_dit.summary(pipe, logging=False)
    steps = case.get("num_inference_steps", 28)
    (reused,), (diffs,) = branches(stats, steps, separate_cfg=False)
    results.append({"images": images, "reused": reused, "diffs": diffs})
    print(case["config"], np.flatnonzero(~reused).tolist())
versions = {name: version(name) for name in ("torch", "diffusers", "cache-dit")}
save("tests/golden/cache_dit.npz", [*DBCACHE, LEAK], [*results, leak()], versions)
