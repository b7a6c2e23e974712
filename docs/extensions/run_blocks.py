"""Run the code blocks of one page: JSON list of sources in, JSON list of printed text and SVG figures out."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import matplotlib.pyplot as plt

STYLE = {
    "figure.figsize": (7, 3.2),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ntkit",
}


def run(source: str, names: dict, number: int) -> dict:
    """Execute one block and collect what it printed and drew."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(compile(source, f"block {number}", "exec"), names)
    figures = []
    for figure in map(plt.figure, plt.get_fignums()):
        image = io.StringIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
        svg = image.getvalue()
        figures.append(svg[svg.index("<svg") :])
    plt.close("all")
    return {"text": text.getvalue(), "figures": figures}


if __name__ == "__main__":
    plt.rcParams.update(STYLE)
    namespace: dict = {"__name__": "__main__"}
    results = [run(source, namespace, number) for number, source in enumerate(json.load(sys.stdin), 1)]
    json.dump(results, sys.stdout)
