"""The page in a real browser; what draws is a fake."""

import pytest
from browser import missing, open_browser, show
from fakes import serving
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from FBCache_ms.serve.settings import digest

pytestmark = pytest.mark.skipif(bool(missing()), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp("profile"), **{"goog:loggingPrefs": {"browser": "ALL"}})
    yield browser
    browser.quit()


@pytest.fixture
def page(server, browser):
    """The page, open; what the browser complains of ends the test."""
    show(browser, 1200)
    browser.get_log("browser")
    browser.get(server.url)
    wait_for(browser, lambda: part(browser, "model").text == "draws with tiny_flux")
    yield browser
    assert browser.get_log("browser") == []


def part(browser, name):
    """An element by its id."""
    return browser.find_element(By.ID, name)


def wait_for(browser, holds):
    """Waits until something holds."""
    WebDriverWait(browser, 20, 0.05).until(lambda _: holds())


def ask(page, prompt, **values):
    """Fills the form in and presses the button."""
    for name, value in {"prompt": prompt, **values}.items():
        part(page, name).clear()
        part(page, name).send_keys(value)
    part(page, "draw").click()


def has_ended(page):
    """Whether nothing is being drawn, and a picture is there."""
    return part(page, "status").text.startswith("Done")


def test_what_is_served_can_be_chosen(page):
    options = [[each.text for each in Select(part(page, name)).options] for name in ("size", "preset")]
    assert options[0] == ["64x64", "96x64"] and options[1][0] == "balanced" and options[1][-1] == "none"
    Select(part(page, "preset")).select_by_value("teacache")
    assert "gate=teacache" in part(page, "tag").text
    assert part(page, "steps").get_attribute("value") == "28" and part(page, "steps").get_attribute("max") == "100"


def test_a_picture_is_drawn_and_compared(page, server):
    Select(part(page, "size")).select_by_value("96x64")
    ask(page, "a red circle", seed="18446744073709551615", steps="7")
    wait_for(page, lambda: has_ended(page))
    drawing = [message[2][0] for message in server.told if message[0] == "draw"][-1]
    assert (drawing.seed, drawing.width, drawing.steps, drawing.prompt) == (2**64 - 1, 96, 7, "a red circle")
    picture, uncached = part(page, "picture"), part(page, "uncached")
    assert picture.get_attribute("alt") == "a red circle" and uncached.is_displayed()
    assert page.execute_script("return arguments[0].naturalWidth", picture) == 96
    slider = part(page, "slider")
    slider.send_keys(Keys.HOME)
    assert slider.get_attribute("aria-valuetext") == "0 % with the cache"
    assert "100%" in page.execute_script("return arguments[0].style.clipPath", picture)
    slider.send_keys(Keys.END)
    assert "0%" in page.execute_script("return arguments[0].style.clipPath", picture)
    assert "18446744073709551615" in part(page, "facts").text
    part(page, "again").click()
    assert part(page, "seed").get_attribute("value") == "18446744073709551615"


def test_the_decisions_are_shown_as_bars_and_as_a_table(page):
    ask(page, "a red circle", steps="7")
    wait_for(page, lambda: has_ended(page))
    assert len(page.find_elements(By.CSS_SELECTOR, "#map rect.computed")) == 7
    assert part(page, "map").get_attribute("aria-label") == "0 of 7 steps reused; the threshold is 0.12"
    page.find_element(By.TAG_NAME, "summary").click()
    assert part(page, "rows").text.splitlines()[0] == "1 computed not compared"


def test_a_drawing_is_shown_while_it_is_drawn_and_cancelled(page, server):
    ask(page, "slow")
    wait_for(page, lambda: part(page, "picture").get_attribute("alt") == "Preview: slow")
    assert part(page, "cancel").is_enabled() and not part(page, "draw").is_enabled()
    part(page, "cancel").click()
    wait_for(page, lambda: part(page, "status").text == "Cancelled." and part(page, "draw").is_enabled())
    wait_for(page, lambda: server.told[-1][0] == "cancel")


def test_the_keyboard_alone_draws_and_cancels(page):
    keys = ActionChains(page).send_keys(Keys.TAB).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL)
    keys.send_keys("slow").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    wait_for(page, lambda: part(page, "cancel").is_enabled())
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    wait_for(page, lambda: part(page, "status").text == "Cancelled.")


def test_what_the_server_refuses_is_told(page):
    ask(page, "refuse")
    wait_for(page, lambda: part(page, "problem").text == "it has to be another")
    assert part(page, "problem").get_attribute("role") == "alert"


def test_a_prompt_is_text_and_nothing_else(page):
    prompt = '<img src=x onerror="window.ran = 1">\\"'
    ask(page, prompt)
    wait_for(page, lambda: has_ended(page))
    assert part(page, "picture").get_attribute("alt") == prompt
    assert page.execute_script("return window.ran") is None


def test_every_control_has_a_name(page):
    nameless = """return [...document.querySelectorAll("input, select, textarea, button, progress, svg")]
        .filter(each => !(each.labels?.length || each.textContent.trim() || each.ariaLabel || each.id === "map"))
        .map(each => each.id)"""
    assert page.execute_script(nameless) == []


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(page, width, scheme):
    show(page, width, scheme=scheme)
    ask(page, "a red circle " + "x" * 300)
    wait_for(page, lambda: has_ended(page))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_key_is_asked_for_where_one_is_needed(browser):
    with serving(keys=(digest("a key"),)) as server:
        browser.get(server.url)
        wait_for(browser, lambda: part(browser, "key").is_displayed())
        part(browser, "key").send_keys("a key" + Keys.TAB)
        wait_for(browser, lambda: part(browser, "model").text == "draws with tiny_flux")

        part(browser, "draw").click()
        wait_for(browser, lambda: has_ended(browser))
        browser.get_log("browser")
