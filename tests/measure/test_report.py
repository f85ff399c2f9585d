"""The report as a page: escaped, whole, self-contained; and what the figures draw."""

from __future__ import annotations

import itertools
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_report import DESIGNS, example_report
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OutputError
from moekit.measure.report import (
    Column,
    Curve,
    FrontierPoint,
    Plot,
    Report,
    Section,
    Table,
    Text,
    experts_by_token_type,
    experts_histogram,
    frontier,
    load_heatmap,
    loss_curves,
    pareto_front,
    series_styles,
)
from moekit.measure.report.style import spread

EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</svg></title></style><script>alert(3)</script>",
    "a & b $x_1^2$ {{ 7 * 7 }}",
    "']]><!--",
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Every element of a page with its attributes, and its text outside of script and style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(example_report().html())


@pytest.fixture(scope="module")
def hostile() -> Page:
    return Page(example_report(names=EVIL, note=EVIL[0]).html())


def test_what_users_type_stays_text(hostile: Page) -> None:
    assert len(hostile.tags("script")) == 1
    assert hostile.tags("img") == []
    handlers = [name for _, a in hostile.elements for name in a if name.startswith("on")]
    assert handlers == []
    for text in EVIL:
        assert text in hostile.text
    assert hostile.open == []


def test_names_are_escaped_in_figures_too() -> None:
    figure = frontier([FrontierPoint(name, 1.0 + i, 2.0) for i, name in enumerate(EVIL)])
    source = Report("r", [Section("s", [Plot(figure, EVIL[0], EVIL[1])])]).html()
    drawing = source[source.index("<svg") : source.index("</svg>")]
    assert "<script" not in drawing
    assert "<img" not in drawing
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawing
    assert "$x_1^2$" in drawing


def test_the_page_is_closed_and_loads_nothing(page: Page) -> None:
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)
    assert page.tags("link") == []
    policy = next(m for m in page.tags("meta") if m.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = {
        name
        for _, attributes in page.elements
        for value in attributes.values()
        for name in re.findall(r"(?:url\(#|^#)([\w-]+)", value or "")
        if not re.fullmatch(r"[0-9a-f]{6}", name)
    }
    assert used <= set(ids)


def test_figures_follow_the_theme_and_can_be_read_out(page: Page) -> None:
    figures = page.tags("svg")
    assert len(figures) == 8
    assert all(f["role"] == "img" and f["aria-label"] and f["viewbox"] for f in figures)
    styles = " ".join(a.get("style") or "" for tag, a in page.elements if tag != "svg")
    assert "var(--ink)" in styles
    assert "var(--grid)" in styles
    assert "#1b1f24" not in styles
    assert "DejaVu" not in styles


def test_headings_form_a_table_of_contents(page: Page) -> None:
    links = [a["href"] for a in page.tags("a")]
    assert links == [f"#{a['id']}" for a in page.tags("h2")]
    assert len(page.tags("h1")) == 1


def test_tables_mark_the_best_format_numbers_and_keep_keys_for_sorting() -> None:
    table = Table(
        [Column("design"), Column("loss", "nats", ".2f", best="low"), Column("n", best="high")],
        [["b", 2.126, 5], ["A", 1.5, None], ["c", 1.5, 7]],
        caption="three",
    )
    page = Page(Report("r", [Section("s", [table])]).html())
    cells = [a for a in page.tags("td") + page.tags("th") if "data-key" in a]
    assert {a["data-key"] for a in cells} == {"2.126", "1.5", "5.0", "", "7.0", "a", "b", "c"}
    best = [a["data-key"] for a in page.tags("td") if "best" in (a["class"] or "")]
    assert best == ["1.5", "1.5", "7.0"]
    assert "2.13" in page.text
    assert "nats" in page.text
    assert [a.get("scope") for a in page.tags("th")] == ["col"] * 3 + ["row"] * 3


def test_a_table_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells and the table 1"):
        Table([Column("a")], [[1, 2]])


def test_an_empty_table_and_no_sections_make_a_page() -> None:
    assert Page(Report("r", []).html()).open == []
    assert Page(Report("r", [Section("s", [Table([Column("a")], [])])]).html()).open == []


def test_the_same_report_is_the_same_page() -> None:
    assert example_report().html() == example_report().html()


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = Report("é", []).write(tmp_path / "deep" / "report.html")
    assert "<h1>é</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Report("old", []).write(tmp_path / "report.html")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"report\.html \(No space left"):
        Report("new", []).write(path)
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Report("r", [Section("s", [Text("t")])]).write(tmp_path / "file" / "report.html")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_pareto_front_is_what_nothing_dominates(values: list[tuple[int, int]]) -> None:
    points = [FrontierPoint(str(i), c, q) for i, (c, q) in enumerate(values)]
    front = {(p.cost, p.loss) for p in pareto_front(points)}
    expected = {
        (p.cost, p.loss)
        for p in points
        if not any(
            q.cost <= p.cost and q.loss <= p.loss and (q.cost, q.loss) != (p.cost, p.loss)
            for q in points
        )
    }
    assert front == expected


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10), max_size=8), st.floats(0.1, 3))
def test_labels_are_spread_in_order_and_no_more_than_needed(
    heights: list[float], gap: float
) -> None:
    placed = spread(heights, gap)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for low, high in itertools.pairwise(order):
        assert placed[high] - placed[low] >= gap * (1 - 1e-6)
    if all(abs(a - b) > gap for i, a in enumerate(heights) for b in heights[:i]):
        assert placed == pytest.approx(heights)
    assert sum(placed) == pytest.approx(sum(heights), abs=1e-6)


