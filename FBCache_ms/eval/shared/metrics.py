"""How near a picture comes to another, and a set of pictures to another set.

Pictures are float arrays (H, W, 3) in [0, 1].
"""

from contextlib import contextmanager

import numpy as np

SSIM_WINDOW = 11
"""Pixels that SSIM looks at in each direction."""


@contextmanager
def open_picture(path):
    """A file as PIL's picture, not decoded yet.

    Raises OSError, naming the file, for one that is not there, no picture, or, on decoding, cut short.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"picture {path} cannot be read: {reason}") from None


def read_picture(path):
    """The picture of a file, (H, W, 3) in [0, 1]. Raises OSError as open_picture does."""
    with open_picture(path) as picture:
        return np.asarray(picture.convert("RGB")) / 255


def psnr(reference, picture):
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, picture, data_range=1))


def ssim(reference, picture):
    """Structural similarity, at most 1 (Wang et al. 2004, Gaussian weights), of pictures of 11 pixels or more."""
    from skimage.metrics import structural_similarity

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


def cosine_similarity(features, others):
    """The cosines of the angles between the rows of two arrays (N, D): (N,) in [-1, 1]."""
    features, others = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features, others))
    return (features * others).sum(1).clip(-1, 1)


def frechet_distance(features, reference_features):
    """The Frechet distance of two sets of features, as normal distributions (Heusel et al. 2017, the FID's formula).

    Args:
        features, reference_features: arrays (N, D) and (M, D), N and M at least 2.

    Returns |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) with the means and the sample covariances of either set.

    Raises ValueError for other shapes.
    """
    sets = [np.asarray(part, np.float64) for part in (features, reference_features)]
    if any(part.ndim != 2 or len(part) < 2 for part in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            "a Frechet distance needs two arrays (N, D) of the same D and of 2 pictures or more each, not "
            f"{sets[0].shape} and {sets[1].shape}"
        )
    means = [part.mean(0) for part in sets]
    # C = A' A for the centred features A, so the trace of the root is the sum of the singular values of A1 A2', which
    # keeps the digits that the root of a singular C1 C2 loses where pictures are fewer than dimensions.
    roots = [(part - mean) / np.sqrt(len(part) - 1) for part, mean in zip(sets, means)]
    triangles = [np.linalg.qr(root, mode="r") for root in roots]
    trace = np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * trace)
