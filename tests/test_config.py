from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from FBCache_ms import CacheConfig
from FBCache_ms.cache.gates import check_steps, step_tables
from FBCache_ms.config import PRESETS
from FBCache_ms.rules.schedules import (
    ASK,
    COMPUTE,
    LEARNT,
    MASKS,
    MAX_STEPS,
    REUSE,
    duca,
    fora,
    learnt,
    magcache,
    nearest,
    run_lengths,
    step_actions,
    taylorseer,
    toca,
)
from FBCache_ms.rules.when import RULES


@pytest.mark.parametrize(
    "tag, config",
    [
        ("F1B0_W4M0MC0_T1O2_R0.12", CacheConfig(0.12, 2, 4)),
        ("F1B0_W0M0MC0_T0O0_R0.08", CacheConfig(0.08, 0, 0)),
        ("F1B0_W0M0MC0_T1O1_R0", CacheConfig(0, 1, 0)),
        ("F1B0_W28M0MC0_T1O3_R1", CacheConfig(1.0, 3, 28)),
        ("F1B0_W0M0MC0_T0O0_R0.123456789", CacheConfig(0.123456789)),
        (
            "F8B4_W8I2M9MC3_T1O1_R0.08",
            CacheConfig(
                0.08,
                1,
                8,
                warmup_interval=2,
                max_cached_steps=9,
                max_consecutive_cache_hits=3,
                Fn_compute_blocks=8,
                Bn_compute_blocks=4,
            ),
        ),
        (
            "F0B0_W0M0MC0_T0O0_R0.12,gate=teacache,teacache_coefficients=2/-0.5",
            CacheConfig(gate="teacache", teacache_coefficients=(2, -0.5)),
        ),
        ("F1B0_W0M0MC0_T0O0_R0.12,steps_computation_mask=1011", CacheConfig(steps_computation_mask=(1, 0, 1, 1))),
        ("F1B0_W0M0MC0_T0O0_R0.12,max_consecutive_cache_hits=0", CacheConfig(max_consecutive_cache_hits=0)),
        ("F1B0_W0M0MC0_T0O0_R0.12,start=0.1,end=0.75", CacheConfig(start=0.1, end=0.75)),
    ],
)
def test_a_tag_names_its_config_and_the_config_gives_the_tag_back(tag, config):
    assert CacheConfig.from_tag(tag) == config
    assert str(config) == tag


def test_every_field_comes_back_from_a_tag():
    others = {
        "residual_diff_threshold": 0.3,
        "taylorseer_derivative": 1,
        "warmup_steps": 3,
        "warmup_interval": 2,
        "max_cached_steps": 7,
        "max_consecutive_cache_hits": 2,
        "max_accumulated_residual_diff": 1.5,
        "probe": "hidden",
        "downsample_factor": 2,
        "batch_reduction": "max",
        "start": 0.1,
        "end": 0.9,
    }
    groups = [
        {
            **others,
            "gate": "cg_taylor",
            "Fn_compute_blocks": 2,
            "Bn_compute_blocks": 1,
            "forecast": "newton",
            "forecast_coordinate": "sigma",
            "derivatives_dtype": "float32",
        },
        {"span": "stacks", "residual_diff_threshold_single": 0.2},
        {
            "gate": "static",
            "schedule": "taylorseer",
            "schedule_interval": 7,
            "taylorseer_derivative": 2,
            "forecast": "hicache",
            "hicache_sigma": 0.3,
        },
        {
            "gate": "static",
            "schedule": "magcache",
            "magcache_threshold": 0.1,
            "magcache_max_skips": 2,
            "magcache_retention": 0.2,
            "magcache_ratios": (1, 1.25),
        },
        {"steps_computation_mask": (1, 0)},
        {
            "gate": "static",
            "schedule": "fora",
            "taylorseer_derivative": 1,
            "forecast": "table",
            "forecast_weights": (1, 0.5, -1e-7, 1 / 3),
        },
        {
            "gate": "static",
            "schedule": "spectrum_14",
            "taylorseer_derivative": 4,
            "forecast": "spectrum",
            "spectrum_ridge": 0.5,
        },
        {
            "gate": "static",
            "schedule": "meancache_10",
            "taylorseer_derivative": 3,
            "forecast": "meancache",
            "meancache_steps": (2, 1, 4),
        },
        {"gate": "static", "schedule": "fora", "span": "model", "forecast_target": "output"},
    ]
    for rule in RULES.values():
        own = {
            name: option.default[:2] if option.kind is tuple else 2 * option.default
            for name, option in rule.options.items()
        }
        groups.append({"gate": rule.name, "taylorseer_derivative": rule.fewest_orders, **own})
    assert {name for group in groups for name in group} == {option.name for option in fields(CacheConfig)}
    for group in groups:
        config = CacheConfig(**group)
        assert CacheConfig.from_tag(str(config)) == config
        assert all(getattr(config, name) == value for name, value in group.items())


