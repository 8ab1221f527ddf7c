"""What benchmarks/first_picture.py makes of its times, and the checkpoint of FLUX.1's blocks."""

import json

import first_picture
from safetensors.numpy import load_file

from FBCache_ms.runtime.checkpoint import TINY_FLUX, block_counts, check_checkpoint


def turn(cold, warm, compile=10, other=7):
    """The seconds of a turn."""
    parts = dict.fromkeys(first_picture.PARTS, 1.0)
    return {
        "cold": {**parts, "compile": compile, "rest": 1.0, "whole": cold},
        "warm": {**parts, "rest": 1.0, "whole": warm},
        "other": {**parts, "rest": 1.0, "whole": other},
    }


def test_a_warm_start_is_held_against_the_cold_one_of_its_turn():
    turns = [turn(20, 10), turn(40, 8), turn(30, 9)]
    cold, warm, other = first_picture.start_rows({"embedded": turns})
    assert (cold["Start"], cold["Whole (s)"], cold["Over Cold"]) == ("cold", "30.0 (20.0 to 40.0)", "1.00x")
    assert (warm["Start"], warm["Whole (s)"], warm["Over Cold"]) == ("warm", "9.0 (8.0 to 10.0)", "0.30x")
    assert (other["Start"], other["Over Cold"]) == ("other", "0.23x")
    assert cold["Cold (s)"] == warm["Cold (s)"] == cold["Whole (s)"]
    assert (cold["Compile"], warm["Compile"]) == ("10.0", "1.0")


def test_what_is_not_as_it_has_to_be_is_named():
    assert first_picture.failures({"embedded": [turn(20, 7)], "deep": [turn(30, 20)]}, True) == []
    found = first_picture.failures({"embedded": [turn(20, 8)], "deep": [turn(30, 20, compile=21)]}, False)
    assert [each.split()[-1] for each in found] == ["pictures", "one", "compile"]
    (found,) = first_picture.failures({"embedded": [turn(20, 7, other=8)]}, True)
    assert found.startswith("a start that is other")


def test_the_deep_checkpoint_repeats_the_embedded_ones_blocks(tmp_path):
    folder = first_picture.deep(tmp_path / "deep")
    check_checkpoint(folder)
    assert block_counts(folder) == (19, 38)
    tensors, source = load_file(folder / first_picture.WEIGHTS), load_file(TINY_FLUX / first_picture.WEIGHTS)
    layers = json.loads((TINY_FLUX / "transformer" / "config.json").read_text())
    name = "attn.to_q.weight"
    for stack, index, has in (
        ("transformer_blocks", 18, "num_layers"),
        ("single_transformer_blocks", 37, "num_single_layers"),
    ):
        same = source[f"{stack}.{index % layers[has]}.{name}"]
        assert (tensors[f"{stack}.{index}.{name}"] == same).all()
    assert len({key.split(".")[1] for key in tensors if key.startswith("transformer_blocks")}) == 19
