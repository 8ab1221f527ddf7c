"""Runs the example workflows of comfyui_fbcache in a ComfyUI, on a server that draws with the embedded checkpoint.

    .venv/bin/python tools/comfyui/run_workflows.py --comfyui path/to/ComfyUI --python path/to/ComfyUI/venv/bin/python

Each goes through ComfyUI's own executor, and its picture is compared with the one that the server gives without
ComfyUI. Then a drawing is cancelled by ComfyUI's own cancel. --screenshot has a workflow loaded and run by ComfyUI's
page, in Chromium; pip's comfyui-frontend-package has that page, for --front_end.
"""

import base64
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from FBCache_ms.eval.shared.arguments import Parser, exit_status

ROOT = Path(__file__).parents[2]
NODES = ROOT / "comfyui_fbcache"
WORKFLOWS = NODES / "example_workflows"
SHOWN = 56, 38, 1136, 478
"""The part of the page that has the nodes: left, top, right and bottom in pixels."""

START_SECONDS = 300
PAGE_SECONDS = 3
"""So long the page takes to show what it has been given."""
KINDS = ("INT", "FLOAT", "STRING", "BOOLEAN")
"""Inputs of a node that are typed in its box."""


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(__name__, "run_workflows", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's sources")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it (default: this one)")
    parser.add_argument("--front_end", type=Path, help="folder of ComfyUI's page (default: its own)")
    parser.add_argument("--screenshot", type=Path, help="file for a picture of that page")
    args = parser.parse_args(argv)
    if not (args.comfyui / "main.py").is_file():
        parser.error(f"--comfyui {args.comfyui} has no main.py")

    def work():
        with tempfile.TemporaryDirectory() as folder, serving() as server, comfyui(args, Path(folder)) as comfy:
            for file in sorted(WORKFLOWS.glob("*.json")):
                run(file, server, comfy)
            cancel(server, comfy)
            if args.screenshot:
                photograph(args.screenshot, server, comfy)

    return exit_status("run_workflows", work)


@contextmanager
def program(command, ready, **options):
    """A program, once an address of it answers. Raises RuntimeError where it ends before."""
    process = subprocess.Popen(list(map(str, command)), **options)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(ready).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[1]} does not answer at {ready}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def serving(port=18000):
    """A server's client."""
    address = f"http://127.0.0.1:{port}"
    with program([sys.executable, "-m", "FBCache_ms.serve", "--port", port], f"{address}/ready"):
        with httpx.Client(base_url=address, timeout=120) as server:
            yield server


@contextmanager
def comfyui(args, folder, port=18188):
    """ComfyUI's client; the nodes are among its own."""
    link = args.comfyui / "custom_nodes" / NODES.name
    link.unlink(missing_ok=True)
    link.symlink_to(NODES)
    command = [args.python, "main.py", "--cpu", "--port", port, "--output-directory", folder]
    command += ["--front-end-root", args.front_end.absolute()] if args.front_end else []
    address = f"http://127.0.0.1:{port}"
    try:
        with program(command, f"{address}/object_info", cwd=args.comfyui, stderr=subprocess.DEVNULL):
            with httpx.Client(base_url=address, timeout=120) as comfy:
                yield comfy
    finally:
        link.unlink()


def run(file, server, comfy):
    """Runs a workflow. Raises AssertionError where its picture is another than the server's."""
    prompt = prompt_of(json.loads(file.read_text()), server, comfy)
    pixels = pictures(finished(queued(prompt, comfy), comfy), comfy)
    drawn = next(node["inputs"] for node in prompt.values() if node["class_type"] == "FBCacheFluxTextToImage")
    fields = {"prompt": drawn["prompt"], "seed": drawn["seed"], "num_inference_steps": drawn["steps"]}
    if "model" in drawn:
        applied = prompt[drawn["model"][0]]["inputs"]
        fields["fbcache"] = {"threshold": applied["residual_diff_threshold"]}
    answer = server.post("/v1/images/generations", json=fields).raise_for_status().json()
    wanted = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in answer["data"]]
    np.testing.assert_array_equal(pixels, wanted)
    print(f"{file.name}: {len(pixels)} picture of {pixels[0].shape[1]} x {pixels[0].shape[0]}, equal to the server's")


