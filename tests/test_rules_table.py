import json

import pytest

from FBCache_ms.config import GATES, CacheConfig, fields
from FBCache_ms.eval import rules_table


def test_every_rule_has_its_row():
    configs = [rules_table.config_of(row, 28) for row in rules_table.ROWS]
    for name in ("gate", "forecast", "span", "schedule", "probe", "batch_reduction", "forecast_coordinate"):
        (option,) = (option for option in fields(CacheConfig) if option.name == name)
        assert set(option.metadata["allowed"]) <= {getattr(config, name) for config in configs}, name
    for name in ("max_consecutive_cache_hits", "max_accumulated_residual_diff", "end", "downsample_factor"):
        assert any(getattr(config, name) != getattr(CacheConfig(), name) for config in configs), name
    assert {config.gate for config in configs} == set(GATES)


def test_a_table_is_measured_and_put_where_it_belongs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rules -->\nold\n<!-- end of rules -->\nafter\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a big red circle in the center, blue background\n\nsomething else\n")
    options = ["--prompts", str(prompts), "--num_inference_steps", "4", "--save_path", str(tmp_path / "out")]
    assert rules_table.main([*options, "--cache", "F1B0_W0M1_R1", "--into", str(page), "rules"]) == 0
    table = capsys.readouterr().out
    assert page.read_text() == f"before\n<!-- rules -->\n{table}<!-- end of rules -->\nafter\n"
    assert (tmp_path / "out" / "rules.md").read_text() == table
    uncached, cached = json.loads((tmp_path / "out" / "rules.json").read_text())["rows"]
    assert (uncached["computed_steps"], uncached["skipped"], uncached["psnr"]) == (4, 0, 99.0)
    assert cached["computed_steps"] == 3 and 0 < cached["skipped"] < 0.25 and 10 < cached["psnr"] < 99
    assert cached["operations_ratio"] == pytest.approx(1 / (1 - cached["skipped"]))
    assert 0 <= cached["score"] <= 1


@pytest.mark.parametrize(
    "options, named",
    [
        (["--cache", "fastest"], "fastest"),
        (["--limit", "0"], "limit"),
        (["--prompts", "no/such/file"], "no/such/file"),
        (["--cache", "F12B0_W0_R0.1"], "12 blocks"),
        (["--into", "README.md", "nothing"], "nothing"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(options, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        rules_table.main([*options, "--save_path", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and named in lines[0]
