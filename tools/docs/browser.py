"""A headless Chromium for pages of one's own."""

import shutil

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Nothing answers there, so that no page reaches a network.
    "--proxy-server=127.0.0.1:9",
)


def missing():
    """Which of Debian's programs that this needs are not installed."""
    return [name for name in ("chromium", "chromedriver") if not shutil.which(name)]


def open_browser(profile, **capabilities):
    """A Selenium driver, to be quit at the end; its profile is an empty folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def show(browser, width, height=800, scheme="light"):
    """Gives a browser's window a size in pixels, and says whether its user likes it light or dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
