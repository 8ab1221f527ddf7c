"""The drawing process."""

import pytest

from FBCache_ms.config import CacheConfig
from FBCache_ms.serve.drawing import Drawing
from FBCache_ms.serve.painter import NotANumber, Painter

FAR = 1e38
"""A guidance scale whose sinusoids are no numbers."""


@pytest.fixture
def painter(pipe, monkeypatch):
    """One that draws with the tests' pipeline, and has no web process."""
    monkeypatch.setattr(Painter, "load", lambda painter: pipe)
    monkeypatch.setattr(Painter, "listen", lambda painter: None)
    return Painter(None, {"prompt_tokens": None})


@pytest.mark.parametrize("scale, kind", [(3.5, "drawn"), (FAR, "error")])
def test_what_is_not_a_number_is_an_error_and_no_picture(painter, scale, kind):
    drawing = Drawing("a big red circle", None, 64, 64, 2, {"guidance_scale": scale}, 0, str(CacheConfig()))
    message = painter.answer(1, [drawing])
    assert message[:2] == (kind, 1) and (kind == "drawn" or message[2].startswith("what was drawn is not a number"))


def test_a_model_that_draws_no_numbers_is_not_served(painter):
    served = {"sizes": [(64, 64)], "tags": [(str(CacheConfig()), (1,))], "branches": (1,)}
    painter.settings.update(served, guidance={"guidance_scale": FAR})
    with pytest.raises(NotANumber):
        painter.warm_up()
