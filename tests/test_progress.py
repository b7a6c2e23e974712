"""Progress: silent when short, plain lines without a terminal, one voice when nested."""

from __future__ import annotations

import io

import ntkit.base.progress as progress


def run(monkeypatch, seconds_per_step, steps=10, nested=False):
    clock = iter(i * seconds_per_step for i in range(1000))
    stream = io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.task("outer", steps) as work:
        for _ in range(steps):
            work.advance()
            if nested:
                with progress.task("inner", 1) as inner:
                    inner.advance()
    assert work.done == steps
    return stream.getvalue()


def test_short_work_says_nothing(monkeypatch):
    assert run(monkeypatch, 0.1) == ""


def test_long_work_says_how_far_and_how_long_in_plain_lines(monkeypatch):
    lines = run(monkeypatch, 15.0).splitlines()
    assert lines[0] == "outer: 20%, 2 min 00 s left"
    assert lines[-1] == "outer: 100%, 0 s left"


def test_only_the_outer_task_speaks(monkeypatch):
    assert "inner" not in run(monkeypatch, 15.0, nested=True)


def test_a_notebook_shows_a_bar_on_one_line(monkeypatch):
    written = []

    class OutStream:  # of a Jupyter kernel
        def isatty(self):
            return False

        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    OutStream.__module__ = "ipykernel.iostream"
    for name, value in (("_SILENT", 0.0), ("_BAR_EVERY", 0.0)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(progress.sys, "stderr", OutStream())
    with progress.task("counting", total=4) as work:
        for _ in range(4):
            work.advance()
    lines = "".join(written).split("\r")
    assert len(lines) == 5
    assert lines[2].startswith("counting " + "█" * 15 + "░" * 15)
    assert lines[4] == "counting " + "█" * 30 + " 0 s left \n"