def cancel(server, comfy):
    """Cancels a drawing of ten pictures behind the first. Raises AssertionError where ComfyUI or the server goes on."""

    def drawn():
        return float(re.search(r"^fbcache_pictures_total (\S+)", server.get("/metrics").text, re.MULTILINE)[1])

    prompt = prompt_of(json.loads((WORKFLOWS / "text_to_image.json").read_text()), server, comfy)
    (draw,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "FBCacheFluxTextToImage")
    draw.update(batch_size=10, steps=100, preset="none")
    before, number = drawn(), queued(prompt, comfy)
    until(lambda: drawn() > before)
    begin = time.monotonic()
    comfy.post("/interrupt").raise_for_status()
    found = finished(number, comfy)
    server.post("/v1/images/generations", json={"prompt": "a circle", "num_inference_steps": 1}).raise_for_status()
    seconds = time.monotonic() - begin
    assert found["status"]["messages"][-1][0] == "execution_interrupted", found["status"]
    assert drawn() - before < 10, "the server has drawn all ten"
    print(f"cancelled: ComfyUI had ended, and the server drawn something else, after {seconds:.2f} s")


def prompt_of(workflow, server, comfy):
    """What ComfyUI's executor takes, {id: class and inputs}, of what its page saves; it asks this server."""
    links = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs = {each["name"]: links[each["link"]] for each in node["inputs"] if each["link"] is not None}
        values = iter(node["widgets_values"])
        declared = comfy.get(f"/object_info/{node['type']}").raise_for_status().json()[node["type"]]["input"]
        for name, (kind, *how) in declared["required"].items():
            if kind in KINDS or isinstance(kind, list):
                inputs[name] = next(values)
                if how and how[0].get("control_after_generate"):
                    next(values)
        if "server" in inputs:
            inputs["server"] = str(server.base_url)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def queued(prompt, comfy):
    """The number under which ComfyUI has taken a prompt."""
    answer = comfy.post("/prompt", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt_id"]


def finished(number, comfy):
    """What ComfyUI tells of a prompt that is done."""
    found = {}

    def done():
        found.update(comfy.get(f"/history/{number}").json())
        return number in found

    until(done)
    return found[number]


def pictures(found, comfy):
    """The pixels that a prompt has saved."""
    assert found["status"]["status_str"] == "success", found["status"]
    files = [each for node in found["outputs"].values() for each in node["images"]]
    return [np.asarray(Image.open(io.BytesIO(comfy.get("/view", params=each).content))) for each in files]


def until(done, seconds=120):
    """Waits. Raises RuntimeError where it takes too long."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"not done within {seconds} s")
        time.sleep(0.05)


def photograph(file, server, comfy):
    """Has ComfyUI's page run Apply First Block Cache, and keeps what it looks like then."""
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys

    workflow = json.loads((WORKFLOWS / "apply_first_block_cache.json").read_text())
    for node in workflow["nodes"]:
        if "server" in comfy.get(f"/object_info/{node['type']}").json()[node["type"]]["input"].get("required", {}):
            node["widgets_values"][0] = str(server.base_url)
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(option)
    options.add_argument("--window-size=1500,900")
    with webdriver.Chrome(options=options) as browser:
        browser.get(str(comfy.base_url))
        until(lambda: browser.execute_script("return Boolean(window.app && window.app.graph)"))
        time.sleep(PAGE_SECONDS)
        # A first visitor is shown templates.
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()
        browser.execute_script("window.app.loadGraphData(arguments[0])", workflow)
        time.sleep(PAGE_SECONDS)
        browser.execute_script("window.app.canvas.ds.scale = 0.85; window.app.canvas.ds.offset = [90, 60]")
        before = len(comfy.get("/history").json())
        browser.execute_script("window.app.queuePrompt(0)")
        until(lambda: len(comfy.get("/history").json()) > before)
        time.sleep(PAGE_SECONDS)
        Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB").crop(SHOWN).save(file)


if __name__ == "__main__":
    sys.exit(main())
