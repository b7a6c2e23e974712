"""The report in a real browser, where one is installed: drawn, wide and narrow, light and dark, on paper, saved."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import report_case
from page_case import Visit, data_of

from ntkit.report import render


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("full"), *report_case.full()))


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("minimal"), report_case.minimal()))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("hostile"), report_case.hostile()))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_draws(chromium: Any, full: Path, width: int, height: int, scheme: str) -> None:
    visit = Visit(chromium, full, width, scheme, height)
    visit.check()
    assert (visit.luminance() > 128) == (scheme == "light")
    paths = visit.page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('div.plot')].map(plot => "
        "[plot.id, plot.querySelectorAll('svg .scatterlayer path').length"
        " + 2 * plot.querySelectorAll('svg .heatmaplayer image').length]))"
    )
    assert set(paths) == set(data_of(full))
    assert min(paths.values()) >= 2
    too_wide = "svg => svg.clientWidth > svg.closest('figure').clientWidth"
    assert not visit.page.evaluate(f"[...document.querySelectorAll('svg.main-svg')].some({too_wide})")


@pytest.mark.browser
def test_toggle_repaints_page_and_figures(chromium: Any, full: Path) -> None:
    visit = Visit(chromium, full, 1280, "light")
    light, ink = visit.luminance(), visit.ink()
    visit.page.click("#theme")
    visit.page.wait_for_timeout(150)
    assert visit.luminance() < 64 < light
    assert visit.ink() != ink
    visit.page.reload()
    visit.page.wait_for_selector("html[data-drawn]")
    assert visit.luminance() < 64  # kept
    visit.page.click("#theme")
    visit.page.wait_for_timeout(150)
    assert visit.luminance() == light
    assert visit.ink() == ink
    assert visit.complaints == []


@pytest.mark.browser
def test_copy_print_and_policy(chromium: Any, full: Path) -> None:
    visit = Visit(chromium, full, 1280, "dark")
    visit.page.click("#copy")
    visit.page.wait_for_selector("#copy:text-is('Copied')", timeout=3000)
    ink = visit.ink()
    visit.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert visit.luminance() > 128
    assert visit.ink() != ink
    visit.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert visit.luminance() < 128
    assert visit.ink() == ink
    visit.check()
    blocked = visit.page.evaluate(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        " const image = new Image(); image.src = 'https://example.invalid/x.png'; document.body.append(image);"
        " setTimeout(() => done(''), 2000); })"
    )
    assert blocked == "img-src"


@pytest.mark.browser
def test_nothing_is_cut_on_paper(chromium: Any, full: Path) -> None:
    visit = Visit(chromium, full, 680, "light", 1000)  # the width between the margins of A4
    visit.page.emulate_media(media="print")
    visit.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    visit.page.wait_for_timeout(300)
    cut = """[...document.querySelectorAll("table, figure, .plot, .plot svg, .case, .card, pre")]
        .filter(e => !e.closest("details:not([open])"))
        .filter(e => e.getBoundingClientRect().right > document.querySelector("main").getBoundingClientRect().right + 1)
        .map(e => e.outerHTML.slice(0, 100))"""
    assert visit.page.evaluate(cut) == []
    gaps = """[...document.querySelectorAll(".plot")].filter(
        e => Math.abs(e.clientHeight - e.querySelector("svg").getBoundingClientRect().height) > 2).length"""
    assert visit.page.evaluate(gaps) == 0
    visit.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    visit.page.emulate_media(media="screen")


@pytest.mark.browser
def test_figures_and_tables_are_saved(chromium: Any, full: Path) -> None:
    visit, results = Visit(chromium, full, 1280, "dark"), report_case.full()[0]

    def saved(place: str, text: str) -> tuple[str, str]:
        with visit.page.expect_download() as waiting:
            visit.page.click(f"{place} >> text='{text}'")
        return waiting.value.suggested_filename, waiting.value.path().read_text(encoding="utf-8")

    name, drawn = saved("#figure-machines .save", "SVG")
    assert name == "test-error-of-the-machines.svg"
    assert drawn.startswith("<svg")
    assert "var(--" not in drawn
    soft = re.search(r"--soft: (#\w+)", resources.files("ntkit.report").joinpath("style.css").read_text())
    assert soft
    ink = ", ".join(str(int(soft[1][i : i + 2], 16)) for i in (1, 3, 5))
    assert f"rgb({ink})" in drawn  # the colors of the light page, for paper
    assert visit.luminance() < 128
    assert "±" in drawn
    assert "after kernel" in drawn
    name, text = saved("#figure-alignment .save", "CSV")
    rows = [line.split(",") for line in text.splitlines()]
    assert rows[0] == ["panel", "curve", "x", "y", "error above", "error below", "value"]
    curve = [row for row in rows if row[1] == "centered"]
    assert [int(row[2]) for row in curve] == results["along"]["steps"]  # the step, not its place on the axis
    assert [float(row[3]) for row in curve] == pytest.approx(results["along"]["alignment_centered"])
    name, text = saved("#figure-gram .save", "CSV")
    assert len(text.splitlines()) == 1 + 2 * 20**2
    table = visit.page.locator("table", has_text="The kernels on the training set")
    buttons = table.locator("xpath=ancestor::div[1]/following-sibling::p[1]")
    for kind, wanted in (("LaTeX", "after kernel & 0.604 & 0.781 & 5.4 & 159200 & 111 \\\\"),
                         ("CSV", "after kernel,0.604,0.781,5.4,159200,111")):  # fmt: skip
        with visit.page.expect_download() as waiting:
            buttons.get_by_text(kind).click()
        assert wanted in waiting.value.path().read_text(encoding="utf-8")
    table = visit.page.locator("table", has_text="Machines and their certificates")
    with visit.page.expect_download() as waiting:
        table.locator("xpath=ancestor::div[1]/following-sibling::p[1]").get_by_text("LaTeX").click()
    text = waiting.value.path().read_text(encoding="utf-8")
    assert "6.7 $\\pm$ 1.3 \\%" in text
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1
    assert len({line.count("&") for line in text.split("\n") if "&" in line}) == 1
    table = visit.page.locator("table", has_text="Different images").or_(
        visit.page.get_by_role("region", name="Numbers against the training loss").locator("table")
    )
    visit.page.get_by_text("The numbers against the training loss").click()
    with visit.page.expect_download() as waiting:
        table.first.locator("xpath=ancestor::div[1]/following-sibling::p[1]").get_by_text("CSV").click()
    text = waiting.value.path().read_text(encoding="utf-8")
    assert "0.612 ± 0.010; 0.20 ± 0.02" in text  # raw and centered, apart
    assert "shift (raw, centered)" in text
    name, text = saved("#figure-confusion .save", "CSV")
    assert "8 taken for 3: 9" in text
    name, drawn = saved("#figure-loss-errors .save", "SVG")
    assert "SVM on the tangent kernel" in drawn or "ridge regression on the tangent kernel" in drawn  # its legend
    assert not visit.complaints


@pytest.mark.browser
def test_hostile_and_minimal_pages(chromium: Any, hostile: Path, minimal: Path) -> None:
    for path in (hostile, minimal):
        visit = Visit(chromium, path, 390, "light", 844)
        visit.check()
        assert visit.page.evaluate("window.broken === undefined")


@pytest.mark.browser
def test_without_javascript(chromium: Any, full: Path) -> None:
    page = chromium.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844}).new_page()
    page.goto(full.as_uri())
    assert "JavaScript is off" in page.inner_text("noscript")
    assert "Training made a better kernel." in page.inner_text("main")
