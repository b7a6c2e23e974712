"""What the pages need beyond Markdown: code that runs, formulas as MathML, the API by public name, a list of records.

A Markdown extension, so that Zensical and MkDocs both load it. On every page it replaces, line by line:

- a block that opens with three backquotes and ``python exec``: the block, then what it printed and the figures it drew;
- a line ``::: ntkit.NAME``: the docstring of that public name, wherever its module lies;
- a block between two lines ``$$``: the LaTeX formula as MathML, which a browser draws without a script;
- a comment ``<!-- records -->``: links to the numbered records beside the page.

All blocks of one page run in one fresh process and share their names, as in a notebook. A block that fails stops the
build.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from types import ModuleType

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

import ntkit

DOCS = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^```python exec\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.MULTILINE | re.DOTALL)
PUBLIC_NAME = re.compile(r"^::: ntkit\.(\w+)$", re.MULTILINE)
RECORDS = "<!-- records -->"


class Page(Preprocessor):
    """Replaces the four kinds of blocks before Markdown reads the page."""

    def run(self, lines: list[str]) -> list[str]:
        """Return the lines of the page with every block replaced."""
        text = "\n".join(lines)
        if sources := CODE.findall(text):
            results = iter(run_blocks(sources))
            text = CODE.sub(lambda block: self.with_results(block[1], next(results)), text)
        text = FORMULA.sub(lambda block: self.html(formula(block[1])), text)
        text = PUBLIC_NAME.sub(lambda line: api_entry(line[1]), text)
        return text.replace(RECORDS, records()).split("\n")

    def html(self, html: str) -> str:
        """Keep finished HTML out of Markdown's sight."""
        return "\n" + self.md.htmlStash.store(html) + "\n"

    def with_results(self, source: str, result: dict) -> str:
        """Put the printed text and the figures of a block below it."""
        parts = [f"```python\n{source}```"]
        if result["text"].strip():
            parts.append(self.html(f'<pre class="printed"><code>{escape(result["text"].rstrip())}</code></pre>'))
        parts += [self.html(f'<figure class="drawn">{svg}</figure>') for svg in result["figures"]]
        return "\n".join(parts)


def run_blocks(sources: list[str]) -> list[dict]:
    """Run the blocks of a page in a process of their own; return printed text and figures of each."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MPLBACKEND": "agg", "MPLCONFIGDIR": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("run_blocks.py"))],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"a code block failed:\n{done.stderr}")
    return json.loads(done.stdout)


def formula(latex: str) -> str:
    """Convert LaTeX to MathML as a block."""
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def api_entry(name: str) -> str:
    """Write the instruction for mkdocstrings, under the name that users write."""
    value = getattr(ntkit, name)
    path = f"{defining_module(name, value)}.{name}"
    options = {"heading": f"ntkit.{name}", "toc_label": name, "heading_level": 2}
    lines = [f'<a id="{name}"></a>', "", f"::: {path}", "    options:"]
    return "\n".join([*lines, *(f"      {key}: {json.dumps(value)}" for key, value in options.items())])


def defining_module(name: str, value: object) -> str:
    """Find the module whose source defines a public name; a few classes name `ntkit` itself as their module."""
    module = getattr(value, "__module__", "ntkit")
    if module != "ntkit" or isinstance(value, ModuleType):
        return module
    definition = re.compile(rf"^class {name}\b", re.MULTILINE)
    for candidate, loaded in sorted(sys.modules.items()):
        same = candidate.startswith("ntkit.") and getattr(loaded, name, None) is value
        if same and definition.search(inspect.getsource(loaded)):
            return candidate
    raise LookupError(f"no module of ntkit defines {name}")


def records() -> str:
    """List every record in docs/decisions by its title."""
    lines = []
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text().split("\n", 1)[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines)


class Site(Extension):
    """Registers the page's preprocessor before fenced code is read."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, the name that Markdown calls
        """Add the preprocessor."""
        md.preprocessors.register(Page(md), "ntkit_site", 28)  # after normalization, before fenced code


def makeExtension(**options: object) -> Site:  # noqa: N802, the name that Markdown calls
    """Return the extension."""
    return Site(**options)
