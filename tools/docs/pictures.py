"""Makes the pictures of pages in docs/ anew: report.png, cost_model.png and frontier.png, as the pages show them.

    .venv/bin/python tools/docs/pictures.py report
    .venv/bin/python tools/docs/pictures.py cost_model
    .venv/bin/python tools/docs/pictures.py frontier --html results/frontier/50_steps/frontier.html

The report is that of docs/results/sweep.md, which is drawn first and takes minutes; a killed one goes on where it was.
The frontier's page is one that benchmarks/frontier.py has written.
All need Debian's chromium and chromium-driver, and FBCache_ms[test].
"""

import sys
import tempfile
import time
from pathlib import Path

from browser import missing, open_browser, show
from selenium.webdriver.support.ui import WebDriverWait

from FBCache_ms.eval import cost_model, report, sweep
from FBCache_ms.eval.shared.arguments import Parser, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, say_written

DOCS = Path(__file__).parents[2] / "docs"
SWEEP = ("--cases", "fbcache", "teacache")
WIDTH, HEIGHT, FRONTIER_HEIGHT = 1280, 960, 440
PATIENCE, SECONDS = 60, 2
"""Seconds that a page may take until its plots are there, and that they have to settle in."""

DRAWN = (
    "const plots = [...document.querySelectorAll('.js-plotly-plot')];"
    "return plots.length > 0 && plots.every((plot) => plot.querySelector('.main-svg'))"
)


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "pictures", "report|cost_model|frontier [options]", description=__doc__)
    parser.add_argument("page", choices=PAGES, help="which page")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the frontier's, as benchmarks/frontier.py wrote it")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="how many prompts the sweep has")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="where the picture is written")
    add_save_path(parser.add_argument, "./results/docs", "the page and what it shows")
    args = parser.parse_args(argv)
    try:
        check_range("limit", args.limit, 1)
        if (args.page == "frontier") != (args.html is not None):
            raise ValueError("--html is the frontier's page, which no other page has and the frontier needs")
        if args.html is not None and not args.html.is_file():
            raise ValueError(f"--html {args.html} is no file; run benchmarks/frontier.py")
        if missing():
            raise ValueError(f"there is no {' and no '.join(missing())}: apt-get install chromium chromium-driver")
        check_folder(args.docs, "docs")
        check_folder(args.save_path)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def report_page(args):
    """Draws the sweep and makes its report; returns the page, and the height to show."""
    folder = args.save_path / "sweep"
    run(sweep, *SWEEP, "--limit", args.limit, "--save_path", folder)
    run(report, folder)
    return folder / "report.html", HEIGHT


def cost_model_page(args):
    """Makes the cost model's charts; returns the page, and the height to show, None for all of it."""
    folder = args.save_path / "cost_model"
    run(cost_model, "--save_path", folder)
    return folder / "cost_model.html", None


def frontier_page(args):
    """The page that was written, and the height to show."""
    return args.html, FRONTIER_HEIGHT


PAGES = {"report": report_page, "cost_model": cost_model_page, "frontier": frontier_page}


def run(program, *options):
    """Runs a program of FBCache_ms.eval; raises ValueError if it fails."""
    if program.main(list(map(str, options))) != 0:
        raise ValueError(f"{program.__name__} failed")


def picture_of(page, height=None):
    """A page as PNG, WIDTH wide; all of its height unless told."""
    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(profile)
        try:
            browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
            show(browser, WIDTH, height or HEIGHT)
            browser.get(page.resolve().as_uri())
            WebDriverWait(browser, PATIENCE).until(lambda browser: browser.execute_script(DRAWN))
            if height is None:
                show(browser, WIDTH, browser.execute_script("return document.documentElement.scrollHeight"))
            time.sleep(SECONDS)
            return browser.get_screenshot_as_png()
        finally:
            browser.quit()


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        picture = picture_of(*PAGES[args.page](args))
        (args.docs / f"{args.page}.png").write_bytes(picture)
        say_written(args.docs, f"{args.page}.png")

    return exit_status("pictures", work)


if __name__ == "__main__":
    sys.exit(main())