@pytest.mark.parametrize(
    "tag, full",
    [
        ("F1B0_W4I1M0MC0_T0O2_R0.12", "F1B0_W4M0MC0_T0O0_R0.12"),
        ("F1B0_W4M0MC0_T0_R0.12", "F1B0_W4M0MC0_T0O0_R0.12"),
        ("F1B0_W8I2MC8_R0.8", "F1B0_W8I2M0MC8_T0O0_R0.8"),
        ("F4B0_W4MC4_R0.12", "F4B0_W4M0MC4_T0O0_R0.12"),
    ],
)
def test_a_tag_may_leave_out_what_is_implied(tag, full):
    assert str(CacheConfig.from_tag(tag)) == full


@pytest.mark.parametrize(
    "tag, named",
    [
        ("F0B0_W4M0MC0_T0O0_R0.12", "Fn_compute_blocks=0"),
        ("F1B0_W4M0MC0_T1O0_R0.12", "order"),
        ("F1B0_W4M0MC0_T0O0_R1.5", "1.5"),
        ("F1B0_W4M0MC0_T0O0_R0.12,max_cached_steps=-3", "max_cached_steps"),
        ("F1B0_W0_R0.12,colour=red", "colour"),
        ("F1B0_W0_R0.12,gate=a=b", "a=b"),
        ("F1B0_W0_R0.12,residual_diff_threshold=0.5", "twice"),
        ("F1B0_W0_R0.12,gate=guess", "guess"),
        ("F1B0_W0_R0.12,start=early", "early"),
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
        ("max_cached_steps", -2, ValueError),
        ("end", 1.5, ValueError),
        ("gate", "magic", ValueError),
        ("gate", 1, TypeError),
        ("schedule", "never", ValueError),
        ("steps_computation_mask", (1, 2), ValueError),
        ("steps_computation_mask", (), ValueError),
        ("steps_computation_mask", 3, TypeError),
        ("teacache_coefficients", (1.0,) * 6, ValueError),
        ("teacache_coefficients", (10**400,), ValueError),
        ("max_cached_steps", 10**400, ValueError),
        ("teacache_coefficients", (float("inf"),), ValueError),
        ("teacache_coefficients", ("1",), TypeError),
        ("max_accumulated_residual_diff", float("inf"), ValueError),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=field):
        CacheConfig(**{field: value})


def test_how_many_numbers_a_field_has_is_told():
    with pytest.raises(ValueError, match="teacache_coefficients must be 1 to 5 numbers"):
        CacheConfig(teacache_coefficients=(1.0,) * 6)
    with pytest.raises(ValueError, match="steps_computation_mask must be 1 or more digits 0 and 1, not"):
        CacheConfig(steps_computation_mask=())


MEANCACHE = {"gate": "static", "schedule": "meancache_10", "forecast": "meancache", "taylorseer_derivative": 3}


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"gate": "static"}, "needs a schedule"),
        ({"warmup_interval": 4}, "warmup_interval=4 has no effect with warmup_steps=0"),
        ({"schedule": "fora", "steps_computation_mask": (1, 0)}, "give one"),
        ({"Fn_compute_blocks": 0}, "compares what the first blocks add"),
        ({"gate": "cg_taylor"}, "taylorseer_derivative must be 1 or more"),
        ({"forecast": "dicache"}, "taylorseer_derivative must be 1"),
        ({"forecast": "dicache", "taylorseer_derivative": 1, "gate": "teacache"}, "scaled by the probe"),
        ({"forecast": "dicache", "taylorseer_derivative": 1, "gate": "cg_taylor"}, "scaled by the probe"),
        ({"forecast": "newton"}, "plain reuse"),
        ({"forecast": "table", "taylorseer_derivative": 1}, "gate must be static, not 'fbcache'"),
        ({"forecast": "table", "gate": "static", "schedule": "fora"}, "plain reuse"),
        ({"forecast_weights": (1, 1)}, "has no effect with forecast='taylor'"),
        ({"forecast_coordinate": "sigma"}, "plain reuse"),
        ({"gate": "static", "schedule": "fora", "max_cached_steps": 3}, "has no effect with gate='static'"),
        ({"span": "stacks", "gate": "teacache"}, "probes each stack"),
        ({"span": "single", "gate": "fbcache_or_teacache"}, "has one gate"),
        ({"span": "single", "Bn_compute_blocks": 1}, "sets its own blocks"),
        ({"derivatives_dtype": "float32"}, "taylorseer_derivative=0"),
        ({"start": 0.8, "end": 0.2}, "is behind"),
        ({"teacache_threshold": 0.2}, "has no effect with gate='fbcache'"),
        ({"gate": "teacache", "residual_diff_threshold": 0.2}, "has no effect with gate='teacache'"),
        ({"residual_diff_threshold_single": 0.2}, "has no effect with span='blocks'"),
        ({"hicache_sigma": 0.3}, "has no effect with forecast='taylor'"),
        ({"forecast": "hicache", "forecast_coordinate": "sigma"}, "has no effect with forecast='hicache'"),
        ({"schedule": "magcache", "schedule_interval": 3}, "has no effect with schedule='magcache'"),
        ({"gate": "static", "schedule": "duca"}, "schedule 'duca' has steps that refresh .* gate must be refresh"),
        ({"gate": "refresh"}, "gate 'refresh' needs a schedule"),
        ({"gate": "refresh", "schedule": "toca", "taylorseer_derivative": 1}, "taylorseer_derivative 0"),
        ({"gate": "refresh", "schedule": "toca", "Fn_compute_blocks": 1}, "Fn_compute_blocks"),
        ({"gate": "refresh", "schedule": "toca", "span": "single"}, "span must be 'blocks'"),
        ({"gate": "refresh", "schedule": "toca", "forecast_target": "residual"}, "forecast_target 'output'"),
        ({"gate": "speca", "Bn_compute_blocks": 1}, "compares what the last block gives"),
        ({"gate": "speca", "forecast_target": "residual"}, "forecast_target 'output'"),
        ({"forecast_target": "output", "gate": "none"}, "has no effect with gate 'none'"),
        ({**MEANCACHE, "span": "blocks"}, "is of the velocity, so span must be 'model'"),
        ({**MEANCACHE, "gate": "easycache", "schedule": None}, "gate must be static"),
        ({"meancache_steps": (3,)}, "has no effect with forecast='taylor'"),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        CacheConfig(**settings)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="residual_threshold"):
        CacheConfig(residual_threshold=0.1)


