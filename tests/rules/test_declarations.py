"""A rule, a forecast or a schedule is told from another by its declaration alone, and no file asks for its name."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import FBCache_ms
from FBCache_ms.cache.gates import every_gate, gate_numbers, places, plan
from FBCache_ms.config import OPTIONS, PRESETS, CacheConfig
from FBCache_ms.rules.forecasts import FORECASTS
from FBCache_ms.rules.schedules import SCHEDULES
from FBCache_ms.rules.when import GATES, RULES

PACKAGE = Path(FBCache_ms.__file__).parent
NAMES = {*GATES, *FORECASTS, *SCHEDULES} - {"none"}


def names_compared(source):
    """The names of rules, forecasts and schedules that a source compares with something, looks up or matches."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = node.args if node.func.attr in ("get", "startswith", "endswith", "index", "count") else []
        else:
            continue
        constants = [each for part in parts for each in ast.walk(part) if isinstance(each, ast.Constant)]
        found += [each.value for each in constants if each.value in NAMES]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "if gate == 'teacache': pass",
        "x = config.gate in ('fbcache', 'other')",
        "y = {'dicache': 1}",
        "z = table['newton']",
        "table.get('fora')",
        "rule != 'cg_taylor'",
    ],
)
def test_a_compared_name_is_found(source):
    assert len(names_compared(source)) == 1


def test_no_file_but_a_declarations_own_compares_a_rules_name():
    files = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "rules"]
    found = {str(file.relative_to(PACKAGE)): names_compared(file.read_text(encoding="utf-8")) for file in files}
    # Presets are named by users.
    found["config.py"] = [name for name in found["config.py"] if name not in PRESETS]
    # The acceptance report's own field.
    found[str(Path("eval", "ascend_acceptance.py"))].remove("table")
    assert len(files) > 30 and {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_rules_own_options_are_fields_that_its_gates_alone_take(rule):
    for name, option in rule.options.items():
        assert OPTIONS[name].default == option.default and rule == GATES[rule.name].rules[0]
        for gate in GATES:
            fits = any(name in each.options for each in GATES[gate].every_rule)
            assert (gate in OPTIONS[name].used_with[1]) == fits
    assert {rule.threshold, *rule.numbers} <= set(OPTIONS) and rule.source and rule.text
    compared = {name for name, gate in GATES.items() if rule.threshold in [each.threshold for each in gate.every_rule]}
    assert set(OPTIONS[rule.threshold].used_with[1]) == compared


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gates_numbers_stand_where_its_rules_look_for_them(preset):
    config = CacheConfig.preset(preset)
    for gate in every_gate(plan(config)):
        numbers = gate_numbers(config, gate)
        taken = [0]
        for rule, own in zip(gate.rules, places(gate.rules)):
            taken += own
            if own:
                values = [value for name in rule.numbers for value in np.atleast_1d(getattr(config, name))]
                assert [numbers[place] for place in own] == values
        assert taken == list(range(len(numbers)))


def test_declarations_are_read_without_mindspore():
    command = "import sys, FBCache_ms.config, FBCache_ms.cache.gates; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