def test_designs_look_different_and_the_same_everywhere() -> None:
    names = [str(i) for i in range(28)]
    styles = series_styles(names)
    assert len({(s.colour, s.line) for s in styles.values()}) == 28
    assert len({(s.colour, s.marker) for s in styles.values()}) == 28
    assert series_styles(names[:3]) == {name: styles[name] for name in names[:3]}


def test_the_mean_line_averages_seeds_on_common_ground() -> None:
    curves = [Curve([0, 1, 2, 3], [4, 3, 2, 1]), Curve([1, 3], [5, 1])]
    axes = loss_curves({"a": curves}, "x", "y").axes[0]
    mean = axes.lines[-1]
    assert list(mean.get_xdata()) == [1, 2, 3]
    assert list(mean.get_ydata()) == [4, 2.5, 1]
    assert axes.get_xlabel() == "x"


def test_the_heat_map_holds_load_over_the_mean_of_each_layer() -> None:
    figure = load_heatmap([[1, 3], [2, 2, 2, 10]])
    values = figure.axes[0].collections[0].get_array()
    assert values is not None
    assert values.filled(-1).tolist() == [[0.5, 1.5, -1, -1], [0.5, 0.5, 0.5, 2.5]]


def test_the_histogram_stops_at_the_last_used_number() -> None:
    axes = experts_histogram({"a": [0.25, 0.75, 0, 0], "b": [1.0]}).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [25, 75, 100]


@pytest.mark.parametrize(
    "figure",
    [
        lambda: loss_curves({}, "x", "y"),
        lambda: loss_curves({"a": []}, "x", "y"),
        lambda: loss_curves({"a": [Curve([1], [2.0])]}, "x", "y"),
        lambda: loss_curves({"a": [Curve([1, 2], [float("nan"), 1])]}, "x", "y"),
        lambda: frontier([]),
        lambda: frontier([FrontierPoint("a", 1, 1)]),
        lambda: load_heatmap([]),
        lambda: load_heatmap([[0, 0]]),
        lambda: load_heatmap([[1.0] * 200] * 40),
        lambda: experts_by_token_type({}),
        lambda: experts_by_token_type({"a": {"digits": 1.0}, "b": {"other": 0.0}}),
        lambda: experts_histogram({}),
    ],
)
def test_figures_of_little_or_odd_data_can_be_drawn(figure) -> None:  # type: ignore[no-untyped-def]
    page = Page(Report("r", [Section("s", [Plot(figure(), "c")])]).html())
    assert len(page.tags("svg")) == 1


def test_the_example_names_every_design(page: Page) -> None:
    assert all(name in page.text for name in DESIGNS)
