"""Makes tests/golden/images.npz: the embedded checkpoint's pictures by torch and diffusers, uncached.

python -m venv /tmp/golden && /tmp/golden/bin/pip install -r tools/golden/requirements_diffusers.txt
/tmp/golden/bin/python tools/golden/make_images.py
"""

import diffusers
import torch
from cases import IMAGES, call_arguments, save

pipe = diffusers.FluxPipeline.from_pretrained("FBCache_ms/tiny_flux")
pipe.set_progress_bar_config(disable=True)
results = [{"images": pipe(**call_arguments(case, torch.from_numpy)).images} for case in IMAGES]
save("tests/golden/images.npz", IMAGES, results, {"torch": torch.__version__, "diffusers": diffusers.__version__})
