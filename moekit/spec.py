"""Specs: what a person types, a file stores and a module is built from.

A spec is a frozen dataclass that derives from :class:`Spec`. It checks itself when made, compares
by value, and goes to JSON and back without loss::

    >>> from moekit.routing import RouterSpec, TopK
    >>> TopK(k=2).to_dict()["kind"]
    'TopK'
    >>> RouterSpec.from_dict({"kind": "TopK", "k": 2}) == TopK(k=2)
    True

A spec is found by its class name among the subclasses of the family it is asked of, so adding a
class is all that adding a router, a bank or a loss takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from moekit.errors import SpecError

TypedFields = tuple[tuple[dataclasses.Field[Any], Any], ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Base of every spec. Subclasses are frozen dataclasses and put their checks in ``check``."""

    abstract: ClassVar[bool] = True
    _typed_fields: ClassVar[TypedFields]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.abstract = cls.__dict__.get("abstract", False)

    def __post_init__(self) -> None:
        for field, hint in _fields(type(self)):
            value = _freeze(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if not _matches(value, hint):
                raise SpecError(
                    f"{type(self).__name__}: {field.name} is {value!r}; wanted {_describe(hint)}"
                )
        self.check()

    def check(self) -> None:
        """Raise :class:`~moekit.errors.SpecError` if the fields contradict each other."""

    def require(self, holds: bool, sentence: str) -> None:
        """Refuse this spec with ``sentence`` unless ``holds``."""
        if not holds:
            raise SpecError(f"{type(self).__name__}: {sentence}")

    def replace(self, **changes: Any) -> Self:
        """A copy of this spec with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """This spec as plain JSON values, with its class name under ``kind``."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"kind": type(self).__name__, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The spec that ``data`` describes.

        Raises:
            SpecError: if ``data`` is no mapping, its ``kind`` is not one of this family, or it has
                a field that this kind does not have.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"{cls.__name__}: wanted a mapping with a kind, got {data!r}")
        given = dict(data)
        kind = given.pop("kind", None if cls.abstract else cls.__name__)
        found = cls.kinds().get(kind) if isinstance(kind, str) else None
        if found is None:
            raise SpecError(
                f"{kind!r} is not a {cls.__name__}; known: {', '.join(sorted(cls.kinds()))}"
                + suggestion(str(kind), cls.kinds())
            )
        hints = {field.name: hint for field, hint in _fields(found)}
        for name in given:
            if name not in hints:
                raise SpecError(
                    f"{kind} has no field {name!r}; it has {', '.join(hints) or 'none'}"
                    + suggestion(name, hints)
                )
        values = {name: _revive(value, hints[name]) for name, value in given.items()}
        try:
            return found(**values)
        except TypeError as error:  # a required field is missing
            missing = str(error).partition("__init__() ")[2] or str(error)
            raise SpecError(f"{kind} is {missing}") from None

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Every concrete spec of this family, by name."""
        own = {} if cls.abstract else {cls.__name__: cls}
        for sub in cls.__subclasses__():
            own.update(sub.kinds())
        return own


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _fields(cls: type[Spec]) -> TypedFields:
    """The fields of a kind, read once: reading annotations takes a good part of a millisecond."""
    if "_typed_fields" not in vars(cls):
        hints = typing.get_type_hints(cls)
        cls._typed_fields = tuple((f, hints[f.name]) for f in dataclasses.fields(cls))
    return cls._typed_fields


def _freeze(value: Any) -> Any:
    """Lists become tuples, so that a spec is hashable and equal to its round trip."""
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _revive(value: Any, hint: Any) -> Any:
    """Turn the mappings inside a JSON value into the specs that the field's type names."""
    if isinstance(value, Mapping):
        families = [t for t in _leaves(hint) if inspect.isclass(t) and issubclass(t, Spec)]
        if not families:
            raise SpecError(f"a mapping was given where {_describe(hint)} is wanted: {value!r}")
        kind = value.get("kind")
        named = [t for t in families if isinstance(kind, str) and kind in t.kinds()]
        return (named or families)[0].from_dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_revive(item, hint) for item in value)
    return value


def _leaves(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return []
    args = [a for a in typing.get_args(hint) if a is not Ellipsis]
    return [leaf for a in args for leaf in _leaves(a)] if args else [hint]


def _matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``, for the few type forms that specs use."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_matches, value, args))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # NaN is not
    if hint is int:
        number = isinstance(value, int) and not isinstance(value, bool)
        return number and -(2**63) <= value < 2**63
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if hint is type(None):
        return "nothing"
    if hint is float:
        return "finite float"
    if hint is int:
        return "64-bit int"
    return getattr(hint, "__name__", str(hint))
