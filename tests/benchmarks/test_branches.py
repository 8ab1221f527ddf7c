"""benchmarks/branches.py: what it times, and what it refuses."""

import branches
import pytest


def test_a_loop_with_a_branch_gives_what_one_without_gives_but_for_its_own_work():
    """Without a branch nothing is added in 100 turns, in the branch that is taken nothing changes."""
    times = branches.microseconds({weights: branches.loop_of(weights) for weights in (0, 2)}, 2)
    assert [len(values) for values in times.values()] == [2, 2] and min(map(min, times.values())) > 0
    assert branches.loop_of(0)().tolist() == branches.loop_of(2)().tolist()


@pytest.mark.parametrize("options", [["--weights", "0"], ["--runs", "0"], ["--into", "no-such-folder/branches.md"]])
def test_what_cannot_be_run_is_said_at_once(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        branches.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
