import json
import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from make_models import make
from narrow import make_narrow

import mindspore as ms

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import learn_mask
from FBCache_ms.eval.learn_mask import with_mask
from FBCache_ms.eval.shared.closed_loop import ClosedLoop, Ledger, last_residuals
from FBCache_ms.eval.shared.masks import PEAKS, POWER, Estimate, ShortestPath, anneal, lagrange, starts


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


def test_lagrange_weights_are_exact_on_polynomials():
    nodes, x = [0.0, 1.0, 3.0], 4.5
    values = [1 + 2 * node + 3 * node**2 for node in nodes]
    assert np.dot(lagrange(nodes, x), values) == pytest.approx(1 + 2 * x + 3 * x**2)
    assert lagrange([2.0], x) == [1]


@pytest.fixture
def uncached_run():
    """The latents of a run of nine steps, and its noise levels."""
    return np.random.default_rng(0).standard_normal((10, 2, 3)).cumsum(0), np.linspace(1, 0, 10) ** 0.8


def test_the_estimate_is_the_weighted_sum_of_what_each_step_is_off_by(uncached_run):
    path, sigmas = uncached_run
    velocities = np.diff(path, axis=0) / np.diff(sigmas)[:, None, None]
    costs = Estimate(path, sigmas, 0).costs((6,))
    weights = (sigmas[:-1] - sigmas[1:]) * (1 - sigmas[1:]) ** POWER
    norms = [np.sqrt(((velocities[6] - velocities[step]) ** 2).mean()) for step in (7, 8)]
    assert costs == pytest.approx([0, weights[7] * norms[0], weights[7] * norms[0] + weights[8] * norms[1]])


@pytest.mark.parametrize("order, by_sigma", [(0, False), (1, True), (2, False)])
def test_dynamic_programming_finds_the_least_estimate_of_all_masks(order, by_sigma, uncached_run):
    estimate = Estimate(*uncached_run, order, by_sigma)

    def total(places):
        bounds = zip(places, (*places[1:], 9))
        runs = [(places[max(0, index - order) : index + 1], stop) for index, (_, stop) in enumerate(bounds)]
        return sum(estimate.costs(nodes)[stop - nodes[-1] - 1] for nodes, stop in runs)

    best = tuple(np.flatnonzero(estimate.best(4)))
    everything = [(0, *rest) for rest in combinations(range(1, 9), 3)]
    assert total(best) == pytest.approx(min(map(total, everything)))


def test_the_shortest_path_is_the_least_of_all_paths(uncached_run):
    path, sigmas = uncached_run

    def error(start, stop, span):
        """By MeanCache's own terms."""
        velocity = (path[start + 1] - path[start]) / (sigmas[start + 1] - sigmas[start])
        way = sigmas[start] - sigmas[start - span]
        older = (path[start - span + 1] - path[start - span]) / (sigmas[start - span + 1] - sigmas[start - span])
        jvp = ((path[start] - path[start - span]) / way - older) / way if span > 1 else 0
        mean = (path[stop] - path[start]) / (sigmas[stop] - sigmas[start])
        return np.abs(velocity + (sigmas[stop] - sigmas[start]) * jvp - mean).mean()

    def total(places):
        ways = list(zip(places, (*places[1:], 9)))
        best = [min((error(*way, span), span) for span in (1, 2, 3) if span <= max(way[0], 1)) for way in ways]
        spans = [span for (_, span), (start, stop) in zip(best, ways) if stop > start + 1]
        return sum(least**PEAKS for least, _ in best), places, tuple(spans)

    mask, spans = ShortestPath(path, sigmas, 3).best(4)
    _, places, expected = min(total((0, *rest)) for rest in combinations(range(1, 9), 3))
    assert tuple(np.flatnonzero(mask)) == places and spans == expected


def test_a_mask_keeps_the_forecast_and_the_span_alone():
    config = with_mask(CacheConfig.preset("hicache"), (1, 0, 1))
    assert (config.gate, config.steps_computation_mask, config.schedule) == ("static", (1, 0, 1), None)
    assert (config.forecast, config.taylorseer_derivative) == ("hicache", 2)
    with pytest.raises(ValueError, match="dicache"):
        with_mask(CacheConfig.preset("dicache"), (1, 0, 1))


