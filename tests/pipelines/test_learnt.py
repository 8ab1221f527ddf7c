"""Who is told that a schedule was learnt on another checkpoint than the one that is drawn with."""

from types import SimpleNamespace

import pytest
from narrow import make_narrow

from FBCache_ms.config import CacheConfig
from FBCache_ms.pipelines import cached_transformer
from FBCache_ms.pipelines.cached_transformer import is_embedded, warn_of_learnt
from FBCache_ms.pipelines.flux import FluxPipeline
from FBCache_ms.rules.schedules import LEARNT, SCHEDULES
from FBCache_ms.runtime.checkpoint import TINY_FLUX


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """What is said in a process that has said nothing yet."""
    said = []
    cached_transformer._warn.cache_clear()
    monkeypatch.setattr(cached_transformer.logger, "warning", said.append)
    yield said
    cached_transformer._warn.cache_clear()


def loaded_from(path):
    return SimpleNamespace(config={"_name_or_path": path})


def test_the_learnt_schedules_say_so():
    assert {schedule.name for schedule in SCHEDULES.values() if schedule.learnt} == set(LEARNT)


@pytest.mark.parametrize(
    "path, embedded",
    [
        (str(TINY_FLUX / "transformer"), True),
        (str(TINY_FLUX), True),
        ("black-forest-labs/FLUX.1-dev", False),
        ("elsewhere/tiny_flux/transformer", False),
        (None, False),
    ],
)
def test_a_transformers_config_tells_whether_it_is_the_embedded_one(path, embedded):
    assert is_embedded(loaded_from(path)) is embedded


@pytest.mark.parametrize("preset", LEARNT)
def test_another_checkpoint_is_told_once(preset, said):
    for _ in range(2):
        warn_of_learnt(CacheConfig.preset(preset), loaded_from("elsewhere"))
    (line,) = said
    assert preset in line and "embedded checkpoint" in line and "fbcache learn" in line and "\n" not in line


@pytest.mark.parametrize(
    "preset, path", [("learnt_6", str(TINY_FLUX / "transformer")), ("fora", "elsewhere"), ("balanced", "elsewhere")]
)
def test_nobody_else_is_told(preset, path, said):
    warn_of_learnt(CacheConfig.preset(preset), loaded_from(path))
    assert said == []


@pytest.mark.parametrize(
    "preset, field",
    [("teacache", "teacache_coefficients"), ("magcache", "magcache_ratios"), ("teacache_qwenimage", None)],
)
def test_what_was_fitted_to_one_model_is_said_of_another(preset, field, said, pipe):
    for _ in range(2):
        warn_of_learnt(CacheConfig.preset(preset), loaded_from("elsewhere"))
    assert len(said) == (field is not None)
    assert all(field in line and "FluxTransformer2DModel" in line for line in said)
    warn_of_learnt(CacheConfig.preset(preset), pipe.transformer)
    assert len(said) == (field is not None)


def test_a_pipeline_tells_when_it_draws(pipe, said, tmp_path, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "_draw_cached", lambda pipe, given, config: None)
    pipe("a cat", cache_config=CacheConfig.preset("learnt_8"))
    assert said == []
    narrow = FluxPipeline.from_pretrained(str(make_narrow(tmp_path / "narrow")))
    narrow("a cat", cache_config=CacheConfig.preset("learnt_8"))
    assert len(said) == 1
