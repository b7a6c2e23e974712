"""What a type checker tells a user: nothing on a correct script, every mistake on one with ten, and real types."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ntkit

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
CORRECT, MISTAKES = HERE / "typed_script.py", HERE / "typed_mistakes.py"
NAMES = [name for name in ntkit.__all__ if name not in ("data", "probes", "report", "testing")]


@pytest.fixture(scope="module", params=["pyrefly", "mypy", "pyright"])
def output(request, tmp_path_factory) -> str:
    """What a type checker prints about both scripts, and about one that asks for the type of every public name."""
    checker, folder = request.param, tmp_path_factory.mktemp("types")
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")  # pyright needs Node.js: it is not among the development packages
    command = {
        "pyrefly": (
            f"check --search-path {SOURCE} --python-interpreter-path {sys.executable} --output-format min-text"
        ).split(),
        "mypy": ["--no-incremental", "--cache-dir", str(folder), "--python-executable", sys.executable],
        "pyright": ["--pythonpath", sys.executable],
    }[checker]
    names = folder / "names.py"
    names.write_text("import ntkit\n" + "".join(f"reveal_type(ntkit.{name})\n" for name in NAMES))
    done = subprocess.run(
        [sys.executable, "-m", checker, *command, str(CORRECT), str(MISTAKES), str(names)],
        capture_output=True, text=True, cwd=folder,
        env=os.environ | {"MYPYPATH": str(SOURCE), "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # errors reported: those of the ten mistakes
    return done.stdout + done.stderr


def errors(output: str, script: Path) -> set[int]:
    """Lines of a script with an error."""
    lines = (line for line in output.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE))
    return {int(n) for line in lines for n in re.findall(rf"{script.name}:(\d+):", line)}


def test_every_mistake_is_reported_and_nothing_else(output):
    expected = {n for n, line in enumerate(MISTAKES.read_text().splitlines(), 1) if "# mistake" in line}
    assert len(expected) == 10
    assert errors(output, MISTAKES) == expected, output
    assert errors(output, CORRECT) == set(), output


def test_public_names_have_real_types(output):
    types = re.findall(r'(?:revealed type: |Revealed type is "|Type of "ntkit\.\w+" is ")(.*)', output)
    assert len(types) == len(NAMES), output
    assert [t for t in types if re.match(r"(Any|Unknown)\b|types\.ModuleType|Module[(\[]", t)] == []


def test_imports_for_type_checkers_agree_with_the_lazy_names():
    text = (SOURCE / "ntkit" / "__init__.py").read_text()
    imports = {name: module for module, name in re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.MULTILINE)}
    assert imports == ntkit._HOME | ntkit._WITH_PACKAGES
    assert (SOURCE / "ntkit" / "py.typed").exists()
