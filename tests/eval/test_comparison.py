"""The picture of both sides and their difference."""

import numpy as np
import pytest

from FBCache_ms.eval.run_flux_withFBCache_pipeline import compared
from FBCache_ms.eval.shared.comparison import GAP, LEAST_SIDE, PAPER, amplification, side_by_side

LABELS = (("left", ""), ("{times} times", "between"), ("right", ""))


@pytest.mark.parametrize("largest, times", [(0, 1), (1, 1), (0.5, 2), (0.3, 4), (0.001, 1024)])
def test_the_largest_difference_becomes_bright(largest, times):
    assert amplification(np.array([[0, largest]])) == times


def panels(page, height, width):
    """The three panels of a page, from its bottom, each as wide as its column."""
    pixels = np.asarray(page)[-GAP - height : -GAP]
    column = (page.width - 4 * GAP) // 3
    return [pixels[:, GAP + place * (column + GAP) :][:, :width] for place in range(3)]


@pytest.mark.parametrize("height, width", [(16, 16), (8, 32), (64, 4), (300, 280)])
def test_a_page_has_both_pictures_and_what_lies_between(height, width):
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 128, (height, width, 3)) / 255
    picture = reference + rng.integers(0, 2, reference.shape) * 32 / 255
    factor = max(LEAST_SIDE // max(height, width), 1)
    page = side_by_side(reference, picture, LABELS)
    left, middle, right = panels(page, height * factor, width * factor)
    for shown, expected in ((left, reference), (middle, (picture - reference) * 8), (right, picture)):
        assert np.abs(shown[::factor, ::factor] - np.minimum(expected, 1) * 255.0).max() < 1
        np.testing.assert_array_equal(shown, shown[::factor, ::factor].repeat(factor, 0).repeat(factor, 1))


def test_no_label_is_cut_off_beside_a_narrow_picture():
    pictures = np.zeros((64, 2, 3))
    labels = (("a", "b"), ("a label of some length", ""), ("c", "d"))
    page = np.asarray(side_by_side(pictures, pictures, labels))
    assert (page[:, -GAP:] == PAPER).all() and (page[:GAP] == PAPER).all()
    column = (page.shape[1] - 4 * GAP) // 3
    between = page[:, 2 * GAP + 2 * column : 3 * GAP + 2 * column]
    assert column > 64 and (between == PAPER).all()


def test_a_mean_psnr_leaves_equal_pictures_out():
    rng = np.random.default_rng(0)
    pictures = rng.random((2, 16, 16, 3)) / 2
    references = pictures + np.array([0, 0.1]).reshape(2, 1, 1, 1)
    report = {"cached_steps": [2], "steps": 4}
    psnr, ssim, sheets = compared(pictures, references, report)
    assert psnr == pytest.approx(20) and ssim < 1 and len(sheets) == 2
    assert np.isinf(compared(pictures, pictures, report)[0])
