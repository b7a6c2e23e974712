"""The documentation: links and anchors resolve, code blocks run, every page and public name has its place."""

from __future__ import annotations

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import script

import ntkit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = ROOT / "site"
RUN_BLOCKS = DOCS / "extensions" / "run_blocks.py"
REPOSITORY = re.compile(r"^https://(?:github\.com|raw\.githubusercontent\.com)/ntkit/ntkit/(?:blob/)?main/")
PAGES = sorted(DOCS.rglob("*.md"))
NEEDS_EXTRA = {"hugging-face": "transformers", "kernel-on-disk": "distributed", "lightning": "lightning"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and Markdown's table of contents both write them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if REPOSITORY.match(path):
            file = ROOT / REPOSITORY.sub("", path)
        elif re.match(r"[a-z]+:", path):
            continue
        else:
            file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=name_of)
def test_links_and_anchors_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_or_anchor_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](none.md) [d](page.md#one) `[e](code.md)`\n")
    assert broken_links(page) == ["#two", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_are_valid_python(page):
    for source in re.findall(r"^```python(?: exec)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(source, name_of(page))


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda p: p.stem)
def test_how_to_pages_run(page, tmp_path):
    if (package := NEEDS_EXTRA.get(page.stem)) and not find_spec(package):
        pytest.skip(f"{package} is not installed")
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    assert source
    if package:  # torchvision, which both packages import, may be built for another torch
        source = f"from benchmarks.families import _missing\n_missing('torchvision')\n{source}"
    done = script(f"import sys\nsys.path.append({str(ROOT)!r})\n{source}", cwd=tmp_path).done()
    assert done.returncode == 0, done.stderr


WITH_RESULTS = [page for page in PAGES if "```python exec" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_RESULTS, ids=lambda page: page.stem)
def test_pages_with_printed_results_and_figures_run(page, tmp_path):
    """As the site runs them: all blocks of a page in one process, each with what it prints and draws."""
    sources = re.findall(r"^```python exec\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "blocks.json").write_text(json.dumps(sources))
    code = (
        f"import runpy, sys\nsys.stdin = open('blocks.json')\nrunpy.run_path({str(RUN_BLOCKS)!r}, run_name='__main__')"
    )
    done = script(code, cwd=tmp_path, env={"MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}).done()
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for source, result in zip(sources, results, strict=True):
        assert ("print(" in source) == bool(result["text"]), source
        assert source.count("plt.subplots(") == len(result["figures"]), source
    assert any(result["text"] for result in results)


def test_navigation_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    listed = set(re.findall(r"[\w/-]+\.md", text))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert listed <= pages
    assert {page for page in pages - listed if not re.match(r"decisions/\d{4}-", page)} == set()
    assert "<!-- records -->" in (DOCS / "decisions" / "index.md").read_text(), "the list of the numbered records"


def test_every_public_name_has_an_entry():
    entries = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: ntkit\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(entries) == sorted(ntkit.__all__)


def test_scripts_and_results_named_in_the_docs_exist():
    for page in [ROOT / "README.md", *PAGES]:
        if page.parent.name == "decisions":
            continue  # a record names files as they were
        text = page.read_text()
        for name in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.(?:py|json|md))`", text):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"
        for name in re.findall(r"python -m (benchmarks\.\w+)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), f"{name_of(page)}: {name}"


@pytest.mark.skipif(not SITE.exists(), reason="the site is not built; run make docs")
def test_the_built_site_asks_the_network_for_nothing():
    loads = re.compile(
        r"<(?:script|img|iframe|source|link(?=[^>]*stylesheet))[^>]*(?:src|href)=[\"']?(?:https?:)?//", re.I
    )
    for page in SITE.rglob("*.html"):
        assert not loads.search(page.read_text()), page
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet
