"""What benchmarks/against_example.py makes of its times and decisions."""

import against_example
from against_example import EXAMPLE, LOOP, STEP


def figures(seconds, reused):
    """The record of a contender at one threshold."""
    return {
        "seconds": {"None": [1.0, 1.0, 1.0], "0.12": seconds},
        "first": {"None": 9.0, "0.12": 11.0},
        "reused": {"0.12": reused},
        "difference": {"None": 0.0, "0.12": 0.0},
        "graphs": 1,
    }


def test_the_example_is_held_against_the_whole_loop_of_its_turn():
    record = {
        EXAMPLE: figures([2.0, 4.0, 3.0], [False, True]),
        STEP: figures([1.0, 2.0, 1.0], [False, True]),
        LOOP: figures([1.0, 2.0, 1.0], [False, True]),
    }
    assert against_example.same_decisions(record)
    rows = [row for row in against_example.speed_rows(record, 2) if row["Threshold"] == "0.12"]
    assert [row["Over the Whole Loop"] for row in rows] == ["2.00x", "1.00x", "1.00x"]
    assert {row["Whole Loop (s)"] for row in rows} == {"1.000 (1.000 to 2.000)"}
    assert [row["Reused"] for row in rows] == ["1 of 2"] * 3 and rows[0]["A Step (ms)"] == "1500.0"
    assert [row["Their Compilation (s)"] for row in against_example.graph_rows(record)] == ["8.0", "10.0", "10.0"]
    record[EXAMPLE]["reused"] = {"0.12": [False, False]}
    assert not against_example.same_decisions(record)
