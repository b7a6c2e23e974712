"""A page this package wrote: its text, its data, and a visit to it in a browser."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

HOSTILE = """</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1">&'"""


def body_of(path: Path) -> str:
    """The page without plotly.js: what this package wrote around it."""
    text = path.read_text(encoding="utf-8")
    start = text.index("<script>", text.index("</main>"))
    return text[:start] + text[text.index("</script>", start) + len("</script>") :]


def words_of(path: Path) -> str:
    """What a reader sees, without the invisible characters that keep a number and its unit on one line."""
    text = re.sub(r"(?s)<(style|script)\b.*?</\1>", " ", body_of(path))
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).replace("\u2060", "")


def data_of(path: Path, name: str = "plots") -> dict[str, Any]:
    """A JSON document in the page, the figures' by default."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', body_of(path), re.DOTALL)
    assert found
    return json.loads(found[1])


class Visit:
    """A page opened in the browser, with everything it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str, height: int = 900) -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.path, self.page, self.complaints, self.asked = path, context.new_page(), [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]")
        self.page.wait_for_timeout(150)

    def check(self) -> None:
        """No complaint, nothing asked of a network, nothing wider than the window, no text run as code."""
        assert self.complaints == []
        assert [url for url in self.asked if not url.startswith("data:")] == [self.path.as_uri()]
        assert self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert self.page.evaluate("window.broken === undefined")

    def curves(self) -> list[int]:
        """Of each figure, how many curves it draws."""
        return self.page.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer path').length)"
        )

    def luminance(self) -> float:
        """Mean of the background's red, green and blue."""
        color = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(c) for c in re.findall(r"\d+", color)[:3]) / 3

    def ink(self) -> str:
        return self.page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
