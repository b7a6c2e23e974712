"""What a type checker tells a user: nothing on a correct script, every mistake on one with ten, and real types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ntkit

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
NAMES = [name for name in ntkit.__all__ if name not in ("data", "probes", "report", "testing")]


def reported(checker: str, script: Path, folder: Path) -> tuple[set[int], str]:
    """Lines of a script with an error, and everything the checker says."""
    if checker == "mypy":
        pytest.importorskip("mypy", reason="mypy is not installed")
        command = ["-m", "mypy", "--no-incremental", "--cache-dir", str(folder), "--python-executable", sys.executable]
    else:
        command = ["-m", "pyrefly", "check", "--search-path", str(SOURCE), "--python-interpreter-path", sys.executable]
        command += ["--output-format", "min-text"]
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"MYPYPATH": str(SOURCE)},
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode in (0, 1), text
    errors = (line for line in text.splitlines() if "error" in line.lower())
    return {int(n) for line in errors for n in re.findall(rf"{script.name}:(\d+):", line)}, text


@pytest.mark.parametrize("checker", ["pyrefly", "mypy"])
def test_every_mistake_is_reported_and_nothing_else(checker, tmp_path):
    script = HERE / "typed_mistakes.py"
    expected = {n for n, line in enumerate(script.read_text().splitlines(), 1) if "# mistake" in line}
    assert len(expected) == 10
    lines, text = reported(checker, script, tmp_path)
    assert lines == expected, text
    lines, text = reported(checker, HERE / "typed_script.py", tmp_path)
    assert lines == set(), text


def test_public_names_have_real_types(tmp_path):
    script = tmp_path / "reveal.py"
    script.write_text("import ntkit\n" + "".join(f"reveal_type(ntkit.{name})\n" for name in NAMES))
    _, text = reported("pyrefly", script, tmp_path)
    types = re.findall(r"revealed type: (.*)", text)
    assert len(types) == len(NAMES), text
    assert [t for t in types if re.match(r"(Any|Unknown)\b", t)] == []


def test_imports_for_type_checkers_agree_with_the_lazy_names():
    text = (SOURCE / "ntkit" / "__init__.py").read_text()
    imports = {name: module for module, name in re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.MULTILINE)}
    assert imports == ntkit._HOME
    assert (SOURCE / "ntkit" / "py.typed").exists()
