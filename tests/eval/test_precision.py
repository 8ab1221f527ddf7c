import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from cases import BFLOAT16, walk
from cases import DISTANCES as GOLDEN_DISTANCES
from narrow import make_narrow
from replay import Streams as Replayed
from replay import replay

import mindspore as ms

from FBCache_ms import CacheConfig
from FBCache_ms.eval import precision
from FBCache_ms.eval.precision import (
    AS_BUILT,
    AS_PEERS,
    DISTANCES,
    FLOAT32,
    IN_PAIRS,
    IN_TURN,
    ORDERS,
    all_differences,
    bfloat16,
    compare_decisions,
    decisions,
    exact,
    forecast_rows,
)
from FBCache_ms.eval.shared.drawing import Painter
from FBCache_ms.rules.arithmetic import finite_differences, weighted_sum
from FBCache_ms.rules.forecasts import TAYLOR

GOLDEN = Path(__file__).parents[1] / "golden" / "bfloat16.npz"
LOW_HALVES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Of a float32: nothing to round, just above, just below a tie, a tie, just above it, just below the next."""


def random_walk(steps, size, change=0.1):
    rng = np.random.default_rng(0)
    return (rng.normal(size=size) + np.cumsum(rng.normal(size=(steps, size)) * change, 0)).astype(np.float32)


def test_rounding_is_mindspores_own():
    """At every bfloat16 there is and between them: both zeros, subnormals, ties, infinities, all that is no number."""
    bits = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array(LOW_HALVES, np.uint32)
    values = bits.ravel().view(np.float32)
    expected, rounded = ms.Tensor(values, ms.bfloat16).float().asnumpy(), bfloat16(values)
    np.testing.assert_array_equal(rounded, expected)
    numbers = ~np.isnan(expected)
    assert 0 < numbers.sum() < len(values)
    np.testing.assert_array_equal(np.signbit(rounded[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("index", range(len(BFLOAT16)))
def test_differences_and_forecasts_in_bfloat16_are_para_attentions_bit_for_bit(index):
    case, arrays = BFLOAT16[index], np.load(GOLDEN)
    assert json.loads(str(arrays["about"]))["cases"] == BFLOAT16, "run tools/golden again"
    tensors = bfloat16(walk(case)).reshape(5, -1)
    differences = AS_PEERS.relative_difference(tensors[:1], tensors[1:])
    np.testing.assert_array_equal(differences, arrays[f"differences_{index}"])
    kept = AS_PEERS.finite_differences(tensors[1:], case["apart"])
    forecasts = np.stack([AS_PEERS.forecast(kept, k) for k in GOLDEN_DISTANCES])
    theirs = arrays[f"forecasts_{index}"].astype(np.uint32) << 16
    np.testing.assert_array_equal(forecasts, theirs.view(np.float32).reshape(forecasts.shape))


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4])
def test_in_float32_differences_and_decisions_are_the_graphs(strict_graph_mode, threshold):
    streams = Replayed(3, 20, 0.1)
    stats = replay(CacheConfig(threshold), streams)[1]
    table = all_differences(streams.span(0, 1).reshape(20, -1), FLOAT32)
    (reused,) = decisions(table, np.array([threshold]))
    assert list(stats.reused) == reused.tolist() and 0 < reused.sum() < 19
    reference = 0
    for step in range(1, 20):
        assert stats.residual_diffs[step] == pytest.approx(table[reference, step], rel=1e-5)
        reference = reference if reused[step] else step


@pytest.mark.parametrize("arithmetic, dtype", [(FLOAT32, ms.float32), (AS_BUILT, ms.bfloat16)])
@pytest.mark.parametrize("apart", [1, 3])
def test_differences_and_forecasts_as_built_are_the_rules_own(arithmetic, dtype, apart):
    values, order = bfloat16(random_walk(4, 300)), 3
    derivatives, nodes = ms.Tensor(np.zeros((order + 1, 300)), ms.float32), (ms.Tensor(0.0),) * (order + 1)
    for index, value in enumerate(values):
        x = ms.Tensor(float(index * apart))
        filled = ms.Tensor(index, ms.int32)
        derivatives = finite_differences(ms.Tensor(value), derivatives, filled, TAYLOR.gaps(x, nodes))
        # What is kept in bfloat16 is read as such.
        derivatives, nodes = derivatives.astype(dtype).astype(ms.float32), (x, *nodes[:-1])
    kept = arithmetic.finite_differences(values, apart)
    np.testing.assert_allclose(np.stack(kept), derivatives.asnumpy(), rtol=1e-5, atol=1e-6)
    for k in DISTANCES:
        weights = TAYLOR.weights(nodes[0] + float(k), nodes, 0.5, 1.0)
        expected = weighted_sum(weights, derivatives).asnumpy()
        np.testing.assert_allclose(arithmetic.forecast(kept, k), expected, rtol=1e-4, atol=1e-5)


def test_decisions_flip_the_more_the_more_is_rounded():
    probes = [bfloat16(random_walk(16, 3000, change)) for change in (0.02, 0.05, 0.1)]
    true = [all_differences(each.astype(np.float64), FLOAT32) for each in probes]
    rows = [
        compare_decisions("", true, [all_differences(each, arithmetic) for each in probes])
        for arithmetic in (FLOAT32, AS_PEERS, IN_PAIRS, IN_TURN)
    ]
    built, peers, pairs, turn = (row["flips_within_1.0%"] for row in rows)
    assert built < 1e-4 < 0.05 < peers < pairs < turn
    assert rows[0]["decisions_flipped"] < 1e-4 < rows[1]["decisions_flipped"] < rows[3]["decisions_flipped"]
    # Three results are rounded, each by half a unit in the last of eight places at most.
    assert rows[1]["largest_error"] < 3.1 * 2**-8 and rows[3]["largest_error"] > 0.1


def test_a_flip_needs_a_threshold_between_the_two_differences():
    true, other = (np.array([[np.nan, value], [np.nan, np.nan]]) for value in (0.2, 0.2004))
    row = compare_decisions("", [true], [other])
    assert row["largest_error"] == pytest.approx(0.002)
    assert row["flips_within_0.4%"] == pytest.approx(0.25) and row["flips_within_1.0%"] == pytest.approx(0.1)
    between = ((precision.THRESHOLDS > 0.2) & (precision.THRESHOLDS <= 0.2004)).mean()
    assert between > 0 and row["decisions_flipped"] == row["runs_changed"] == pytest.approx(between)


def test_the_difference_is_taken_against_the_last_computed_step():
    differences = all_differences(np.array([[1.0], [1.1], [1.2], [1.3]]), FLOAT32)
    assert decisions(differences, np.array([0.05, 0.15, 0.25])).tolist() == [
        [False, False, False, False],
        [False, True, False, True],
        [False, True, True, False],
    ]


def test_order_0_loses_nothing_in_either_dtype_and_errors_grow_with_order_and_distance():
    residuals = [random_walk(16, 2000, 0.02)]
    rows = forecast_rows(residuals, [bfloat16(each) for each in residuals])
    errors = {(row["apart"], row["order"], row["distance"]): row for row in rows}
    for row in rows:
        if row["order"] == 0:
            assert row["as_built_against_float32"] == row["float32_differences_against_float32"]
        assert row["float32_against_float32"] == 0
    for k in DISTANCES:
        grown = [errors[1, order, k]["as_built_against_float32"] for order in ORDERS]
        assert grown == sorted(grown) and grown[-1] > 2 * grown[0]
    assert errors[1, 3, 1]["as_built_against_float32"] < errors[1, 3, 4]["as_built_against_float32"]


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    ckpt = str(make_narrow(folder / "flux"))
    arguments = ["--ckpt", ckpt, "--num_inference_steps", "14", "--limit", "1", "--save_path", str(folder)]
    return Painter(precision.parse_arguments(arguments))


@pytest.mark.slow
def test_under_true_guidance_the_prompts_own_streams_are_recorded(painter, monkeypatch):
    (prompt,) = painter.args.prompts
    plain = precision.record(painter, 0, prompt)
    monkeypatch.setattr(painter.args, "negative_prompt", "dark")
    monkeypatch.setattr(painter.args, "true_cfg_scale", 1.001)
    guided = precision.record(painter, 0, prompt)
    np.testing.assert_allclose(guided.probed[0], plain.probed[0], atol=1e-4)
    assert guided.final.shape == plain.final.shape


@pytest.mark.slow
def test_the_recorded_streams_are_those_that_the_cache_compares(painter):
    (prompt,) = painter.args.prompts
    probes, residuals = precision.record(painter, 0, prompt).changes(exact)
    assert probes.shape == residuals.shape == (14, 64 * 128)
    height, width = painter.image_size
    painter.pipe(
        prompt,
        height=height,
        width=width,
        num_inference_steps=14,
        generator=np.random.default_rng((0, 0)),
        output_type="latent",
        cache_config=CacheConfig(0.0001),
    )
    compared = painter.pipe.cache_stats.residual_diffs[1:]
    np.testing.assert_allclose(compared, np.diagonal(all_differences(probes, FLOAT32), 1), rtol=1e-3)


def test_the_program_puts_both_tables_where_it_is_told(painter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "session", lambda args: nullcontext((painter, (0, 1))))
    page = tmp_path / "page.md"
    arguments = ["--num_inference_steps", "14", "--limit", "1", "--save_path", str(tmp_path)]
    assert precision.main([*arguments, "--into", str(page)]) == 0
    text = page.read_text().split("\n\n", 2)[2]
    assert text == capsys.readouterr().out
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 5 + 2 + 2 * len(ORDERS) * len(DISTANCES)
    rows = json.loads((tmp_path / "decisions.json").read_text())["rows"]
    assert rows[1]["largest_error"] < 1e-5 < rows[2]["largest_error"] < 3.1 * 2**-8
    assert (tmp_path / "forecasts.csv").read_text().startswith("apart,order,distance,")


def test_too_few_steps_are_refused_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        precision.main(["--num_inference_steps", "13", "--save_path", str(tmp_path)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "--num_inference_steps must be 14 or more, not 13" in error and error.count("\n") == 1
