"""The server as its clients see it; what draws is a fake."""

import base64
import io
import json
import logging
import shlex
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
from fakes import pixels_of, serving
from PIL import Image

from FBCache_ms.serve import settings as limits
from FBCache_ms.serve.settings import digest

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=20) as found:
        wait_for(lambda: found.get("/ready").status_code == 200)
        yield found


def wait_for(holds):
    """Waits until something holds."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("this does not come to be")


def picture(data):
    """The pixels of a picture in an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"] if isinstance(data, dict) else data))))


def draw(client, **fields):
    """The answer to a request."""
    return client.post(GENERATIONS, json={"prompt": "a big red circle", **fields})


def error_of(answer, status):
    """The error in an answer of this status."""
    assert answer.status_code == status
    (error,) = answer.json().values()
    assert list(error) == ["message", "type", "param", "code"] and "Traceback" not in error["message"]
    return error


def events(text):
    """[(name, data)] of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def metric(client, name):
    """A metric's value."""
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


def test_the_openai_client_gets_a_picture(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    found = client.images.generate(model="tiny_flux", prompt="a red circle", size="96x64", n=2, extra_body={"seed": 5})
    assert [each.seed for each in found.data] == [5, 6] and found.size == "96x64" and found.output_format == "png"
    drawn = [message[2][0] for message in server.told if message[0] == "draw"][-2:]
    for data, drawing in zip(found.data, drawn):
        assert np.array_equal(picture(data.b64_json), pixels_of(drawing))
    assert [model.id for model in client.models.list()] == ["tiny_flux"]
    assert client.models.retrieve("tiny_flux").owned_by == "FBCache_ms"


def test_the_openai_client_streams_previews_and_a_picture(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    stream = client.images.generate(prompt="a red circle", stream=True, partial_images=2)
    found = [(each.type.rpartition(".")[2], getattr(each, "partial_image_index", None)) for each in stream]
    assert found[-1] == ("completed", None) and found[:-1] in (
        [],
        [("partial_image", 0)],
        [("partial_image", 0), ("partial_image", 1)],
    )
    # This drawing may be over before anybody looks. A slow one is not.
    stream = client.images.generate(prompt="slow", stream=True, partial_images=2)
    preview = next(each for each in stream if each.type == "image_generation.partial_image")
    stream.close()
    assert preview.partial_image_index == 0 and picture(preview.b64_json).ndim == 3
    wait_for(lambda: server.told[-1][0] == "cancel")


def test_the_openai_client_is_told_errors_as_it_knows_them(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red circle", size="256x256")
    assert refused.value.param == "size" and refused.value.code == "invalid_request"
    with pytest.raises(openai.APIError):
        list(client.images.generate(prompt="refuse", stream=True))


def test_open_webui_s_body_is_taken(client):
    body = {"model": "tiny_flux", "prompt": "a cat", "n": 1, "size": "64x64", "response_format": "b64_json"}
    answer = client.post(f"{GENERATIONS}?api-version=2024-10-21", json=body, headers={"Authorization": "Bearer x"})
    assert answer.status_code == 200 and picture(answer.json()["data"][0]).shape == (64, 64, 3)


def test_the_docs_curl_line_is_taken(server, client):
    pages = (limits.__file__.rpartition("/FBCache_ms/")[0] + "/docs/serve.md",)
    with open(pages[0], encoding="utf-8") as page:
        (line,) = [
            line
            for line in page.read().replace("\\\n", " ").splitlines()
            if line.startswith("curl ") and GENERATIONS in line
        ]
    command = shlex.split(line.replace("http://127.0.0.1:8000", server.url).partition("|")[0])
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert picture(answer["data"][0]).shape == (64, 64, 3)


@pytest.mark.parametrize("kind, form", [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_is_of_the_format_that_is_asked_for(client, kind, form):
    data = draw(client, output_format=kind).json()["data"][0]
    assert Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).format == form


def test_a_random_seed_is_reported_and_draws_the_same_again(client):
    first = draw(client).json()["data"][0]
    again = draw(client, seed=first["seed"]).json()["data"][0]
    assert again == first and draw(client).json()["data"][0]["seed"] != first["seed"]


def test_the_answer_says_how_it_was_drawn(client):
    own = draw(client, cache="none", fbcache={"stats": True, "compare": True}, num_inference_steps=5).json()
    own = own["data"][0]["fbcache"]
    assert own["stats"]["computed_steps"] == [0, 1, 2, 3, 4] and own["cache"].startswith("F")
    assert picture(own["compare"]).shape == (64, 64, 3) and own["compare"]["psnr"] is None
    assert list(draw(client).json()["data"][0]["fbcache"]) == ["cache"]


def test_our_own_events_come_where_they_are_asked_for(client):
    plain = events(draw(client, stream=True).text)
    assert [name for name, _ in plain] == ["image_generation.completed"]
    own = events(draw(client, stream=True, fbcache={"progress": True, "compare": True}).text)
    assert {name for name, _ in own} == {"fbcache.step", "image_generation.completed"}
    assert all(name == data["type"] for name, data in own) and {data.get("uncached") for _, data in own} == {
        False,
        True,
        None,
    }


@pytest.mark.parametrize(
    "content, headers, status",
    [
        (b'{"prompt": "a"}', {}, 415),
        (b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b"x" * 8_000_000, {"Content-Type": "application/json"}, 413),
        (b"[" * 200_000, {"Content-Type": "application/json"}, 400),
        (b'{"guidance_scale": 1e400, "prompt": "a"}', {"Content-Type": "application/json"}, 400),
        (b'{"prompt": "\\ud800"}', {"Content-Type": "application/json; charset=utf-8"}, 400),
    ],
)
def test_a_bad_body_is_refused(client, content, headers, status):
    error_of(client.post(GENERATIONS, content=content, headers=headers), status)


def test_a_body_that_does_not_tell_its_length_is_cut_off(client):
    def chunks():
        for _ in range(64):
            yield b" " * 16384

    error_of(client.post(GENERATIONS, content=chunks(), headers={"Content-Type": "application/json"}), 413)


def test_a_body_that_does_not_come_is_given_up(server, client, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)
    address = server.url.rpartition("/")[2]
    with socket.create_connection(address.split(":")) as slow:
        slow.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n".encode())
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096).splitlines()[0]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nothing", 404),
        ("POST", "/nothing", 404),
        ("GET", "/v1/models/dall-e-2", 404),
        ("GET", "/v1/jobs/job-1", 404),
        ("DELETE", "/v1/jobs/job-1", 404),
        ("GET", "/v1/jobs/job-1/events", 404),
        ("GET", GENERATIONS, 405),
        ("PUT", "/v1/models", 405),
        ("POST", "/v1/images/edits", 501),
        ("POST", "/v1/images/variations", 501),
        ("GET", "/page/../../settings.py", 404),
    ],
)
def test_what_is_not_there_is_told(client, method, path, status):
    answer = client.request(method, path)
    error_of(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_an_address_tells_every_method_that_it_has(client):
    assert client.put("/v1/jobs/job-1").headers["Allow"] == "DELETE, GET"


def test_what_the_model_refuses_is_a_400_and_what_fails_a_500(client):
    assert error_of(draw(client, prompt="refuse"), 400)["type"] == "invalid_request_error"
    failed = error_of(draw(client, prompt="fail"), 500)
    assert (failed["type"], failed["message"]) == ("server_error", "it cannot be shown")


def begin(client, **fields):
    """The id of a job."""
    answer = client.post("/v1/jobs", json={"prompt": "a big red circle", **fields})
    assert answer.status_code == 202
    return answer.json()["id"]


def status(client, job):
    return client.get(f"/v1/jobs/{job}").json()["status"]


def test_a_job_is_drawn_and_found_again(client):
    job = begin(client, seed=3)
    wait_for(lambda: status(client, job) == "succeeded")
    assert client.get(f"/v1/jobs/{job}").json()["result"]["data"] == draw(client, seed=3).json()["data"]
    assert [name for name, _ in events(client.get(f"/v1/jobs/{job}/events").text)] == ["image_generation.completed"]
    assert client.delete(f"/v1/jobs/{job}").json()["status"] == "succeeded"


def test_a_job_is_cancelled_while_it_is_drawn_and_while_it_waits(client):
    slow, waiting = begin(client, prompt="slow"), begin(client, seed=1)
    wait_for(lambda: status(client, slow) == "running")
    assert client.get(f"/v1/jobs/{waiting}").json()["waiting_before"] == 0
    for job in (waiting, slow):
        assert client.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"
        assert client.get(f"/v1/jobs/{job}").json()["error"]["code"] == "cancelled"
    assert draw(client).status_code == 200


def test_a_job_that_is_followed_tells_each_step_until_it_ends(client):
    job = begin(client, prompt="slow", fbcache={"progress": True})
    names = []
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                names.append(line.split()[1])
                if len(names) == 3:
                    httpx.delete(f"{client.base_url}/v1/jobs/{job}")
    assert names[:3] == ["fbcache.step"] * 3 and names[-1] == "error"


def test_a_full_queue_says_when_to_come_back(client):
    jobs = [begin(client, prompt=f"slow {number}") for number in range(1)]
    wait_for(lambda: status(client, jobs[0]) == "running")
    jobs += [begin(client, prompt=f"slow {number}") for number in range(2)]
    answer = draw(client)
    assert error_of(answer, 429)["type"] == "rate_limit_error" and int(answer.headers["Retry-After"]) >= 1
    assert metric(client, "fbcache_requests_waiting") == 2
    for job in reversed(jobs):
        client.delete(f"/v1/jobs/{job}")
    assert draw(client).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_drawing(server, client, stream):
    cancels = len([each for each in server.told if each[0] == "cancel"])
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "slow", "stream": stream}
        httpx.post(f"{server.url}{GENERATIONS}", json=body, timeout=0.3)
    wait_for(lambda: len([each for each in server.told if each[0] == "cancel"]) == cancels + 1)
    assert draw(client, seed=0).json()["data"] == draw(client, seed=0).json()["data"]


def test_a_painter_that_dies_is_replaced_and_its_request_drawn(client):
    restarts = metric(client, "fbcache_painter_restarts_total")
    assert draw(client, prompt="die once").status_code == 200
    assert metric(client, "fbcache_painter_restarts_total") == restarts + 1


def test_a_request_that_kills_twice_is_refused(client):
    assert error_of(draw(client, prompt="die"), 500)["code"] == "painter_died"
    wait_for(lambda: client.get("/ready").status_code == 200)
    assert draw(client).status_code == 200


def test_a_painter_that_hangs_is_replaced():
    with serving(painter_timeout=0.2) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert error_of(draw(client, prompt="hang"), 500)["code"] == "painter_died"


def test_a_request_that_takes_too_long_is_given_up():
    with serving(timeout=0.2) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        error_of(draw(client, prompt="slow"), 504)
        assert [each[0] for each in server.told] == ["draw", "cancel"]


def test_keys_keep_others_out():
    with serving(keys=(digest("one"), digest("two"))) as server, httpx.Client(base_url=server.url) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.get("/live").status_code == client.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/jobs/1"):
            for key in (None, "three", "ön"):
                headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
                assert error_of(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        error_of(draw(client), 401)
        one, two = ({"Authorization": f"Bearer {key}", "Host": "pictures.example"} for key in ("one", "two"))
        job = client.post("/v1/jobs", json={"prompt": "a"}, headers=one).json()["id"]
        assert client.get(f"/v1/jobs/{job}", headers=one).status_code == 200
        error_of(client.get(f"/v1/jobs/{job}", headers=two), 404)


@pytest.mark.parametrize(
    "host, status",
    [
        ("evil.example", 403),
        ("10.0.0.1", 403),
        ("localhost:1", 200),
        ("[::1]:80", 200),
        ("127.0.0.1", 200),
        ("127.0.0.2:80", 200),
    ],
)
def test_a_foreign_host_name_is_refused_without_a_key(client, host, status):
    assert client.get("/live", headers={"Host": host}).status_code == status


def test_methods_that_clients_make_up_are_counted_together(client):
    for method in ("MAKE", "BELIEVE", "PUT"):
        assert client.request(method, "/live").status_code == 405
    text = client.get("/metrics").text
    assert "MAKE" not in text and "BELIEVE" not in text and 'method="other"' in text and 'method="PUT"' in text


def test_other_sites_are_not_let_in(client):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options(GENERATIONS, headers=asked).headers
    assert "access-control-allow-origin" not in client.get("/live", headers=asked).headers


def test_moderation_refuses_prompts_and_pictures():
    def check_prompt(text):
        return "not this prompt" if "bad" in text else None

    def check_picture(pixels):
        return "not this picture" if pixels.shape[1] == 96 else None

    moderation = SimpleNamespace(check_prompt=check_prompt, check_picture=check_picture)
    with serving(moderation=moderation, negative_prompts=True) as server, httpx.Client(base_url=server.url) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        for fields, param, message in (
            ({"prompt": "bad"}, "prompt", "not this prompt"),
            ({"negative_prompt": "bad", "true_cfg_scale": 2.0}, "negative_prompt", "not this prompt"),
            ({"size": "96x64"}, None, "not this picture"),
        ):
            error = error_of(draw(client, **fields), 400)
            assert (error["code"], error["param"], error["message"]) == ("moderation_blocked", param, message)
            assert len([each for each in server.told if each[0] == "draw"]) == ("size" in fields)
        assert draw(client).status_code == 200


def test_a_client_that_leaves_while_its_prompt_is_checked_gets_nothing_drawn():
    checking, left = threading.Event(), threading.Event()

    def check_prompt(text):
        if text == "slow":
            checking.set()
            left.wait(20)

    def check_picture(pixels):
        return None

    moderation = SimpleNamespace(check_prompt=check_prompt, check_picture=check_picture)
    with serving(moderation=moderation) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        body = json.dumps({"prompt": "slow", "stream": True}).encode()
        with socket.create_connection(server.url[7:].split(":")) as other:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            other.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert checking.wait(20)
        # An answer to another client comes after the server has seen that this one has left.
        assert client.get("/live").status_code == 200
        left.set()
        wait_for(lambda: f'path="{GENERATIONS}",status="499"' in client.get("/metrics").text)
        assert draw(client).status_code == 200
        assert [each[2][0].prompt for each in server.told if each[0] == "draw"] == ["a big red circle"]


def test_a_fault_of_ours_is_a_500_that_tells_nothing(caplog):
    def check_prompt(text):
        raise RuntimeError(text)

    moderation = SimpleNamespace(check_prompt=check_prompt)
    with serving(moderation=moderation, negative_prompts=True) as server, httpx.Client(base_url=server.url) as client:
        wait_for(lambda: client.get("/ready").status_code == 200)
        error = error_of(draw(client, prompt="a-secret-prompt"), 500)
    assert error["message"] == "the server has a fault" and "secret" not in caplog.text
    assert "RuntimeError in " in caplog.text


def test_no_prompt_and_no_key_is_in_a_log_or_a_metric(server, client, caplog):
    with caplog.at_level(logging.DEBUG):
        client.headers["Authorization"] = "Bearer a-secret-key"
        draw(client, prompt="a-secret-prompt")
        draw(client, prompt="fail a-secret-prompt")
        draw(client, prompt="a-secret-prompt", size="a-secret-prompt")
        text = client.get("/metrics").text
    ours = [each for each in caplog.records if each.name.startswith(("FBCache_ms", "uvicorn", "fastapi"))]
    assert ours and "secret" not in text + "".join(each.getMessage() for each in ours)


def test_models_tell_what_is_served(client):
    own = client.get("/v1/models").json()["data"][0]["fbcache"]
    assert own["sizes"] == ["64x64", "96x64"] and list(own["presets"])[:2] == ["balanced", "teacache"]
    assert "taylorseer" not in own["presets"] and own["limits"]["waiting"] == 2
    for preset in own["presets"]:
        assert draw(client, cache=preset).status_code == 200


def test_the_openapi_document_names_every_field(client):
    found = client.get("/openapi.json").json()
    body = found["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "cache", "fbcache"} <= set(body["properties"]) and body["additionalProperties"] is False
    assert {"/live", "/ready", "/metrics", "/v1/jobs/{job_id}/events"} <= set(found["paths"])


def test_every_answer_has_its_headers(client):
    for path in ("/", "/page.js", "/page.css", "/live", "/nothing"):
        headers = client.get(path).headers
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_a_starting_server_is_live_and_not_ready(monkeypatch):
    from fakes import FakeChild

    async def never(self, seconds=None):
        await self.dead.wait()

    monkeypatch.setattr(FakeChild, "receive", never)
    with serving() as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/live").status_code == 200
        for answer in (client.get("/ready"), draw(client)):
            assert error_of(answer, 503)["code"] == "starting" and answer.headers["Retry-After"]
