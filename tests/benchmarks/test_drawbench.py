import drawbench
import pytest

from FBCache_ms.cache.gates import check_steps, refreshed_steps
from FBCache_ms.config import CacheConfig


def row(method):
    return next(each for each in drawbench.ROWS if each.method == method)


@pytest.mark.parametrize(
    "method, computed, refreshed",
    [
        ("ToCa N=8", 8, 42),
        ("ToCa N=12", 6, 44),
        ("DuCa N=5", 12, 19),
        ("DuCa N=7", 9, 20),
        ("DuCa N=10", 7, 19),
    ],
)
def test_refreshing_methods_are_counted_as_published(method, computed, refreshed):
    each = row(method)
    assert refreshed_steps(CacheConfig.named(each.cache), each.steps) == refreshed
    assert drawbench.counted_tflops(each, {"computed_steps": computed}) == pytest.approx(each.tflops, rel=5e-3)


@pytest.mark.parametrize("interval, computed", [(4, 14), (5, 12), (7, 9)])
def test_taylorseers_schedules_are_counted_as_published(interval, computed):
    each = row(f"TaylorSeer N={interval} O2")
    assert drawbench.counted_tflops(each, {"computed_steps": computed}) == pytest.approx(each.tflops, rel=5e-3)


def test_every_setting_can_be_had_at_its_number_of_steps():
    for each in drawbench.ROWS:
        if each.cache:
            check_steps(CacheConfig.named(each.cache), each.steps)


def test_a_row_that_nothing_here_does_is_told_so():
    columns = drawbench.columns_of(row("Chipmunk"), None)
    assert columns["Published TFLOPs"] == "1505.87" and columns["Counted"] == columns["Speedup"] == "-"


def test_captions_are_none_that_anything_was_learnt_from():
    captions = drawbench.unseen_captions(5)
    assert len(captions) == 5 and not set(captions) & set(drawbench.held_out_captions(drawbench.LEARNT_FROM))
