"""The house itself: ARCHITECTURE.md is true, imports point down, README and examples run, the door is complete."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from processes import script

import ntkit

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ntkit"


def modules() -> list[str]:
    """Every module, as a path under src/ntkit without .py; a package is its folder."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).with_suffix("").as_posix()
        found.append(name.removesuffix("/__init__") if name != "__init__" else "__init__")
    return found


def rows() -> list[str]:
    """Packages and root modules, from the table in ARCHITECTURE.md, top row first; those of one row are separate."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Packages")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]


def package_of(module: str) -> str:
    """The row that a module belongs to: the longest that it starts with."""
    return max((row for row in rows() if module == row or module.startswith(row + "/")), key=len)


def imports_of(path: Path) -> set[str]:
    """ntkit modules that a file imports, anywhere in it."""
    known, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ntkit"):
            base = node.module.removeprefix("ntkit").strip(".").replace(".", "/")
            inner = {f"{base}/{a.name}".strip("/") for a in node.names} & known
            found |= inner or ({base} if base else set())
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("ntkit.").replace(".", "/") for a in node.names if a.name.startswith("ntkit.")
            }
    return found


def source_of(module: str) -> Path:
    return p if (p := SOURCE / f"{module}.py").exists() else SOURCE / module / "__init__.py"


def test_architecture_names_every_package_and_only_those():
    packages = {p.parent.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("__init__.py")} - {"."}
    loose = {p.stem for p in SOURCE.glob("*.py")} - {"__init__"}
    assert sorted(rows()) == sorted(packages | loose)


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__"])
def test_imports_point_down(module):
    order = {row: i for i, row in enumerate(rows())}
    own = package_of(module)
    for other in imports_of(source_of(module)):
        assert package_of(other) == own or order[package_of(other)] > order[own], f"{module} imports {other}"


def test_few_modules_lie_in_the_root():
    assert len(list(SOURCE.glob("*.py"))) <= 6


def test_no_two_modules_and_no_two_public_classes_share_a_name():
    names = [m.split("/")[-1] for m in modules()]
    assert [n for n, times in Counter(names).items() if times > 1] == []
    classes = [
        node.name
        for m in modules()
        for node in ast.parse(source_of(m).read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [n for n, times in Counter(classes).items() if times > 1] == []


def test_files_and_functions_are_short():
    long = []
    for m in modules():
        text = source_of(m).read_text()
        if text.count("\n") > 420:
            long.append(f"{m}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
                if lines > 65:
                    long.append(f"{m}: {node.name} has {lines} lines")
    assert long == []


def test_imports_make_no_circle():
    graph = {m: imports_of(source_of(m)) for m in modules()}
    done, path = set(), []

    def visit(m):
        assert m not in path, f"circle: {' -> '.join([*path, m])}"
        if m in done or m not in graph:
            return
        path.append(m)
        for other in graph[m]:
            visit(other)
        path.pop()
        done.add(m)

    for m in graph:
        visit(m)


def test_every_public_name_opens():
    for name in ntkit.__all__:
        assert getattr(ntkit, name).__doc__, name
    assert callable(ntkit.spectrum)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ntkit.nothing


def test_import_and_help_do_not_wait_for_torch():
    code = (
        "import sys, ntkit, ntkit.cli\n"
        "try: ntkit.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'scipy', 'sklearn', 'plotly', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "analyze" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(path, tmp_path):
    done = script(path, cwd=tmp_path).done()
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "assert " in path.read_text()


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes a file
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    names: dict = {}  # a block may use what those before it made
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_links_and_tests_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("module", [m for m in modules() if m != "cli"])
def test_docstring_examples(module):
    name = "ntkit" if module == "__init__" else "ntkit." + module.replace("/", ".")
    loaded = importlib.import_module(name)
    failed, _ = doctest.testmod(loaded, extraglobs={"torch": importlib.import_module("torch")})
    assert failed == 0


def test_every_module_says_what_it_is():
    for info in pkgutil.walk_packages([str(SOURCE)], "ntkit."):
        assert importlib.import_module(info.name).__doc__, info.name


def test_no_file_names_a_path_of_some_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    bad = re.compile(r"/(work|root|home|tmp)/\w")
    for name in listed:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".json", ".html", ".css")
            and path.exists()
            and path != Path(__file__)
        ):
            assert not bad.search(path.read_text()), name


def test_the_citation_names_this_version() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = (ROOT / "CITATION.cff").read_text()
    for name in ("version", "license"):
        assert re.findall(rf"^{name}: (.*)$", cited, re.MULTILINE) == [told[name]]
    assert f"version {told['version']}." in (ROOT / "README.md").read_text()
