import json
import math

import numpy as np
import pytest
from narrow import make_narrow

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import learn_mask
from FBCache_ms.eval.learn_mask import Estimate, anneal, interpolation, starts, with_mask


@pytest.mark.parametrize("steps, computed", [(28, 2), (28, 8), (50, 12), (5, 4)])
def test_every_start_computes_the_first_step_and_as_many_as_asked(steps, computed):
    for mask in starts(steps, computed):
        assert (len(mask), sum(mask), mask[0]) == (steps, computed, 1)


def test_annealing_finds_the_best_mask_without_trying_all():
    best = (1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1)

    def error(mask):
        return 1 + sum(one != other for one, other in zip(mask, best))

    errors = anneal(error, starts(16, 5), 300, seed=1)
    assert min(errors, key=errors.get) == best
    assert len(errors) <= 300 < math.comb(15, 4)
    assert all(sum(mask) == 5 and mask[0] == 1 for mask in errors)


def test_annealing_survives_errors_that_run_away_and_stops_where_no_mask_is_left():
    errors = anneal(lambda mask: math.inf, starts(5, 3), 1000)
    assert len(errors) == math.comb(4, 2)


def test_interpolation_is_exact_on_polynomials_from_their_order_on():
    mask, steps = (1, 1, 0, 1, 0, 0), np.arange(6)
    for coordinates in (steps, np.sqrt(1 - steps / 6)):
        weights = interpolation(mask, coordinates, 2)
        values = 1 + 2 * coordinates + 3 * coordinates**2
        np.testing.assert_allclose((weights @ values)[3:], values[3:])
        np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(interpolation(mask, steps, 0) @ steps, [0, 1, 1, 3, 3, 3])


def test_the_estimate_is_the_weighted_error_of_the_velocities():
    sigmas, rng = np.array([1, 0.7, 0.3, 0]), np.random.default_rng(0)
    path = rng.standard_normal((4, 2, 3))
    velocities = np.diff(path, axis=0) / np.diff(sigmas)[:, None, None]
    # Steps 1 and 2 reuse the first velocity; their deviations count by their strides and by 1 - sigma behind them.
    deviation = -0.4 * 0.7 * (velocities[0] - velocities[1]) - 0.3 * 1 * (velocities[0] - velocities[2])
    assert Estimate(path, sigmas, 0)((1, 0, 0)) == pytest.approx((deviation**2).mean())
    assert Estimate(path, sigmas, 0)((1, 1, 1)) == 1e-30


def test_a_mask_keeps_the_forecast_and_the_span_alone():
    config = with_mask(CacheConfig.preset("hicache"), (1, 0, 1))
    assert (config.gate, config.steps_computation_mask, config.schedule) == ("static", (1, 0, 1), None)
    assert (config.forecast, config.taylorseer_derivative) == ("hicache", 2)
    with pytest.raises(ValueError, match="dicache"):
        with_mask(CacheConfig.preset("dicache"), (1, 0, 1))


def test_learnt_masks_are_preset_files_that_cache_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learn_mask, "ESTIMATES", 10)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nthree birds")
    options = ["--ckpt", str(make_narrow(tmp_path / "narrow")), "--image_size", "32", "32", "--prompts", str(prompts)]
    options += ["--num_inference_steps", "5", "--learn_from", "2", "--evaluations", "3", "--cache", "hicache"]
    assert learn_mask.main([*options, "--computed", "2", "3", "--save_path", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for computed in (2, 3):
        file = tmp_path / "out" / f"mask_{computed}_of_5.json"
        assert f"use it: --cache {file}" in text
        config, preset = CacheConfig.named(str(file)), json.loads(file.read_text())
        assert sum(config.steps_computation_mask) == computed == preset["figures"]["computed_steps"]
        assert preset["search"]["prompts"] == ["a cat", "two dogs"] and preset["prompts"] == ["three birds"]
        assert 0 < preset["search"]["latent_mse"] <= preset["search"]["latent_mse_at_the_start"]
    assert (tmp_path / "out" / "sweep.json").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--computed", "28"], "--computed must be in"),
        (["--learn_from", "14"], "raise --limit"),
        (["--cache", "dicache"], "dicache"),
        (["--evaluations", "0"], "--evaluations"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        learn_mask.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
