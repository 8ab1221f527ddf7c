"""Makes tests/golden/linear_bfloat16.npz: linear layers in torch's bfloat16.

python -m venv /tmp/cache_dit && /tmp/cache_dit/bin/pip install -r tools/golden/requirements_cache_dit.txt
/tmp/cache_dit/bin/python tools/golden/make_linear_bfloat16.py
"""

import numpy as np
import torch
from cases import LINEAR, save


def bits(tensor):
    """bfloat16 as its bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


results = []
for case in LINEAR:
    torch.manual_seed(case["seed"])
    layer = torch.nn.Linear(case["inputs"], case["outputs"]).to(torch.bfloat16)
    rows = torch.randn(case["rows"], case["inputs"], dtype=torch.bfloat16)
    with torch.no_grad():
        numbers = {"rows": rows, "weight": layer.weight, "bias": layer.bias, "output": layer(rows)}
    results.append({name: bits(tensor.detach()) for name, tensor in numbers.items()})
save("tests/golden/linear_bfloat16.npz", LINEAR, results, {"torch": torch.__version__})
