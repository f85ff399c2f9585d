"""Specs: checked when made, frozen, and the same after a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import MoekitError, SpecError
from moekit.spec import Spec, suggestion


@dataclasses.dataclass(frozen=True)
class Shape(Spec):
    abstract: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Polygon(Shape):
    sides: tuple[float, ...]
    fill: Literal["none", "solid"] = "none"
    label: str | None = None
    corners: int = 0
    closed: bool = True
    origin: tuple[int, int] = (0, 0)

    def check(self) -> None:
        self.require(self.corners >= 0, f"corners is {self.corners}; wanted 0 or more")


@dataclasses.dataclass(frozen=True)
class Square(Polygon):
    sides: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Drawing(Spec):
    shape: Shape
    others: tuple[Shape, ...] = ()
    frame: Shape | None = None


@dataclasses.dataclass(frozen=True)
class Colour(Spec):
    abstract: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Red(Colour):
    depth: int = 1


@dataclasses.dataclass(frozen=True)
class Painted(Spec):
    part: Shape | Colour


INTEGERS = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
circles = st.builds(Circle, radius=numbers)
polygons = st.builds(
    Polygon,
    sides=st.lists(numbers, max_size=5),
    fill=st.sampled_from(["none", "solid"]),
    label=st.none() | st.text(),
    corners=st.integers(0, 10),
    closed=st.booleans(),
    origin=st.tuples(INTEGERS, INTEGERS),
)
shapes = circles | polygons
drawings = st.builds(
    Drawing, shape=shapes, others=st.lists(shapes, max_size=3), frame=st.none() | shapes
)


def through_json(spec: Spec) -> Any:
    return json.loads(json.dumps(spec.to_dict()))


@given(shapes)
def test_a_spec_survives_json_by_way_of_its_family(spec: Shape) -> None:
    again = Shape.from_dict(through_json(spec))
    assert type(again) is type(spec)
    assert again == spec
    assert hash(again) == hash(spec)


@given(drawings)
def test_nested_specs_survive_json(spec: Drawing) -> None:
    again = Drawing.from_dict(through_json(spec))
    assert again == spec
    assert [type(s) for s in again.others] == [type(s) for s in spec.others]
    assert again.to_dict() == spec.to_dict()


@given(drawings)
def test_to_dict_holds_only_plain_json_values(spec: Drawing) -> None:
    assert through_json(spec) == spec.to_dict()


def test_to_dict_names_the_kind_and_every_field() -> None:
    assert Drawing(Circle(2.0), others=(Circle(),)).to_dict() == {
        "kind": "Drawing",
        "shape": {"kind": "Circle", "radius": 2.0},
        "others": [{"kind": "Circle", "radius": 1.0}],
        "frame": None,
    }


def test_lists_become_tuples_at_every_depth() -> None:
    polygon = Polygon(sides=[1.0, 2.0], origin=[3, 4])  # type: ignore[arg-type]
    assert polygon.sides == (1.0, 2.0)
    assert polygon.origin == (3, 4)
    assert isinstance(hash(polygon), int)
    drawing = Drawing(Circle(), others=[Circle(), polygon])  # type: ignore[arg-type]
    assert drawing.others == (Circle(), polygon)
    assert isinstance(hash(drawing), int)


def test_a_list_given_to_a_spec_may_change_later_without_changing_it() -> None:
    sides = [1.0, 2.0]
    polygon = Polygon(sides=sides)  # type: ignore[arg-type]
    sides.append(3.0)
    assert polygon.sides == (1.0, 2.0)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Circle().radius = 2.0  # type: ignore[misc]


def test_specs_of_different_kinds_differ_though_their_fields_agree() -> None:
    assert Square() != Polygon(sides=(1.0, 1.0, 1.0, 1.0))


def test_missing_fields_take_their_defaults() -> None:
    assert Shape.from_dict({"kind": "Circle"}) == Circle(radius=1.0)


def test_a_concrete_family_needs_no_kind() -> None:
    assert Circle.from_dict({"radius": 3.0}) == Circle(3.0)


def test_from_dict_leaves_its_argument_as_it_was() -> None:
    data = {"kind": "Drawing", "shape": {"kind": "Circle"}, "others": [{"kind": "Square"}]}
    before = json.dumps(data)
    Drawing.from_dict(data)
    assert json.dumps(data) == before


def test_kinds_are_the_concrete_specs_of_the_family_alone() -> None:
    assert Shape.kinds() == {"Circle": Circle, "Polygon": Polygon, "Square": Square}
    assert Polygon.kinds() == {"Polygon": Polygon, "Square": Square}
    assert Circle.kinds() == {"Circle": Circle}


def test_a_class_defined_later_is_known_at_once() -> None:
    @dataclasses.dataclass(frozen=True)
    class Tint(Colour):
        share: int = 2

    assert Colour.from_dict({"kind": "Tint", "share": 5}) == Tint(5)


def test_an_int_is_welcome_where_a_float_is_wanted() -> None:
    assert Circle(radius=2) == Circle(radius=2.0)
    assert hash(Circle(radius=2)) == hash(Circle(radius=2.0))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"sides": 1.0}, "a list of finite float"),
        ({"sides": ("a",)}, "a list of finite float"),
        ({"sides": "abc"}, "a list of finite float"),
        ({"sides": (1.0, None)}, "a list of finite float"),
        ({"fill": "dotted"}, "one of 'none', 'solid'"),
        ({"fill": None}, "one of 'none', 'solid'"),
        ({"label": 3}, "str or nothing"),
        ({"corners": 1.5}, "64-bit int"),
        ({"corners": True}, "64-bit int"),
        ({"corners": "3"}, "64-bit int"),
        ({"corners": 2**63}, "64-bit int"),
        ({"closed": 1}, "bool"),
        ({"origin": (1,)}, "a list of 64-bit int"),
        ({"origin": (1, 2, 3)}, "a list of 64-bit int"),
        ({"origin": (1, 2.5)}, "a list of 64-bit int"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(fields: dict[str, Any], wanted: str) -> None:
    ((name, value),) = fields.items()
    given_fields = {"sides": (1.0,), **fields}
    expected = f"Polygon: {name} is {value!r}; wanted {wanted}"
    with pytest.raises(SpecError) as direct:
        Polygon(**given_fields)
    assert str(direct.value) == expected
    with pytest.raises(SpecError):
        Polygon.from_dict(given_fields)


@pytest.mark.parametrize(
    "radius", [True, "1", None, (1.0,), Red(), math.inf, -math.inf, math.nan, 10**400]
)
def test_only_a_finite_number_is_a_float(radius: Any) -> None:
    with pytest.raises(SpecError, match=r"^Circle: radius is .*; wanted finite float$"):
        Circle(radius=radius)


def test_a_spec_of_another_family_is_refused_in_a_nested_field() -> None:
    with pytest.raises(SpecError, match=r"^Drawing: shape is Red\(depth=1\); wanted Shape$"):
        Drawing(shape=Red())  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="'Red' is not a Shape; known: Circle, Polygon, Square"):
        Drawing.from_dict({"shape": {"kind": "Red"}})


def test_an_error_deep_inside_a_nested_spec_reaches_the_user() -> None:
    data = {"shape": {"kind": "Circle"}, "others": [{"kind": "Polygon", "sides": [], "fil": 1}]}
    with pytest.raises(SpecError, match=r"Polygon has no field 'fil'; .* did you mean fill"):
        Drawing.from_dict(data)


def test_check_runs_however_the_spec_is_made() -> None:
    sentence = "^Polygon: corners is -1; wanted 0 or more$"
    with pytest.raises(SpecError, match=sentence):
        Polygon(sides=(), corners=-1)
    with pytest.raises(SpecError, match=sentence):
        Polygon.from_dict({"sides": [], "corners": -1})
    with pytest.raises(SpecError, match=sentence):
        Polygon(sides=()).replace(corners=-1)


def test_replace_changes_a_copy() -> None:
    before = Polygon(sides=(1.0,))
    after = before.replace(corners=3, sides=[2.0])
    assert (after.corners, after.sides) == (3, (2.0,))
    assert before == Polygon(sides=(1.0,))


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("Circl", "'Circl'"), ("circle", "'circle'"), ("Circles", "'Circles'")],
)
def test_an_unknown_kind_lists_the_known_ones_and_suggests_the_closest(
    kind: str, shown: str
) -> None:
    with pytest.raises(SpecError) as caught:
        Shape.from_dict({"kind": kind})
    assert str(caught.value) == (
        f"{shown} is not a Shape; known: Circle, Polygon, Square; did you mean Circle?"
    )


@pytest.mark.parametrize("kind", ["Blob", None, 3, ["Circle"], "Shape", "Spec"])
def test_a_kind_that_is_none_of_the_family_is_refused(kind: Any) -> None:
    with pytest.raises(SpecError, match=r"is not a Shape; known: Circle, Polygon, Square"):
        Shape.from_dict({"kind": kind})


def test_an_abstract_family_needs_a_kind() -> None:
    with pytest.raises(SpecError, match=r"None is not a Shape; known: Circle, Polygon, Square"):
        Shape.from_dict({"radius": 1.0})


def test_an_unknown_field_lists_the_known_ones_and_suggests_the_closest() -> None:
    with pytest.raises(SpecError) as caught:
        Shape.from_dict({"kind": "Circle", "radios": 1.0})
    assert str(caught.value) == (
        "Circle has no field 'radios'; it has radius; did you mean radius?"
    )


def test_a_missing_field_is_named() -> None:
    with pytest.raises(SpecError, match=r"Polygon.*missing.*'sides'"):
        Shape.from_dict({"kind": "Polygon"})


@pytest.mark.parametrize("data", [None, [], "Circle", 3, [("kind", "Circle")]])
def test_only_a_mapping_describes_a_spec(data: Any) -> None:
    with pytest.raises(SpecError, match="Shape: wanted a mapping with a kind, got"):
        Shape.from_dict(data)


@pytest.mark.parametrize("name", ["radius", "label"])
def test_a_mapping_is_refused_where_no_spec_is_wanted(name: str) -> None:
    kind = "Circle" if name == "radius" else "Square"
    with pytest.raises(SpecError, match="a mapping was given where"):
        Shape.from_dict({"kind": kind, name: {"kind": "Circle"}})


@pytest.mark.parametrize("part", [Circle(2.0), Square(), Red(3)])
def test_the_kind_chooses_among_the_families_of_a_field(part: Shape | Colour) -> None:
    assert Painted.from_dict(through_json(Painted(part))) == Painted(part)


def test_a_kind_of_none_of_the_families_of_a_field_is_refused() -> None:
    with pytest.raises(SpecError, match="'Drawing' is not a Shape"):
        Painted.from_dict({"part": {"kind": "Drawing"}})


def test_a_spec_error_can_be_caught_as_moekits_own_or_as_a_value_error() -> None:
    assert issubclass(SpecError, MoekitError)
    with pytest.raises(ValueError, match="wanted finite float"):
        Circle(radius="wide")  # type: ignore[arg-type]


@given(st.text(), st.lists(st.text(min_size=1), max_size=5))
def test_suggestion_names_a_known_word_or_nothing(name: str, known: list[str]) -> None:
    words = {f"; did you mean {word}?" for word in known}
    assert suggestion(name, known) in words | {""}


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.data())
def test_suggestion_for_a_known_word_is_that_word(known: list[str], data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(known))
    assert suggestion(word, known) == f"; did you mean {word}?"