def test_the_first_blocks_follow_the_gate_unless_they_were_chosen():
    assert CacheConfig().changed(gate="teacache").Fn_compute_blocks == 0
    assert CacheConfig.preset("teacache").changed(gate="fbcache").Fn_compute_blocks == 1
    assert CacheConfig(Fn_compute_blocks=4).changed(gate="teacache").Fn_compute_blocks == 4


def test_only_numbers_keep_the_structure():
    base = CacheConfig()
    assert base.structure == CacheConfig(0.5, warmup_steps=3, schedule="fora", end=0.5).structure
    assert base.structure != CacheConfig(taylorseer_derivative=1).structure


@pytest.mark.parametrize("name", PRESETS)
def test_switched_off_computes_every_step_with_the_same_structure(name):
    off = CacheConfig.preset(name).switched_off()
    assert off.structure == CacheConfig.preset(name).structure
    assert set(step_actions(off, 40, (1.0,))) == {COMPUTE}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_their_tags(name):
    config = CacheConfig.preset(name)
    assert CacheConfig.from_tag(str(config)) == config


@pytest.mark.parametrize("name, threshold", [("conservative", 0.05), ("balanced", 0.12), ("aggressive", 0.2)])
def test_the_projects_own_presets(name, threshold):
    assert CacheConfig.preset(name) == CacheConfig(threshold)


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ValueError, match="turbo"):
        CacheConfig.preset("turbo")


