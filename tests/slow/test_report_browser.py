"""The report in headless Chromium: it draws, it asks nothing of the network, its controls work, it can be read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.report_runs import ALL, runs  # noqa: F401 - a fixture

pytest.importorskip("vl_convert", reason="vl-convert-python (the extra `report`) is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine: apt-get install chromium", allow_module_level=True)

# Contrast of every visible text with what is behind it, by WCAG's formula; canvases are not looked into.
_CONTRASTS = """() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length < 4 ? [...found, 1] : found;
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(ink), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


class Visit:
    """A page that was opened, and what it did."""

    def __init__(self, page: Any, html: Path) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text)
                if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        started = time.perf_counter()
        page.goto(html.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        self.seconds = time.perf_counter() - started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def html(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sphere_easyedit.report import write_report

    return write_report(runs, tmp_path_factory.mktemp("report"), files=False).html


def visit(browser: Any, html: Path, **options: Any) -> Visit:
    return Visit(browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page(), html)


def test_it_draws_without_errors_or_requests(browser: Any, html: Path) -> None:
    seen = visit(browser, html)
    assert seen.problems == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in seen.requests)
    for name in ALL:
        marks = seen.page.locator(f"#{name} .plot svg path, #{name} .plot canvas").count()
        assert marks > 0, name
    # A canvas says nothing of what is drawn on it, its pixels do.
    colours = seen.page.evaluate("""() => { const canvas = document.querySelector("#heatmaps canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const found = new Set(); for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 3).join());
        return found.size; }""")
    assert colours > 20


def test_runs_can_be_hidden_and_layers_chosen(browser: Any, html: Path) -> None:
    page = visit(browser, html).page

    def lines() -> int:
        return int(page.locator("#curves [data-panel='1'] svg .mark-line path").count())

    def energies() -> str:
        return str(page.locator("#curves [data-panel='0'] svg .mark-line path").first.get_attribute("d"))

    assert lines() == 2
    page.locator("[data-run='MEMIT']").uncheck()
    page.wait_for_function("document.querySelectorAll(\"#curves [data-panel='1'] svg .mark-line path\").length === 1")
    mean = energies()
    page.locator("#curves [data-choice='layer']").select_option("2")
    page.wait_for_function("(was) => document.querySelector(\"#curves [data-panel='0'] svg .mark-line path\")"
                           ".getAttribute('d') !== was", arg=mean)


def test_a_logarithmic_scale_can_be_had(browser: Any, html: Path) -> None:
    page = visit(browser, html).page
    box = page.locator("#spectra [data-log]")
    before = page.locator("#spectra svg .mark-line path").first.get_attribute("d")
    box.check()
    page.wait_for_function("(was) => { const line = document.querySelector('#spectra svg .mark-line path');"
                           " return line && line.getAttribute('d') !== was }", arg=before)


def test_facts_can_be_searched_and_filtered(browser: Any, html: Path) -> None:
    seen = visit(browser, html)
    page, rows = seen.page, seen.page.locator("#cases tbody tr")
    assert rows.count() == 12
    page.locator("#case-search").fill("alert(1)")
    assert rows.count() == 1
    assert "<script>alert(1)</script>" in rows.first.inner_text()
    page.locator("#case-search").fill("")
    counts = []
    for state in ("lost since", "not learned", "held", "known before"):
        page.locator("#case-state").select_option(state)
        counts.append(rows.count())
        assert all(state in text for text in rows.all_inner_texts())
    assert sum(counts) == 12
    assert seen.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, html: Path, scheme: str) -> None:
    page = visit(browser, html, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    found = page.evaluate(_CONTRASTS)
    assert len(found) > 200
    assert [one for one in found if one[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_cut(browser: Any, html: Path, width: int) -> None:
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    Visit(page, html)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.evaluate("""() => [...document.querySelectorAll(".plot svg, .plot canvas")].filter((drawn) =>
        drawn.getBoundingClientRect().right > drawn.closest(".panel").getBoundingClientRect().right + 1).length""")
    assert wider == 0
    # Texts of an axis or at curves' ends lie inside their drawing.
    outside = page.evaluate("""() => [...document.querySelectorAll(".plot svg text")].filter((text) => {
        const own = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
        const seen = own.width && text.textContent.trim() && getComputedStyle(text).opacity !== "0";
        return seen && (own.left < frame.left - 1 || own.right > frame.right + 1 || own.top < frame.top - 1
          || own.bottom > frame.bottom + 1); })
        .map((text) => text.textContent)""")
    assert outside == []


def test_every_figure_has_an_alternative_and_controls_take_the_keyboard(browser: Any, html: Path) -> None:
    page = visit(browser, html).page
    assert page.evaluate("""() => [...document.querySelectorAll("[data-figure]")].every((section) =>
        section.querySelector("[role=img]").getAttribute("aria-label").length > 60)""")
    page.locator("body").press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.run || document.activeElement.dataset.choice || "
                                  "document.activeElement.id"))
    assert {"MEMIT", "MEMIT+SPHERE", "layer", "run", "case-search", "case-state"} <= reached


def test_it_prints_on_white(browser: Any, html: Path) -> None:
    page = visit(browser, html, color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"
