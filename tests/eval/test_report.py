import base64
import io
import json
import math
import re
import shutil
import sys
import time
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from browser import missing, open_browser, show
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from FBCache_ms.eval import cost_model, report

PROMPTS = ["a big red circle", '</script><script>window.ran = 1</script> "it\'s" <b>猫</b> & é {{data}}']
LONG_TAG = "F0B0_W0_R0.12,gate=static,steps_computation_mask=1111111001001001001001001001"
# case, name, tag, steps, threshold, share of reuses, PSNR, speed-up; the faster the later, by text and by number.
CELLS = [
    ("Baseline", "uncached", "F0B0_W0_R0.12,gate=none", 28, None, 0, None, 1.0),
    ("FBCache", "FBCache 0.01", "F1B0_W0_R0.01", 28, 0.01, 0, None, 0.5),
    ("FBCache", "FBCache 0.12", "F1B0_W0_R0.12", 28, 0.12, 0.4, 56.5, 1.5),
    ("FBCache", "FBCache <0.24>", "F1B0_W0_R0.24", 28, 0.24, 0.6, 9.25, 10.2),
    ("masks", "a mask of one's own", LONG_TAG, 28, None, 0.5, 50.0, 1.4),
    ("fewer steps", "9 steps", "F0B0_W0_R0.12,gate=none", 9, None, 0, 45.0, 3.1),
]


def make_cell(folder, row, side):
    case, name, cache, steps, threshold, share, psnr, speedup = row
    place = f"pictures/{cache}_steps{steps}"
    (folder / place).mkdir(parents=True)
    pictures = []
    for index in range(len(PROMPTS)):
        # Pictures without a PSNR equal the uncached ones.
        rng = np.random.default_rng((index, 0 if psnr is None else CELLS.index(row)))
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / place / f"{index:05d}.png")
        reused = [step % 10 >= 10 * (1 - share) and (step + index) % 2 == 0 for step in range(steps)]
        diffs = [None if threshold is None or step == 0 else 0.5 / (step + index) for step in range(steps)]
        scores = {"psnr": psnr, "ssim": 0.99, "prompt_score": None if index else 0.5, "clip_score": None}
        pictures.append({"index": index, "seconds": 0.5, **scores, "reused": reused, "residual_diffs": diffs})
    return {
        "case": case,
        "name": name,
        "cache": cache,
        "config": f"{cache},in=full",
        "steps": steps,
        "threshold": threshold,
        "difference_limit": threshold,
        "folder": place,
        "seconds": 1 / speedup,
        "uncached_seconds": 1.0,
        "speedup": speedup,
        "computed_steps": steps * (1 - share),
        "skipped": share,
        "tflops": 0.02 * (1 - share),
        "psnr": psnr,
        "ssim": 0.99,
        "prompt_score": 0.5,
        "clip_score": None,
        "pictures": pictures,
        "later": "unknown keys are ignored",
    }