@pytest.mark.parametrize(
    "ask, meant",
    [
        (lambda: CacheConfig.named("ballanced"), "balanced"),
        (lambda: CacheConfig.named("Teacache"), "teacache"),
        (lambda: CacheConfig.preset("taylor_seer"), "taylorseer"),
        (lambda: CacheConfig(gate="fbcach"), "fbcache"),
        (lambda: CacheConfig(schedule="maskslow", gate="static"), "mask_slow"),
        (lambda: CacheConfig.named("F1B0_W0_R0.12,warmup_step=3"), "warmup_steps"),
    ],
)
def test_a_mistyped_name_is_told_the_list_and_its_neighbour(ask, meant):
    with pytest.raises(ValueError) as refused:
        ask()
    said = str(refused.value)
    assert said.endswith(f"; did you mean {meant}?") and said.count(meant) >= 2 and "\n" not in said


def test_what_is_near_nothing_has_no_neighbour():
    with pytest.raises(ValueError) as refused:
        CacheConfig.named("xyz")
    assert str(refused.value).endswith(list(PRESETS)[-1]) and "cache 'xyz' is no tag like F1B0" in str(refused.value)


@pytest.mark.parametrize("name", LEARNT)
def test_a_learnt_schedule_computes_its_own_steps_and_elsewhere_as_many(name):
    for steps, computed in LEARNT[name].items():
        assert tuple(learnt(steps, LEARNT[name]).nonzero()[0]) == computed
        assert len(computed) == int(name.partition("_")[2])
    assert learnt(36, LEARNT[name]).sum() == learnt(100, LEARNT[name]).sum() == len(computed)
    assert [list(learnt(steps, LEARNT[name])[:1]) for steps in (1, 4, 20)] == [[1]] * 3


@pytest.mark.parametrize("interval, number", [(4, 14), (5, 12), (6, 10), (7, 9), (8, 8)])
def test_taylorseer_computes_as_many_of_50_steps_as_published(interval, number):
    assert taylorseer(50, interval).sum() == number


def test_duca_refreshes_every_second_step_of_a_run_and_toca_all():
    assert duca(12, 6).tolist() == [1, 1, 1, 0, 2, 0, 2, 0, 1, 0, 2, 0]
    assert toca(8, 3).tolist() == [1, 1, 1, 2, 2, 1, 2, 2]
    config = CacheConfig.preset("duca").changed(warmup_steps=5, end=0.9)
    assert step_actions(config, 10, ()).tolist() == [1, 1, 1, 1, 1, 0, 2, 1, 0, 2]


def test_refreshes_are_numbered_where_the_graph_looks_for_them():
    limits, _, numbers = step_tables(CacheConfig(gate="refresh", schedule="duca", schedule_interval=6), 12)
    assert numbers[0, -MAX_STEPS:][:12].tolist() == [0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 3, 0]
    assert (limits[0, :12, 0] == np.inf).nonzero()[0].tolist() == [3, 5, 7, 9, 11]


def test_magcache_computes_these_of_flux_28_steps():
    assert np.flatnonzero(magcache(28)).tolist() == [0, 1, 2, 5, 9, 11, 17, 23, 26]


