"""How near a picture comes to another: pictures are float arrays (H, W, 3) in [0, 1]."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def psnr(reference, picture):
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, picture, data_range=1))


def ssim(reference, picture):
    """Structural similarity, at most 1 (Wang et al. 2004, Gaussian weights)."""
    return float(
        structural_similarity(
            reference,
            picture,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
