"""What a report is made of. Plain data; every text in it is escaped when the page is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from matplotlib.figure import Figure

Cell = str | float | int | None


@dataclass(frozen=True)
class Text:
    """Paragraphs of prose."""

    template: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]

    def __init__(self, *paragraphs: str) -> None:
        object.__setattr__(self, "paragraphs", paragraphs)


@dataclass(frozen=True)
class Callout:
    """One statement that must not be missed: a verdict, a warning.

    Attributes:
        title: the statement.
        text: what it rests on.
        tone: ``good``, ``bad``, ``warning`` or ``neutral``; shown by a word and a colour.
    """

    template: ClassVar[str] = "callout"
    title: str
    text: str = ""
    tone: Literal["good", "bad", "warning", "neutral"] = "neutral"


@dataclass(frozen=True)
class Facts:
    """A few numbers side by side, each with a label."""

    template: ClassVar[str] = "facts"
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """A command or a config, to be copied."""

    template: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its name.
        unit: shown smaller below it.
        form: a format specification for numbers, such as ``.3f`` or ``,d``.
        best: whether the ``low``est or ``high``est number is set in bold, with a mark for
            readers who cannot see that.
        title: a longer explanation, shown on hovering.
    """

    heading: str
    unit: str = ""
    form: str = ""
    best: Literal["low", "high"] | None = None
    title: str = ""


@dataclass(frozen=True)
class ShownCell:
    """A cell as the page shows it."""

    text: str
    sort_key: str
    numeric: bool
    best: bool


@dataclass(frozen=True)
class Table:
    """A table whose columns sort on a click; the first cell of a row names it.

    Attributes:
        columns: from left to right.
        rows: one cell a column; None is shown as a dash and sorts last.
        caption: what the table shows.
    """

    template: ClassVar[str] = "table"
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells and the table {len(self.columns)}")

    @property
    def shown(self) -> list[list[ShownCell]]:
        """The cells as the page shows them."""
        best = [self._best(index) for index in range(len(self.columns))]
        return [
            [
                _shown(c, column.form, b)
                for c, column, b in zip(row, self.columns, best, strict=True)
            ]
            for row in self.rows
        ]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [any(isinstance(c, int | float) for c in cells) for cells in columns]

    def _best(self, index: int) -> float | None:
        choose = {"low": min, "high": max}.get(self.columns[index].best or "")
        numbers = [cell for row in self.rows if isinstance(cell := row[index], int | float)]
        return choose(numbers) if choose and len(numbers) > 1 else None


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        figure: drawn by a function of this package.
        caption: what to see in it.
        alternative: the same for those who cannot see it; the caption where left empty.
    """

    template: ClassVar[str] = "plot"
    figure: Figure
    caption: str
    alternative: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a line of text until asked for."""

    template: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]


Block = Text | Callout | Facts | Code | Table | Plot | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


def _shown(cell: Cell, form: str, best: float | None) -> ShownCell:
    if cell is None:
        return ShownCell("\N{EN DASH}", "", False, False)
    if isinstance(cell, str):
        return ShownCell(cell, cell.casefold(), False, False)
    return ShownCell(format(cell, form), repr(float(cell)), True, best is not None and cell == best)
