"""benchmarks/branches.py: what it times, and what it refuses."""

import branches
import numpy as np
import pytest


def test_a_loop_takes_its_branch_in_the_turns_that_it_is_told_and_by_itself_in_none():
    times = branches.microseconds({weights: branches.loop_of(weights) for weights in (0, 2)}, 2)
    assert [len(values) for values in times.values()] == [2, 2] and min(map(min, times.values())) > 0
    start, turns = branches.loop_of(0)(), (3, 50)
    assert start.min() < 0 < start.max()
    np.testing.assert_array_equal(branches.loop_of(2)(), abs(start))
    # Each turn doubles twice, by two weights; without a branch it adds 1.
    np.testing.assert_array_equal(branches.loop_of(2, turns)(), 16 * abs(start))
    np.testing.assert_allclose(branches.loop_of(0, turns)(), start + 2, rtol=1e-6)


@pytest.mark.parametrize("options", [["--weights", "0"], ["--runs", "0"], ["--into", "no-such-folder/branches.md"]])
def test_what_cannot_be_run_is_said_at_once(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        branches.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
