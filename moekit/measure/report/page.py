"""One report as one HTML file that opens offline."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moekit.errors import OutputError
from moekit.measure.report.blocks import Plot, Section
from moekit.measure.report.svg import inline_svg


@dataclass(frozen=True)
class Report:
    """A report: sections of text, tables and figures.

    Attributes:
        title: its name.
        sections: from top to bottom.
        lead: the answer in a sentence or two, under the title.
        footer: how the report came about: version, command, date.

    Example:
        >>> from moekit.measure.report import Report, Section, Text
        >>> report = Report("Two designs", [Section("Result", [Text("Neither is better.")])])
        >>> "Neither is better." in report.html()
        True
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""
    footer: str = ""

    def html(self) -> str:
        """The page. It loads nothing, and runs no script but its own, which sorts tables."""
        environment = _environment()
        sources = [environment.loader.get_source(environment, n)[0] for n in _INLINED]  # type: ignore[union-attr]
        style, script = (Markup(source) for source in sources)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return environment.get_template("page.html").render(
            report=self, style=style, script=script, digest=digest
        )

    def write(self, path: Path) -> Path:
        """Write the page to ``path``, whole or not at all; missing folders are made.

        Raises:
            OutputError: it cannot be written there.
        """
        text = self.html()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, text)
        except OSError as error:
            raise OutputError(
                f"the report cannot be written to {path} ({error.strerror}); "
                "give a folder that can be written to"
            ) from None
        return path


_INLINED = ("page.css", "page.js")


def _environment() -> Environment:
    numbers = itertools.count(1)

    def draw(plot: Plot) -> Markup:
        return inline_svg(plot.figure, plot.alternative or plot.caption, f"figure-{next(numbers)}")

    environment = Environment(
        loader=PackageLoader("moekit.measure.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["draw"] = draw
    return environment


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