@pytest.fixture
def options(tmp_path):
    """A small checkpoint, five steps, three prompts of which two are learnt from."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nthree birds")
    checkpoint = str(make_narrow(tmp_path / "narrow"))
    model = ["--ckpt", checkpoint, "--image_size", "32", "32", "--num_inference_steps", "5"]
    learnt = ["--prompts", str(prompts), "--learn_from", "2", "--evaluations", "3"]
    return [*model, *learnt, "--save_path", str(tmp_path / "out")]


def test_meancaches_schedule_is_a_preset_file(options, tmp_path, capsys):
    assert learn_mask.main([*options, "--cache", "meancache", "--search", "path", "--computed", "3"]) == 0
    config = CacheConfig.named(str(tmp_path / "out" / "path_3_of_5.json"))
    assert sum(config.steps_computation_mask) == 3 and config.forecast == "meancache"
    with pytest.raises(SystemExit):
        learn_mask.main([*options, "--cache", "taylorseer", "--search", "path", "--computed", "3"])
    assert "--search path is for a --cache with forecast=meancache" in capsys.readouterr().err


def test_learnt_masks_are_preset_files_that_cache_takes(options, tmp_path, capsys):
    page = tmp_path / "page.md"
    arguments = [*options, "--cache", "hicache", "--computed", "2", "2", "3", "--into", str(page)]
    assert learn_mask.main(arguments) == 0
    text = capsys.readouterr().out
    assert page.read_text().split("\n\n", 2)[2] == "".join(f"    {line}\n" for line in text.splitlines())
    for computed in (2, 3):
        file = tmp_path / "out" / f"mask_{computed}_of_5.json"
        assert f"use it: --cache {file}" in text
        config, preset = CacheConfig.named(str(file)), json.loads(file.read_text())
        assert sum(config.steps_computation_mask) == computed == preset["figures"]["computed_steps"]
        assert config.forecast == "hicache" and "--cache hicache --computed 2 2 3" in preset["command"]
        assert preset["search"]["prompts"] == ["a cat", "two dogs"] and preset["prompts"] == ["three birds"]
        assert 0 < preset["search"]["latent_mse"] <= preset["search"]["latent_mse_at_the_start"]
    assert (tmp_path / "out" / "sweep.json").is_file()


def test_fitted_weights_lie_nearer_and_a_second_run_draws_nothing_again(options, tmp_path, monkeypatch):
    arguments = [*options, "--computed", "3", "--fitted", "2", "--iterations", "2", "--batch_size", "1"]
    assert learn_mask.main(arguments) == 0
    file = tmp_path / "out" / "fitted_3_of_5.json"
    config, first = CacheConfig.named(str(file)), json.loads(file.read_text())
    assert config.forecast == "table" and len(config.forecast_weights) == 2 * 3
    assert 0 < first["search"]["latent_mse"] < first["search"]["latent_mse_before_the_fit"]
    drawn = []
    latents = ClosedLoop.latents
    monkeypatch.setattr(ClosedLoop, "latents", lambda *given, **more: drawn.append(given) or latents(*given, **more))
    assert learn_mask.main(arguments) == 0
    # The uncached pictures alone.
    assert len(drawn) == 1
    assert json.loads(file.read_text())["search"] == first["search"]


@pytest.mark.parametrize("size, tries", [(1, 6), (np.nan, 0)])
def test_a_fit_that_ends_early_tells_what_it_has_drawn(size, tries, tmp_path):
    """With the uncached run; nothing is tried where the forecast ran away."""

    class Loop:
        uncached, drawn = np.zeros((1, 2, 3)), 0

        def latents(self, config):
            self.drawn += 1
            return size * np.random.default_rng(self.drawn).normal(size=(1, 2, 3))

        def errors(self, latents):
            return np.ones(1)

        def error(self, latents):
            return 1.0

    loop, args = Loop(), SimpleNamespace(cache=learn_mask.TABLE, learn_from=2)
    search = learn_mask.Search(args, loop, Ledger(tmp_path, (0, 1)))
    factors, _, iterations = search.fit((1, 0, 1, 0), 4)
    assert iterations == 1 and loop.drawn == 1 + 1 + len(factors) + tries
    assert search.pictures == 2 * (1 + loop.drawn)


def test_the_last_residual_of_each_branch_is_order_0_of_its_differences():
    values = np.arange(48, dtype=np.float32)
    for branches in (1, 2):
        shape = (6, 1, 4, 2) if branches == 1 else (2, 3, 1, 4, 2)
        context = SimpleNamespace(branches=branches, shape=(1, 4, 2), derivatives=ms.Tensor(values.reshape(shape)))
        found = last_residuals(context)
        assert found.shape == (branches, 1, 4, 2) and list(found[:, 0, 0, 0]) == [0, 24][:branches]


def test_weights_may_be_fitted_to_each_step_on_its_own(options, tmp_path):
    assert learn_mask.main([*options, "--computed", "3", "--fit", "step"]) == 0
    file = tmp_path / "out" / "stepwise_3_of_5.json"
    config = CacheConfig.named(str(file))
    assert config.forecast == "table" and len(config.forecast_weights) == 2 * 3
    # The newest residual counts most, as in any forecast.
    assert all(0.5 < weight < 2 for weight in config.forecast_weights[::3])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--computed", "28"], "--computed must be in"),
        (["--learn_from", "14"], "raise --limit"),
        (["--cache", "dicache"], "dicache"),
        (["--evaluations", "0"], "--evaluations"),
        (["--batch_size", "0"], "--batch_size"),
        (["--iterations", "0"], "--iterations"),
        (["--iterations", "3", "--fit", "step"], "--iterations is for --fit loop"),
        (["--fitted", "3", "--cache", "taylorseer"], "--fitted is for a --cache with a forecast whose weights"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        learn_mask.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family, settings", [("qwenimage", {}), ("flux2", {"layers": 31})])
def test_another_familys_masks_are_learnt_too(family, settings, tmp_path):
    options = ["--ckpt", str(make(tmp_path / family, family, **settings)), "--image_size", "64", "64", "--limit", "2"]
    options += ["--num_inference_steps", "5", "--computed", "3", "--learn_from", "1", "--evaluations", "4"]
    assert learn_mask.main([*options, "--fitted", "1", "--iterations", "1", "--save_path", str(tmp_path / "out")]) == 0
    assert CacheConfig.named(str(tmp_path / "out" / "fitted_3_of_5.json")).steps_computation_mask[0] == 1