@pytest.mark.parametrize("name, computed", [("slow", 18), ("medium", 15), ("fast", 11), ("ultra", 8)])
def test_cache_dits_masks_compute_so_many_of_28_steps(name, computed):
    mask = run_lengths(*MASKS[f"mask_{name}"])
    assert len(mask) == 28 and mask.sum() == computed and mask[-1] == 1
    assert len(nearest(mask, 50)) == 50


def test_fora_computes_every_interval_th_step():
    assert fora(7, 3).tolist() == [1, 0, 0, 1, 0, 0, 1]


@given(st.integers(1, 60), st.integers(0, 9), st.integers(1, 4), st.floats(0, 0.5), st.floats(0.5, 1))
def test_a_row_computes_first_then_asks(steps, warmup, interval, start, end):
    interval = interval if warmup else 1
    config = CacheConfig(warmup_steps=warmup, warmup_interval=interval, start=start, end=end)
    actions = step_actions(config, steps, (0.1,))
    assert actions[0] == COMPUTE
    for step in range(1, steps):
        forced = step in range(0, warmup, interval) or not start <= step / steps <= end
        assert actions[step] == (COMPUTE if forced else ASK)
    assert set(step_actions(config, steps, (0,))) == {COMPUTE}
    assert set(step_actions(config.changed(gate="static", schedule="fora"), steps, ())) <= {COMPUTE, REUSE}


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="4 steps, the generation has 5"):
        step_actions(CacheConfig(steps_computation_mask=(1, 0, 0, 1)), 5, (0.1,))


def test_a_table_for_another_number_of_steps_is_refused():
    """Every other step is reused, two of four."""
    config = CacheConfig(
        gate="static",
        schedule="fora",
        schedule_interval=2,
        taylorseer_derivative=1,
        forecast="table",
        forecast_weights=(1, 0.5, 1, 2),
    )
    numbers = step_tables(config, 4)[2]
    assert numbers[0, -2 * MAX_STEPS :].reshape(-1, 2)[:4].tolist() == [[0, 0], [1, 0.5], [0, 0], [1, 2]]
    for steps in (3, 6):
        with pytest.raises(ValueError, match="forecast_weights has 4 numbers, and 'table' needs 2 for each of the"):
            check_steps(config, steps)


def test_a_table_without_weights_is_refused_before_anything_is_drawn():
    config = CacheConfig(gate="static", schedule="fora", taylorseer_derivative=1, forecast="table")
    with pytest.raises(ValueError, match="forecast_weights has 0 numbers"):
        check_steps(config, 28)
    assert config.switched_off().forecast_weights is None and check_steps(config.switched_off(), 28) is None


@pytest.mark.parametrize("steps", [(0,), (1.5,), (2, 5)])
def test_meancaches_steps_are_no_more_than_the_velocities_kept(steps):
    with pytest.raises(ValueError, match="whole numbers from 1 to taylorseer_derivative"):
        check_steps(CacheConfig(**MEANCACHE, meancache_steps=steps), 50)


def test_a_threshold_that_falls_is_each_steps_own():
    limits = step_tables(CacheConfig(gate="speca", speca_threshold=2, speca_decay=0.25, speca_floor=0.8), 4)[0]
    np.testing.assert_allclose(limits[0, :4, 3], (2, 2**0.5, 1, 0.8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset, depends", [("speca", True), ("teacache", True), ("balanced", False)])
def test_a_context_asks_for_the_number_of_steps_where_a_threshold_depends_on_it(preset, depends):
    assert CacheConfig.preset(preset).depends_on_steps == depends


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_the_tables_hold_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps must be in \[1, 1000\], not {steps}"):
        step_tables(CacheConfig(), steps)


@pytest.mark.parametrize("held", ['{"config": {}}', '{"config": 3}', "[]", "{}", "no JSON"])
def test_a_preset_file_without_a_tag_is_refused(held, tmp_path):
    (tmp_path / "preset.json").write_text(held)
    with pytest.raises(ValueError, match="preset.json must hold a JSON object with a tag"):
        CacheConfig.named(str(tmp_path / "preset.json"))
