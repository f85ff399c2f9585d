"""Figures as SVG elements inside a page, in the page's own colours and fonts."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from moekit.measure.report.style import THEMED

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_COLOUR = re.compile("|".join(THEMED), re.IGNORECASE)
_FONT = re.compile(r"'DejaVu Sans'")
_REFERENCE = re.compile(r"#([\w-]+)")


def inline_svg(figure: Figure, alternative: str, salt: str) -> Markup:
    """``figure`` as one ``<svg>`` element.

    Neutral colours become CSS variables, so that the figure follows the page's theme; text stays
    text. The tree is parsed and written again, so that no text in it can become markup.

    Args:
        alternative: read out in place of the figure.
        salt: told apart figures of one page; it goes into the ids of their parts.
    """
    root = ElementTree.fromstring(_draw(figure, salt))
    _drop_metadata(root)
    used = {name for e in root.iter() for v in e.attrib.values() for name in _REFERENCE.findall(v)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            element.set("style", _themed(style))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alternative)
    return Markup(_written(root))


def _draw(figure: Figure, salt: str) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}):
        figure.savefig(stream, format="svg", metadata=nothing, dpi=200)
    return stream.getvalue()


def _drop_metadata(root: ElementTree.Element) -> None:
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)


def _themed(style: str) -> str:
    style = _COLOUR.sub(lambda found: f"var(--{THEMED[found[0].lower()]})", style)
    return _FONT.sub("var(--sans)", style)


def _written(root: ElementTree.Element) -> str:
    """The element with the prefixes that HTML knows: none for SVG, ``xlink`` for links."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name in [name for name in element.attrib if name.startswith(f"{{{_XLINK}}}")]:
            element.set(name.replace(f"{{{_XLINK}}}", "xlink:"), element.attrib.pop(name))
    return ElementTree.tostring(root, encoding="unicode")
