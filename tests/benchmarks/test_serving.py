"""The load and the faults of benchmarks/serving.py, short, on a server whose drawing process is a fake."""

import asyncio
import random
import sys
from pathlib import Path

import httpx
import serving

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
import fakes  # noqa: E402


def against_a_server(work, **changes):
    """Runs ``work(client, answers, rng)`` against a server; returns the Answers and what was told to who draws."""

    async def run(url):
        answers = serving.Answers()
        async with serving.client_of(url) as client:
            await serving.until_ready(client)
            await work(client, answers, random.Random(0))
        return answers

    with fakes.serving(**changes) as server:
        return asyncio.run(run(server.url)), server.told


def test_a_crowd_gets_every_picture_and_nothing_that_nobody_meant():
    answers, _ = against_a_server(lambda client, answers, rng: serving.crowd(client, answers, 12, 2, rng))
    assert answers.statuses[200] == 24 and set(answers.statuses) <= {200, 429} and answers.statuses[429] > 0
    assert (answers.unmeant, answers.wrong) == (0, 0)


def test_requests_behind_aborts_are_drawn_as_ever():
    async def work(client, answers, rng):
        assert await serving.aborts(client, 20, rng, longest=0.1, prompt="slow") == 20
        await serving.requests(client, answers, 20, rng)
        assert await serving.compilations(client) == 1

    # "slow" says nothing while it draws, for however long a busy machine takes to notice that its client has left.
    answers, told = against_a_server(work, painter_timeout=600)
    assert answers.statuses == {200: 20} and answers.wrong == 0
    assert {each[0] for each in told} == {"draw", "cancel"}


def test_other_bytes_and_other_statuses_are_counted():
    answers = serving.Answers()
    for status, picture in ((200, "one"), (200, "one"), (200, "other"), (500, "")):
        answers.take(
            {"seed": 0}, httpx.Response(status, json={"data": [{"b64_json": picture}], "error": {"code": "any"}})
        )
    assert (answers.repeated, answers.wrong, answers.unmeant) == (2, 1, 1)
