"""Turns the Sphinx roles and literal blocks of our docstrings into Markdown.

Docstrings refer to each other as ``:class:`~moekit.spec.Spec```, which editors and ``help()``
readers know. A reference becomes a link where its target has a page, and plain code elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod|obj):`([^`]+)`")
LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)


class SphinxMarkup(griffe.Extension):
    """Rewrites each docstring before it is parsed into sections."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj`` in place."""
        if obj.docstring:
            text = ROLE.sub(lambda match: _link(match[1], obj), obj.docstring.value)
            obj.docstring.value = LITERAL_BLOCK.sub(":", text)


def _link(target: str, within: griffe.Object) -> str:
    path = target.lstrip("~")
    shown = path.rsplit(".", 1)[-1] if target.startswith("~") else path
    identifier = _resolve(path, within)
    return f'<autoref identifier="{identifier}" optional><code>{shown}</code></autoref>'


def _resolve(path: str, within: griffe.Object) -> str:
    try:
        return within.resolve(path)
    except griffe.NameResolutionError:
        return path
