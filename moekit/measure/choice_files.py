"""Multiple-choice items from JSON lines, in the forms that data sets come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moekit.errors import DataError
from moekit.measure.multiple_choice import ChoiceItem

FORMS = (
    "context, choices, answer; ctx, endings, label (HellaSwag); question or question_stem, "
    "choices, answerKey (ARC, OpenBookQA); goal, sol1, sol2, label (PIQA)"
)


def read_choices(path: str | Path) -> list[ChoiceItem]:
    """The items of a file of JSON lines.

    Each line is an object of one of these forms; texts are taken as they stand, and a choice that
    begins with no space gets one:

    - ``context``, ``choices`` (a list of texts), ``answer`` (its index, or the text itself);
    - HellaSwag: ``ctx``, ``endings``, ``label``;
    - ARC and OpenBookQA: ``question`` (or ``question_stem``), ``choices`` (``text`` and ``label``,
      or a list of objects with both), ``answerKey``; also with stem and choices in ``question``;
    - PIQA: ``goal``, ``sol1``, ``sol2``, ``label``.

    Questions of ARC and PIQA become ``Question: ...\\nAnswer:``, as in lm-evaluation-harness.

    Raises:
        DataError: the file cannot be read or is empty, or a line is of none of these forms; the
            message names file, line and field.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no items; wanted JSON lines with {FORMS}")
    return items


def _item(line: Any) -> ChoiceItem:
    if not isinstance(line, dict):
        raise DataError(f"it is no object; wanted {FORMS}")
    if "endings" in line:
        return _made(_text(line, "ctx"), _texts(line, "endings"), _index(line, "label"))
    if "sol1" in line:
        choices = [_text(line, "sol1"), _text(line, "sol2")]
        return _made(_asked(_text(line, "goal")), choices, _index(line, "label"))
    if "answerKey" in line:
        return _lettered(line)
    if "context" in line:
        choices = _texts(line, "choices")
        answer = line.get("answer")
        known = isinstance(answer, str) and answer in choices
        return _made(
            _text(line, "context"),
            choices,
            choices.index(str(answer)) if known else _index(line, "answer"),
        )
    raise DataError(f"it has the fields {', '.join(sorted(line)) or 'none'}; wanted {FORMS}")


def _lettered(line: dict[str, Any]) -> ChoiceItem:
    inside = line["question"] if isinstance(line.get("question"), dict) else line
    if "question_stem" in line:
        context = _text(line, "question_stem")
    else:
        context = _asked(_text(inside, "stem" if inside is not line else "question"))
    choices = inside.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise DataError("choices is no object with text and label")
    labels = [str(label) for label in choices.get("label") or []]
    texts = _texts(choices, "text")
    key = str(line["answerKey"])
    if len(labels) != len(texts):
        raise DataError(f"choices has {len(texts)} texts and {len(labels)} labels")
    if key not in labels:
        raise DataError(f"answerKey is {key!r}; the labels are {', '.join(labels)}")
    return _made(context, texts, labels.index(key))


def _made(context: str, choices: list[str], answer: int) -> ChoiceItem:
    spaced = tuple(choice if choice[:1].isspace() else f" {choice}" for choice in choices)
    return ChoiceItem(context, spaced, answer)


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _text(line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r}; wanted a text")
    return value


def _texts(line: dict[str, Any], name: str) -> list[str]:
    value = line.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{name} is {value!r}; wanted a list of texts")
    return value


def _index(line: dict[str, Any], name: str) -> int:
    value = line.get(name)
    try:
        index = int(value)  # type: ignore[arg-type]  # HellaSwag's labels are texts
    except (TypeError, ValueError):
        index = -1
    if isinstance(value, bool | float) or index < 0:
        raise DataError(f"{name} is {value!r}; wanted the number of the right choice, from 0")
    return index
