import pytest

from FBCache_ms import CacheConfig
from FBCache_ms.config import PRESETS


@pytest.mark.parametrize(
    "tag, config",
    [
        ("F1B0_W4M0MC0_T1O2_R0.12", CacheConfig(0.12, 2, 4)),
        ("F1B0_W0M0MC0_T0O0_R0.08", CacheConfig(0.08, 0, 0)),
        ("F1B0_W0M0MC0_T1O1_R0", CacheConfig(0, 1, 0)),
        ("F1B0_W28M0MC0_T1O3_R1", CacheConfig(1.0, 3, 28)),
        ("F1B0_W0M0MC0_T0O0_R0.123456789", CacheConfig(0.123456789)),
    ],
)
def test_a_tag_names_its_config_and_the_config_gives_the_tag_back(tag, config):
    assert CacheConfig.from_tag(tag) == config
    assert str(config) == tag


@pytest.mark.parametrize("tag", ["F1B0_W4I1M0MC0_T0O2_R0.12", "F1B0_W4M0MC0_T0_R0.12"])
def test_a_tag_may_say_what_is_implied(tag):
    assert str(CacheConfig.from_tag(tag)) == "F1B0_W4M0MC0_T0O0_R0.12"


@pytest.mark.parametrize(
    "tag, named",
    [
        ("F8B0_W4M0MC0_T0O0_R0.12", "Fn=8"),
        ("F1B2_W4M0MC0_T0O0_R0.12", "Bn=2"),
        ("F1B0_W4I2M0MC0_T0O0_R0.12", "I=2"),
        ("F1B0_W4M9MC0_T0O0_R0.12", "M=9"),
        ("F1B0_W4M0MC3_T0O0_R0.12", "MC=3"),
        ("F1B0_W4M0MC0_T1O0_R0.12", "order"),
        ("F1B0_W4M0MC0_T0O0_R1.5", "1.5"),
        ("F1B0", "must read like"),
        ("", "must read like"),
        (None, "must read like"),
    ],
)
def test_a_tag_that_cannot_be_had_is_refused_by_name(tag, named):
    with pytest.raises(ValueError, match=named):
        CacheConfig.from_tag(tag)


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("residual_diff_threshold", -0.1, ValueError),
        ("residual_diff_threshold", 1.1, ValueError),
        ("residual_diff_threshold", float("nan"), ValueError),
        ("residual_diff_threshold", "0.1", TypeError),
        ("residual_diff_threshold", True, TypeError),
        ("taylorseer_derivative", -1, ValueError),
        ("taylorseer_derivative", 1.0, TypeError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", None, TypeError),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=field):
        CacheConfig(**{field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="residual_threshold"):
        CacheConfig(residual_threshold=0.1)


@pytest.mark.parametrize("name, threshold", [("conservative", 0.05), ("balanced", 0.12), ("aggressive", 0.2)])
def test_presets(name, threshold):
    assert CacheConfig.preset(name) == CacheConfig(threshold)
    assert name in PRESETS


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ValueError, match="turbo"):
        CacheConfig.preset("turbo")