def make_sweep(folder, side=16):
    cells = [make_cell(folder, row, side) for row in CELLS]
    settings = {"checkpoint": "tiny <flux>", "seed": 0, "image_size": [side, side], "steps": 28}
    settings.update(jit_level=None, lazy_inline=False, empty="")
    sweep = {"settings": settings, "prompts": list(PROMPTS), "cells": cells}
    (folder / "sweep.json").write_text(json.dumps(sweep), encoding="utf-8")
    return sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = make_sweep(folder)
    assert report.main([str(folder)]) == 0
    return folder, sweep


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if missing():
        pytest.skip("chromium and chromedriver are not installed")
    logs = {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
    browser = open_browser(tmp_path_factory.mktemp("chromium"), **logs)
    browser.get("about:blank")
    yield browser
    browser.quit()


def visit(browser, address):
    """Opens a report, and waits for its script's end: get() may answer for the page that it leaves."""
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 30).until(lambda page: page.execute_script("return document.readyState") == "complete")
    WebDriverWait(browser, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#decisions-plot .main-svg"))


@pytest.fixture
def page(browser, sweep):
    """The page, freshly opened on a wide screen; at the end it must have logged nothing and asked for nothing."""
    address = (sweep[0] / "report.html").as_uri()
    show(browser, 1280)
    visit(browser, address)
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [each["request"]["url"] for each in sent if each["documentURL"].split("#")[0] == address]
    assert address in urls and {url.split(":")[0] for url in urls} <= {"file", "data"}
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def all_of(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def points(page):
    return all_of(page, "#tradeoff-plot .scatterlayer .point")


def click(page, point):
    page.execute_script("document.getElementById('tradeoff').scrollIntoView()")
    time.sleep(0.4)  # Two clicks in short succession are a double click.
    ActionChains(page).move_to_element(point).click().perform()


def pixels(source):
    """The pixels of a data URI or of a file."""
    if isinstance(source, str):
        source = io.BytesIO(base64.b64decode(source.split(",")[1]))
    return np.asarray(Image.open(source).convert("RGB"))


def assert_chosen(page, folder, cells, number):
    cell = cells[number]
    assert page.find_element(By.CSS_SELECTOR, "#chosen h3").text == cell["name"]
    shown = [image.get_attribute("src") for image in all_of(page, "#chosen img")]
    places = [folder / each["folder"] / f"{index:05d}.png" for index in range(2) for each in (cells[0], cell)]
    assert len(shown) == len(places)
    for source, place in zip(shown, places):
        np.testing.assert_array_equal(pixels(source), pixels(place))


def test_a_point_is_a_configuration_and_shows_its_pictures(page, sweep):
    folder, cells = sweep[0], sweep[1]["cells"]
    assert len(points(page)) == len(cells)
    heights = [point.rect["y"] for point in points(page)]
    assert heights[0] == pytest.approx(heights[1], abs=8) and max(heights[:2]) < min(heights[2:])
    for number in (2, 3, 5, 0):
        click(page, points(page)[number])
        assert_chosen(page, folder, cells, number)
    click(page, points(page)[5])
    assert page.find_element(By.CSS_SELECTOR, "#chosen code").text == (
        "--cache F0B0_W0_R0.12,gate=none --num_inference_steps 9"
    )
    page.find_element(By.ID, "choice").send_keys(Keys.UP)
    assert_chosen(page, folder, cells, 4)
    assert page.find_element(By.CSS_SELECTOR, "#chosen code").text == f"--cache {LONG_TAG}"
    figures = dict(zip(*([each.text for each in all_of(page, f"#chosen {tag}")] for tag in ("dt", "dd"))))
    assert (figures["PSNR, dB"], figures["speed-up"], figures["operations skipped"]) == ("50.0", "1.40×", "50.0 %")


def test_the_pareto_front_holds_what_nothing_beats(page):
    front = page.execute_script("return document.getElementById('tradeoff-plot').data[0].x")
    assert front == [1.0, 1.5, 3.1, 10.2]


def test_columns_sort_both_ways_with_mouse_and_keyboard(page):
    def column(number):
        return [cell.text for cell in all_of(page, f"#cells-table td:nth-child({number})")]

    heads = [head.text for head in all_of(page, "#cells-table th")]
    assert "CLIP score" not in heads and {"prompt score", "TFLOPs", "threshold", "--cache"} <= set(heads)
    speedup, threshold, psnr = (heads.index(name) + 1 for name in ("speed-up", "threshold", "PSNR, dB"))
    names = column(1)

    page.find_element(By.CSS_SELECTOR, f"#cells-table th:nth-child({speedup}) button").click()
    ascending = ["0.50×", "1.00×", "1.40×", "1.50×", "3.10×", "10.20×"]
    assert column(speedup) == ascending
    assert column(1) == [names[number] for number in (1, 0, 4, 2, 5, 3)]
    button = page.find_element(By.CSS_SELECTOR, f"#cells-table th:nth-child({speedup}) button")
    button.send_keys(Keys.ENTER)
    assert column(speedup) == ascending[::-1]
    page.find_element(By.CSS_SELECTOR, f"#cells-table th:nth-child({psnr}) button").send_keys(Keys.SPACE)
    assert column(psnr) == ["9.3", "45.0", "50.0", "56.5", "∞", "∞"]
    sorts = [head.get_attribute("aria-sort") for head in all_of(page, "#cells-table th")]
    assert sorts == ["ascending" if number == psnr else None for number in range(1, len(heads) + 1)]
    for shown in (["0.01", "0.12", "0.24"], ["0.24", "0.12", "0.01"]):
        page.find_element(By.CSS_SELECTOR, f"#cells-table th:nth-child({threshold}) button").send_keys(Keys.ENTER)
        assert column(threshold) == [*shown, "", "", ""]

    page.find_element(By.LINK_TEXT, "FBCache 0.12").click()
    assert page.find_element(By.CSS_SELECTOR, "#chosen h3").text == "FBCache 0.12"
    assert [row.text.split(": ")[0] for row in all_of(page, "#prompts-table td:first-child")] == ["0", "1"]


def test_decisions_and_differences_are_those_of_the_sweep(page, sweep):
    cells = sweep[1]["cells"]

    def data(plot):
        return page.execute_script(f"return document.getElementById('{plot}-plot').data")

    def shares(indices):
        return [
            [
                (
                    np.mean([cell["pictures"][index]["reused"][step] for index in indices])
                    if step < cell["steps"]
                    else None
                )
                for step in range(28)
            ]
            for cell in cells
        ]

    assert data("decisions")[0]["z"] == shares([0, 1])
    Select(page.find_element(By.ID, "decisions-prompt")).select_by_value("1")
    assert data("decisions")[0]["z"] == shares([1])

    curve, threshold = data("differences")[2:4]
    assert curve["name"] == "FBCache 0.12" and threshold["y"] == [0.12, 0.12]
    assert curve["y"] == [
        value and pytest.approx(value, rel=1e-3) for value in cells[2]["pictures"][0]["residual_diffs"]
    ]
    page.find_element(By.CSS_SELECTOR, "#differences summary").click()
    boxes = all_of(page, "#differences-cells input")
    assert len(boxes) == 3 and all(box.is_selected() for box in boxes)
    boxes[0].click()
    Select(page.find_element(By.ID, "differences-prompt")).select_by_value("1")
    assert [curve["name"] for curve in data("differences")[::2]] == ["FBCache 0.12", "FBCache &lt;0.24>"]
    assert data("differences")[0]["y"][1] == 0.25


def test_texts_show_as_they_are_and_pictures_are_embedded_once(page, sweep):
    folder, cells = sweep[0], sweep[1]["cells"]
    assert [item.text for item in all_of(page, "#prompts li")] == PROMPTS
    assert page.execute_script("return window.ran") is None
    assert "tiny <flux>" in page.find_element(By.ID, "settings").text
    assert "FBCache <0.24>" in page.find_element(By.ID, "decisions-plot").text
    articles = all_of(page, "#grid article")
    assert len(articles) == len(cells) - 1
    for article, cell in zip(articles, cells[1:]):
        images = [image.get_attribute("src") for image in article.find_elements(By.TAG_NAME, "img")]
        np.testing.assert_array_equal(pixels(images[2]), pixels(folder / cells[0]["folder"] / "00001.png"))
        np.testing.assert_array_equal(pixels(images[3]), pixels(folder / cell["folder"] / "00001.png"))
    text = (folder / "report.html").read_text(encoding="utf-8")
    uris = re.findall(r'data:image/png;base64,[^"]+', text.partition('id="data"')[2].partition("</script>")[0])
    assert images[2] in uris and len(uris) == len(set(uris)) == 2 * (len(cells) - 1)


def test_the_header_says_nothing_that_is_nothing(page):
    terms, values = ([each.text for each in all_of(page, f"#settings {tag}")] for tag in ("dt", "dd"))
    assert dict(zip(terms, values)) == {
        "checkpoint": "tiny <flux>",
        "seed": "0",
        "image size": "16 × 16",
        "steps": "28",
        "lazy inline": "no",
    }


def enlarged(page):
    """The picture that is shown in full size, once it is there: its address and its size; None where none is."""
    if not page.find_element(By.ID, "enlarged").is_displayed():
        return None
    image = page.find_element(By.CSS_SELECTOR, "#enlarged img")
    WebDriverWait(page, 5).until(lambda page: image.get_property("complete") and image.get_property("width"))
    return image.get_attribute("src"), image.get_property("naturalWidth")


def test_a_picture_is_enlarged_by_mouse_and_by_keyboard_and_turns_over_to_the_other(page, sweep):
    folder, cells = sweep[0], sweep[1]["cells"]
    Select(page.find_element(By.ID, "choice")).select_by_value("2")
    buttons = all_of(page, "#chosen .enlarge")
    assert enlarged(page) is None and len(buttons) == 4
    buttons[1].click()
    files = [folder / cell["folder"] / "00000.png" for cell in (cells[0], cells[2])]
    np.testing.assert_array_equal(pixels(enlarged(page)[0]), pixels(files[1]))
    assert page.find_element(By.ID, "enlarged-title").text == f"FBCache 0.12 (56.5 dB): {PROMPTS[0]}"
    image = page.find_element(By.CSS_SELECTOR, "#enlarged img")
    assert image.rect["width"] % 16 == 0 and 256 <= image.rect["height"] <= 800
    for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT):
        ActionChains(page).send_keys(key).perform()
        shown = enlarged(page)[0]
        np.testing.assert_array_equal(pixels(shown), pixels(files[key == Keys.ARROW_RIGHT]))
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert enlarged(page) is None
    buttons[2].send_keys(Keys.ENTER)
    place = folder / cells[0]["folder"] / "00001.png"
    np.testing.assert_array_equal(pixels(enlarged(page)[0]), pixels(place))
    page.find_element(By.ID, "enlarged-close").click()
    assert enlarged(page) is None
    page.find_element(By.CSS_SELECTOR, "#grid .enlarge").click()
    assert enlarged(page)
    # On what is behind, in the window's corner.
    page.execute_cdp_cmd("Input.dispatchMouseEvent", {**CORNER, "type": "mousePressed"})
    page.execute_cdp_cmd("Input.dispatchMouseEvent", {**CORNER, "type": "mouseReleased"})
    assert enlarged(page) is None


CORNER = {"x": 3, "y": 3, "button": "left", "clickCount": 1}


def test_a_phone_shows_everything_within_its_width(page):
    for width in (360, 1280, 360):
        show(page, width)
        ratio = (
            "return [document.documentElement.scrollWidth, innerWidth, Math.max(0, ...[...document.querySelectorAll("
        )
        ratio += "'.plot, .plot svg, select, h1, h2, h3, p')].map((node) => node.getBoundingClientRect().right))]"
        content, window, furthest = page.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => setTimeout(() => done((() => {%s})()), 300))"
            % ratio
        )
        assert content <= window == width and furthest <= width
        heights = page.execute_script("return [...document.querySelectorAll('.plot')].map((node) => node.offsetHeight)")
        assert min(heights) > 200
    box = page.find_element(By.ID, "cells-table")
    assert page.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)


