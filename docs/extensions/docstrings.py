"""Reads the docstrings of ntkit for the API pages: `name : text` describes a parameter, it does not name a type.

Types come from the signature. Without this extension of Griffe the text would be shown as a type.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"^((?:Parameters|Attributes)\n-+\n)(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\.\. math::[ \n]*(\S.*(?:\n {4,}\S.*)*)", re.MULTILINE)
ENTRY = re.compile(r"^([*\w][\w*, ]*?) : (.*)$", re.MULTILINE)


class TextAfterColon(Extension):
    """Moves the text behind each colon into the description, and marks formulas as the pages do."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = FORMULA.sub(lambda block: f"$$\n{block[1]}\n$$", obj.docstring.value)
            obj.docstring.value = SECTION.sub(lambda section: section[1] + ENTRY.sub(r"\1\n    \2", section[2]), text)
