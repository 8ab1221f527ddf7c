"""What benchmarks/growth_against_torch.py asks for, and makes of the answers; the peers themselves are not here."""

import growth_against_torch
import pytest
from growth_against_torch import MODELS, TEXT, best_of, layers_of, parse_arguments, rows_of, systems_of


@pytest.mark.parametrize("width", MODELS)
def test_a_step_has_the_products_of_flux(width):
    model = MODELS[width]
    every = layers_of(width, model.doubles + model.singles)
    tokens = sum(rows * inputs * outputs for rows, inputs, outputs in every if rows > 1)
    # Either kind of block has 12 D^2 weights for each token.
    assert tokens == 12 * width**2 * (model.doubles + model.singles) * (model.side**2 + TEXT)
    modulation = sum(outputs for rows, _, outputs in every if rows == 1)
    assert modulation == (12 * model.doubles + 3 * model.singles) * width
    assert layers_of(width, 1) == every[: len(layers_of(width, 1))]


def test_the_threshold_reuses_about_a_third_of_the_steps_and_lies_far_from_scores():
    found = [(0.1, 0.0, [0.2, 0.3]), (0.2, 0.3, [0.15, 0.19]), (0.3, 0.36, [0.2, 0.4]), (0.4, 0.7, [0.1, 0.8])]
    assert (
        best_of([(threshold, share, growth_against_torch.np.array(scores)) for threshold, share, scores in found])
        == 0.3
    )


def test_every_peer_is_timed_compiled_too_and_ours_in_the_same_dtype(tmp_path):
    args = parse_arguments(["--cache_dit", "python", "--save_path", str(tmp_path)])
    systems = systems_of(args, tmp_path, "bfloat16", 0.3)
    assert [system.ours for system in systems] == [False] * 4 + [True] * 2
    assert [("--compile" in system.command) for system in systems[:4]] == [False, True] * 2
    assert all(system.command[system.command.index("--dtype") + 1] == "bfloat16" for system in systems)
    args = parse_arguments(["--cache_dit", "a", "--para_attention", "b", "--save_path", str(tmp_path)])
    assert len(systems_of(args, tmp_path, "float32", 0.3)) == 8


def record(name, denoise, reused, **more):
    about = {"name": name, "ours": False, "cached": any(reused), "width": 512, "dtype": "float32"}
    return {**about, "denoise": denoise, "reused": reused, **more}


def test_a_row_has_the_ratio_of_medians_and_what_it_takes_over_the_limit():
    plain, cached = [False] * 4, [False, True, False, True]
    records = [
        record("peer", [4.0, 5.0, 9.0], plain),
        record("cache", [3.0], [False, True, True, True]),
        {**record("compiled", None, plain), "lack": "no compiler"},
        record("ours", [2.0], plain, ours=True),
        record("ours, cached", [1.5], cached, ours=True),
    ]
    rows = rows_of(records, {"computed": [0.25, 0.5, 9], "reused": [0.125]})
    columns = "Computed Steps", "Ours / Theirs", "Over the Limit", "Decisions"
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (4, "0.40", "2.50", "the same"),
        (1, "0.50", "3.43", "other"),
        ("-", "-", "-", "-"),
        (4, "-", "1.00", "-"),
        (2, "-", "1.20", "-"),
    ]
    assert rows[2]["System"] == "compiled, not to be had here: no compiler"


@pytest.mark.parametrize(
    "options, named", [(["--cache_dit", "python", "--widths", "640"], "640"), (["--runs", "2"], "give --cache_dit")]
)
def test_what_cannot_be_run_is_said_at_once(options, named, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(options)
    assert named in capsys.readouterr().err