def luminance(colour):
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_dark_mode_changes_the_colours_and_every_text_stays_readable(page):
    backs = []
    for scheme in ("light", "dark", "light"):
        show(page, 1280, scheme=scheme)
        back = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        plotted = "#%02x%02x%02x" % tuple(map(int, re.findall(r"\d+", back)))
        followed = (
            "return [...document.querySelectorAll('.plot')].every((node) => node.layout.plot_bgcolor === arguments[0])"
        )
        WebDriverWait(page, 5).until(lambda page: page.execute_script(followed, plotted))
        texts = page.execute_script(
            "return [...document.querySelectorAll('.plot text')].map((node) => getComputedStyle(node).fill)"
            ".concat([...document.querySelectorAll('p, h2, td, th, a, dt, figcaption')]"
            ".map((node) => getComputedStyle(node).color))"
        )
        assert len(all_of(page, ".plot text")) > 20
        for text in set(texts):
            low, high = sorted((luminance(back), luminance(text)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text)
        backs.append(luminance(back))
    assert backs[0] == backs[2] > 0.9 and backs[1] < 0.05


def test_large_pictures_are_reduced_and_only_those_asked_for_embedded(tmp_path, capsys):
    sweep = make_sweep(tmp_path, side=300)
    page = tmp_path / "new" / "page.html"
    assert report.main([str(tmp_path), "--save_path", str(page), "--pictures", "1"]) == 0
    assert capsys.readouterr().out == f"written to {page}\n"
    uris = re.findall(r'data:image/webp;base64,[^"]+', page.read_text(encoding="utf-8"))
    assert len(uris) == len(sweep["cells"]) - 1 and {pixels(uri).shape for uri in uris} == {(256, 256, 3)}


def test_a_large_picture_is_enlarged_from_its_file_and_a_page_that_was_moved_away_says_what_is_missing(
    tmp_path, browser
):
    folder = tmp_path / "a sweep, of 100 % ü"
    folder.mkdir()
    sweep = make_sweep(folder, side=300)
    page, moved = tmp_path / "pages" / "page.html", tmp_path / "page.html"
    assert report.main([str(folder), "--save_path", str(page)]) == 0
    shutil.copy(page, moved)
    place = folder / sweep["cells"][2]["folder"] / "00000.png"
    for file, size in ((page, 300), (moved, 256)):
        show(browser, 1280)
        visit(browser, file.as_uri())
        Select(browser.find_element(By.ID, "choice")).select_by_value("2")
        all_of(browser, "#chosen .enlarge")[1].click()
        WebDriverWait(browser, 5).until(lambda browser: enlarged(browser)[1] == size)
        note = browser.find_element(By.ID, "enlarged-note").text
        if size == 300:
            assert unquote(urlsplit(enlarged(browser)[0]).path) == str(place) and note == ""
        else:
            assert note.startswith("Reduced: ") and note.endswith("is not beside this page.")
    browser.get_log("browser")


@pytest.mark.parametrize("width", [1280, 800])
def test_the_cost_models_charts_fit_the_window(width, tmp_path, browser):
    assert cost_model.main(["--save_path", str(tmp_path)]) == 0
    show(browser, width)
    browser.get((tmp_path / "cost_model.html").as_uri())
    widest = (
        "return [document.documentElement.scrollWidth, "
        "document.querySelector('.main-svg').getBoundingClientRect().right]"
    )
    WebDriverWait(browser, 10).until(lambda browser: all_of(browser, ".main-svg .trace"))
    content, chart = browser.execute_script(widest)
    assert width * 0.9 < chart <= content <= width
    browser.get_log("browser")


def failure(capsys, *options):
    try:
        status = report.main(list(map(str, options)))
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "break_it, named",
    [
        (lambda sweep: sweep.pop("prompts"), "sweep.json has no prompts"),
        (lambda sweep: sweep["prompts"].append(3), "prompts must be"),
        (lambda sweep: sweep["cells"].clear(), "cells is empty"),
        (lambda sweep: sweep["cells"][1].pop("speedup"), "sweep.json: cells[1] has no speedup"),
        (lambda sweep: sweep["cells"][1].update(speedup="fast"), 'cells[1]: speedup cannot be "fast"'),
        (lambda sweep: sweep["cells"][1].update(speedup=math.nan), "sweep.json is not JSON: NaN"),
        (lambda sweep: sweep["cells"].insert(1, None), "cells[1] must be an object"),
        (lambda sweep: sweep["cells"][2]["pictures"].pop(), "cells[2]: pictures"),
        (lambda sweep: sweep["cells"][2]["pictures"][1].pop("reused"), "cells[2].pictures[1] has no reused"),
        (lambda sweep: sweep["cells"][2]["pictures"][1]["reused"].pop(), "reused must hold 28 values"),
        (lambda sweep: sweep["cells"][2].update(folder="nowhere"), "nowhere/00000.png cannot be read: No such file"),
    ],
)
def test_a_broken_sweep_is_named_in_one_line(break_it, named, tmp_path, capsys):
    sweep = make_sweep(tmp_path)
    break_it(sweep)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert named in failure(capsys, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_unreadable_files_and_bad_arguments_are_named_in_one_line(tmp_path, capsys, monkeypatch):
    assert "sweep.json" in failure(capsys, tmp_path)
    (tmp_path / "sweep.json").write_bytes(b'{"cells": [\xff')
    assert "sweep.json is not JSON" in failure(capsys, tmp_path)
    (tmp_path / "sweep.json").write_text("[" * 100_000)
    assert "sweep.json is not JSON" in failure(capsys, tmp_path)
    sweep = make_sweep(tmp_path)
    picture = tmp_path / sweep["cells"][3]["folder"] / "00001.png"
    whole = picture.read_bytes()
    for broken in (b"", b"no picture", whole[:100], whole[:60] + b"XXXX" + whole[64:]):
        picture.write_bytes(broken)
        assert f"picture {picture} cannot be read" in failure(capsys, tmp_path)
    picture.write_bytes(whole)
    assert "--pictures" in failure(capsys, tmp_path, "--pictures", "0")
    assert f"{tmp_path}: Is a directory" in failure(capsys, tmp_path, "--save_path", tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert failure(capsys, tmp_path) == "report: error: report needs plotly; install FBCache_ms[eval]"
