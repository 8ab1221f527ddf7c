"""benchmarks/speed.py: which benchmarks it runs, and what it makes of what they wrote."""

import json

import pytest
import speed


def test_against_torch_is_run_where_there_is_a_peer(tmp_path):
    options = ["--save_path", str(tmp_path)]
    assert "against_torch" not in speed.parse_arguments(options).only
    args = speed.parse_arguments([*options, "--cache_dit", "python", "--only", "growth", "against_torch"])
    assert args.only == ["growth", "against_torch"]
    assert speed.command_of("against_torch", args)[-2:] == ["--cache_dit", "python"]
    assert "--cache_dit" not in speed.command_of("growth", args)
    only = [*options, "--only", "against_torch", "growth_against_torch"]
    assert speed.parse_arguments([*only, "--para_attention", "python"]).only == ["against_torch"]
    assert speed.parse_arguments([*only, "--cache_dit", "python"]).only == ["against_torch", "growth_against_torch"]


def test_tables_go_to_their_places(tmp_path):
    args = speed.parse_arguments(["--save_path", str(tmp_path), "--into", str(tmp_path)])
    assert speed.command_of("sweep_time", args)[-2:] == ["--into", str(tmp_path / "sweep_time.md")]


@pytest.mark.parametrize("options", [["--only", "against_torch"], ["--into", "no-such-file"], ["--only", "nothing"]])
def test_what_cannot_be_run_is_said_at_once(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        speed.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_all_tables_are_put_together(tmp_path, monkeypatch, capsys):
    def run(command):
        (tmp_path / "growth.md").write_text("| a |\n")
        (tmp_path / "growth.json").write_text('{"points": [1]}')
        return type("Done", (), {"returncode": 1})

    (tmp_path / "overhead.md").write_text("| b |\n")
    (tmp_path / "overhead.json").write_text("[]")
    monkeypatch.setattr(speed.subprocess, "run", run)
    assert speed.main(["--only", "growth", "--save_path", str(tmp_path)]) == 1
    assert (tmp_path / "speed.md").read_text() == "## The loop against its limit\n\n| b |\n\n## Growth\n\n| a |\n"
    assert json.loads((tmp_path / "speed.json").read_text()) == {"overhead": [], "growth": {"points": [1]}}
    assert "growth" in capsys.readouterr().err
