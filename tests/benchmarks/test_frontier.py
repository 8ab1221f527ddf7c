import json
import math
from argparse import Namespace

import frontier
import pytest
from frontier import add_leads, front, lead, leaders, line_of, operations_of_others
from narrow import make_narrow


def cell(case, psnr, speedup, name="", tflops=1.0):
    return {"case": case, "name": name or f"{case} {psnr}", "psnr": psnr, "speedup": speedup, "tflops": tflops}


PLAIN = [cell("FBCache", 60, 1), cell("FBCache", 40, 2), cell("FBCache", 50, 1.5), cell("FBCache", math.inf, 0.9)]


def test_the_line_is_in_rising_psnr_and_has_no_equal_pictures():
    assert line_of([*PLAIN, cell("other", 45, 3)]) == [(40, 2), (50, 1.5), (60, 1)]


@pytest.mark.parametrize("psnr, expected", [(40, 1.5), (45, 3 / 1.75), (60, 3), (39.9, None), (61, None)])
def test_a_lead_is_over_the_line_at_the_same_psnr(psnr, expected):
    assert lead(cell("other", psnr, 3), line_of(PLAIN)) == (expected and pytest.approx(expected))


def test_the_front_has_what_no_other_surpasses():
    cells = [cell("a", 30, 3), cell("b", 29, 3), cell("c", 40, 2), cell("d", 35, 1.9), cell("e", math.inf, 1)]
    assert [each["case"] for each in front(cells)] == ["a", "c", "e"]


@pytest.mark.parametrize("psnr, expected", [(30, 1.5 / 2), (40, 1.5 / 3), (35, 1.5 / 2.5), (29, None), (51, None)])
def test_operations_are_held_against_the_others_front_at_the_same_psnr(psnr, expected):
    others = [cell("a", 30, 1, tflops=2), cell("b", 40, 1, tflops=3), cell("c", 50, 1, tflops=4)]
    surpassed = [cell("d", 35, 1, tflops=3.5), cell("e", math.inf, 1, tflops=0.1)]
    found = operations_of_others(cell("own", psnr, 1, tflops=1.5), [*others, *surpassed])
    assert found == (expected and pytest.approx(expected))


def test_what_a_setting_needs_of_the_operations_leaves_its_own_family_out():
    cells = [cell("no cache", math.inf, 1, tflops=10), cell("own", 40, 1, tflops=2), cell("own", 35, 1, tflops=1.9)]
    cells[0]["case"] = frontier.BASELINE.case
    cells += [cell("other", psnr, 1, tflops=tflops) for psnr, tflops in ((30, 2), (50, 6))]
    cells += [cell(frontier.CONTROL, psnr, 1, tflops=tflops) for psnr, tflops in ((30, 4), (50, 12))]
    add_leads(cells)
    assert (cells[1]["operations"], cells[1]["of_others"], cells[1]["of_fewer_steps"]) == (0.2, 0.5, 0.25)
    assert cells[0]["of_others"] is None


def test_the_winner_leads_over_the_widest_range_without_a_gap():
    cells = [
        *PLAIN,
        *(cell("wide", psnr, 3.2) for psnr in (41, 44, 47)),
        *(cell("gap", psnr, speedup) for psnr, speedup in ((41, 3.2), (48, 1.6), (59, 3.2), (60, 3.2))),
        cell("fewer steps", 40, 9),
        cell("fewer steps", 60, 9),
    ]
    add_leads(cells)
    found = leaders(cells, 1.5)
    assert [(name, len(run)) for name, run in found.items()] == [("wide", 3), ("gap", 2)]


def test_another_rank_than_the_first_draws_and_is_done(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(frontier, "draw_and_finish", lambda run, *_: drawn.append(run.num_inference_steps))
    options = ["--families", "FBCache", "--num_inference_steps", "3", "4", "--save_path", str(tmp_path)]
    assert frontier.main(options) == 0
    assert drawn == [3, 4] and not (tmp_path / "frontier.json").exists()


@pytest.mark.parametrize("options", [["--limit", "0"], ["--cache", "list.json"]])
def test_what_cannot_be_is_one_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as exit:
        frontier.parse_arguments(options)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and options[0].strip("-")[:4] in error


@pytest.mark.release
def test_a_frontier_is_drawn_for_every_number_of_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "PLAIN_THRESHOLDS", (0.1, 1))
    monkeypatch.setattr(frontier, "SHARES", (0.5,))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nthree birds")
    mask = tmp_path / "mask.json"
    tag = "F0B0_W0_R0.12,gate=static,steps_computation_mask=101"
    mask.write_text(json.dumps({"config": tag, "search": {"prompts": ["a cat"]}}))
    options = ["--ckpt", str(make_narrow(tmp_path / "narrow")), "--image_size", "32", "32", "--prompts", str(prompts)]
    options += ["--num_inference_steps", "3", "4", "--families", "FBCache", "fewer steps", "--cache", str(mask)]
    assert frontier.main([*options, "--limit", "2", "--save_path", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert data["prompts"] == ["two dogs", "three birds"]
    assert [run["settings"]["steps"] for run in data["runs"]] == [3, 4]
    assert [any(each["cache"] == str(mask) for each in run["cells"]) for run in data["runs"]] == [True, False]
    assert "3 steps, 2 prompts" in text and "4 steps, 2 prompts" in text
    assert (tmp_path / "out" / "4_steps" / "sweep.json").is_file()


@pytest.mark.parametrize("families, names", [(None, ["FBCache", "first"]), (["FBCache"], ["FBCache", "first", "last"])])
def test_a_page_shows_chosen_families_whole_and_of_all_what_stands_out(families, names):
    cells = [{"case": name, "front": name == "first"} for name in ("FBCache", "first", "last")]
    assert [each["case"] for each in frontier.shown(cells, {}, Namespace(families=families))] == names
