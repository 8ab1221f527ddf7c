"""Makes tests/golden/bfloat16.npz: ParaAttention's differences and TaylorSeer forecasts of tensors in bfloat16.

python -m venv /tmp/peer && /tmp/peer/bin/pip install -r tools/golden/requirements_para_attention.txt
/tmp/peer/bin/pip install --no-deps para-attn==0.3.38
/tmp/peer/bin/python tools/golden/make_bfloat16.py
"""

from importlib.metadata import version

import numpy as np
import torch
from cases import BFLOAT16, DISTANCES, save, walk
from para_attn.first_block_cache.taylorseer import TaylorSeer
from para_attn.first_block_cache.utils import are_two_tensors_similar


class Heard(float):
    """A threshold that remembers what was compared with it."""

    def __gt__(self, difference):
        self.difference = difference
        return super().__gt__(difference)


def difference(reference, probe):
    """The relative difference that ParaAttention compares with its threshold."""
    threshold = Heard(1.0)
    are_two_tensors_similar(reference, probe, threshold=threshold)
    return threshold.difference


def forecasts(tensors, apart):
    """Order 3's forecasts at each distance, as the bits of bfloat16, after computed steps so far apart."""
    seer = TaylorSeer(n_derivatives=3)
    for tensor in tensors:
        for _ in range(apart):
            seer.mark_step_begin()
        seer.update(tensor)
    last, values = seer.current_step, []
    for k in DISTANCES:
        seer.current_step = last + k
        values.append(seer.approximate_value().view(torch.int16).numpy().view(np.uint16))
    return np.stack(values)


results = []
for case in BFLOAT16:
    tensors = torch.from_numpy(walk(case)).to(torch.bfloat16)
    differences = np.array([difference(tensors[0], probe) for probe in tensors[1:]])
    results.append({"differences": differences, "forecasts": forecasts(tensors, case["apart"])})
    print(case, differences)
save("tests/golden/bfloat16.npz", BFLOAT16, results, {name: version(name) for name in ("torch", "para-attn")})
