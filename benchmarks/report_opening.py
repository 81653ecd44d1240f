"""How long a report takes to be made and to open, and how large it is.

    python benchmarks/report_opening.py runs/mine [more runs]

Opens the page in headless Chromium from disk, several times, each in a fresh browser context; it is open when every
figure is drawn.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from sphere_easyedit.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        made = []
        for _ in range(2):  # the first also loads the drawing library
            started = time.perf_counter()
            html = write_report(given.runs, folder, files=False).html
            made.append(time.perf_counter() - started)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = []
        for _ in range(given.repeats):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            started = time.perf_counter()
            page.goto(html.as_uri())
            page.wait_for_selector("body[data-ready]")
            opened.append(time.perf_counter() - started)
            page.context.close()
        browser.close()
        print(f"{len(given.runs)} runs, {html.stat().st_size / 1e6:.2f} MB; made in {made[0]:.1f} s, again in "
              f"{made[1]:.1f} s; open after {statistics.median(opened):.2f} s (median of {len(opened)}, "
              f"{min(opened):.2f} to {max(opened):.2f})")


if __name__ == "__main__":
    main()
