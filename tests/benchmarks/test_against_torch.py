"""What benchmarks/against_torch.py makes of the answers it gets; the peers themselves are not here."""

import json
import os
import sys
from contextlib import ExitStack

import against_torch
import numpy as np
import pytest
from against_torch import PEERS, WARM_UPS, System, Worker, agrees, judge, parse_arguments, rows_of, systems_of
from PIL import Image

PROTOCOL = """
import sys
sys.path.insert(0, {folder!r})
from PIL import Image
from protocol import serve, take_standard_output

def draw(latents, **arguments):
    print("what a library says")
    if arguments["num_inference_steps"] != 2:
        raise RuntimeError("No working C++ compiler found")
    picture = Image.new("RGB", (8, 8), tuple(int(value) % 256 for value in latents))
    return picture, 0.5, [False, {reused}]

serve(take_standard_output(), {name!r}, dict(numpy="1"), draw)
"""


@pytest.fixture
def start(tmp_path):
    """Starts workers that draw one colour."""
    with ExitStack() as stack:

        def start(name, reused=True, **kind):
            program = PROTOCOL.format(folder=str(PEERS), name=name, reused=reused)
            worker = Worker(System((sys.executable, "-c", program), cached=True, **kind), tmp_path, name)
            stack.enter_context(worker.process)
            return worker

        yield start


def asked(tmp_path, colour=(0, 80, 160), steps=2):
    np.save(tmp_path / "latents.npy", np.array(colour, np.float32))
    return {"latents": str(tmp_path / "latents.npy"), "arguments": {"num_inference_steps": steps}}


def test_a_peer_that_does_the_same_agrees(start, tmp_path):
    workers = start("ours", ours=True), start("peer")
    for worker in workers:
        worker.warm_up(asked(tmp_path))
        worker.draw(asked(tmp_path))
    ours, peer = judge(workers)
    assert agrees(ours) and agrees(peer) and peer["psnr"] == float("inf")
    assert peer["reused"] == [False, True] and len(peer["denoise"]) == len(peer["pipeline"]) == 1
    assert Image.open(workers[1].picture).getpixel((0, 0)) == (0, 80, 160)


def test_other_decisions_and_other_pictures_do_not_agree(start, tmp_path):
    ours, decides, draws = start("ours", ours=True), start("decides", reused=False), start("draws")
    for worker in (ours, decides):
        worker.draw(asked(tmp_path))
    draws.draw(asked(tmp_path, colour=(0, 80, 164)))
    assert list(map(agrees, judge([ours, decides, draws]))) == [True, False, True]
    draws.draw(asked(tmp_path, colour=(0, 80, 200)))
    assert not agrees(judge([ours, draws])[1])


def test_what_cannot_be_compiled_here_is_in_the_table_with_its_reason(start, tmp_path):
    ours, peer = start("ours", ours=True), start("peer", may_lack=True)
    peer.warm_up(asked(tmp_path, steps=3))
    ours.draw(asked(tmp_path))
    records = judge([ours, peer])
    assert agrees(records[1])
    assert "No working C++ compiler" in rows_of(records)[1]["System"]


def test_any_other_failure_is_an_error(start, tmp_path):
    worker = start("peer")
    with pytest.raises(ValueError, match="peer: RuntimeError: No working"):
        worker.warm_up(asked(tmp_path, steps=3))
    with pytest.raises(ValueError, match="ended: .*ModuleNotFoundError"):
        Worker(System((sys.executable, "-c", "import no_such_module"), cached=False), tmp_path, 99)


@pytest.mark.parametrize("reused", [True, False])
def test_the_program_writes_the_table_and_its_status_says_whether_all_agree(tmp_path, monkeypatch, capsys, reused):
    programs = [
        PROTOCOL.format(folder=str(PEERS), name=name, reused=did) for name, did in (("peer", reused), ("ours", True))
    ]
    commands = [(sys.executable, "-c", program) for program in programs]
    systems = [System(commands[0], cached=True), System(commands[1], cached=True, ours=True)]
    monkeypatch.setattr(against_torch, "systems_of", lambda args: systems)
    monkeypatch.setattr(against_torch, "LATENTS", (3,))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, processors: None)
    monkeypatch.setattr(against_torch, "FEW_STEPS", 1)
    given = ["--para_attention", "python", "--runs", "2", "--steps", "2", "--save_path", str(tmp_path)]
    assert against_torch.main(given) == int(not reused)
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "against_torch.md").read_text()
    assert ("peer does not draw what FBCache_ms does" in printed.err) is not reused
    written = json.loads((tmp_path / "against_torch.json").read_text())
    assert written["settings"]["runs"] == 2 and written["settings"]["cores"] == len(os.sched_getaffinity(0))
    assert [len(system["pipeline"]) for system in written["systems"]] == [2, 2]
    assert [len(system["warm_up"]) for system in written["systems"]] == [WARM_UPS, WARM_UPS]


def record(name, denoise, **more):
    return {
        "name": name,
        "ours": False,
        "cached": True,
        "denoise": denoise,
        "pipeline": [2 * seconds for seconds in denoise],
        "reused": [False, True, True],
        "same_decisions": True,
        "psnr": 61.24,
        **more,
    }


def test_ratios_are_those_of_the_medians():
    ours, peer = rows_of([record("ours", [1.0, 1.5, 5.0], ours=True), record("peer", [2.0, 3.0, 3.5])])
    assert list(peer.values()) == [
        "peer",
        1,
        "3.000 (2.000 to 3.500)",
        "0.50 (1.500 / 3.000)",
        "6.000 (4.000 to 7.000)",
        "0.50 (3.000 / 6.000)",
        "the same",
        "61.2",
    ]
    assert list(ours.values())[3::2] == ["-", "-", "-"]


def test_every_peer_is_timed_uncached_and_cached_eager_and_compiled(tmp_path):
    given = ["--para_attention", "a/python", "--threshold", "0.2", "--save_path", str(tmp_path)]
    systems = systems_of(parse_arguments(given))
    assert [(system.ours, system.cached, system.may_lack) for system in systems] == [
        (False, False, False),
        (False, False, True),
        (False, True, False),
        (False, True, True),
        (True, False, False),
        (True, True, False),
    ]
    assert systems[-1].command[-1] == "F1B0_W0M0MC0_T0O0_R0.2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --para_attention, --cache_dit or both"),
        (["--cache_dit", "python", "--threshold", "1"], "--threshold must be between 0 and 1, not 1.0"),
        (["--cache_dit", "python", "--steps", "4"], "--steps must be in [5, 1000], not 4"),
        (["--cache_dit", "python", "--runs", "0"], "--runs must be 1 or more, not 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(given)
    assert message in capsys.readouterr().err
