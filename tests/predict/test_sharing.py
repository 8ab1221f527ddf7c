"""What sharing a picture is predicted to take."""

import pytest

from FBCache_ms.eval.shared.published import ATLAS, PLAIN, SHAPES, best
from FBCache_ms.predict.roofline import WHOLE_LOOP, seconds, step
from FBCache_ms.predict.sharing import Links, received_bytes, shared_step_seconds


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_heads_are_two_parts_of_as_many_as_there_are_devices_of_keys_and_values(ranks):
    gather, ulysses = (received_bytes(SHAPES, ranks, 57, scheme) for scheme in ("gather", "ulysses"))
    # bfloat16 keys and values of all tokens but a device's own.
    assert gather == 2 * 2 * SHAPES.tokens * SHAPES.width * 57 * (ranks - 1) / ranks
    assert ulysses == pytest.approx(gather * 2 / ranks)


def test_one_device_takes_what_it_takes_alone():
    device = best(ATLAS).device
    alone = seconds(device, WHOLE_LOOP, step(SHAPES, PLAIN, WHOLE_LOOP))
    assert shared_step_seconds(device, WHOLE_LOOP, Links("slow", 1.0), SHAPES, PLAIN, 1) == pytest.approx(alone)
