"""Hub data sets, with a stand-in for the library that fetches them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import strategies as st

from moekit.data import read_documents
from moekit.errors import DataError

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def texts(source: Path | str, **columns: Any) -> list[str]:
    return [found.text for found in read_documents(str(source), **columns)]


def refusal(source: Path | str, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(str(source), **columns))
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append((*arguments, options))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def hub_rows(*rows: dict[str, Any]) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(list(rows)).to_iterable_dataset()


def test_hub_splits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = datasets.IterableDatasetDict(
        train=hub_rows({"text": "a"}, {"text": "b"}),
        dev=hub_rows({"text": "c"}),
        unsupervised=hub_rows({"text": "d"}),
    )
    calls = stand_in(monkeypatch, answer)
    found = list(read_documents("hub:owner/name:config-1"))
    assert calls == [("owner/name", "config-1", {"streaming": True})]
    assert [(one.text, one.split) for one in found] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "validation"),
    ]


def test_hub_splits_of_other_names_are_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = datasets.IterableDatasetDict(a=hub_rows({"text": "a"}), b=hub_rows({"text": "b"}))
    stand_in(monkeypatch, answer)
    found = list(read_documents("hub:owner/name"))
    assert [(one.text, one.split) for one in found] == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'owner/name'\nmore"), "check the network"),
        (RuntimeError(), "(RuntimeError); check the network"),
        (datasets.exceptions.DatasetNotFoundError("No such data set."), "log in to the hub"),
        (ValueError("Config name is missing."), "check the name and its configuration"),
    ],
)
def test_an_unreachable_hub_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    stand_in(monkeypatch, error)
    message = refusal("hub:owner/name")
    assert message.startswith("hub:owner/name cannot be read from the hub (")
    assert said in message


def test_offline_the_real_library_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "cannot be read from the hub" in refusal("hub:owner/name")


def test_a_folder_of_the_name_is_not_taken_for_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets reads a local folder of a name where there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    calls = stand_in(monkeypatch, datasets.IterableDatasetDict(train=hub_rows({"text": "a"})))
    assert "is also a path here, 'owner/name'" in refusal("hub:owner/name")
    assert calls == []


@pytest.mark.parametrize(
    "name",
    [
        *("hub:", "hub:a b", "hub:a/b/c", "hub:a/b:", "hub:../b c"),
        *("hub:.", "hub:..", "hub:./b", "hub:a/..", "hub:.a/b"),
    ],
)
def test_a_bad_hub_name_is_an_error(name: str) -> None:
    assert re.search(r"is no hub name; wanted hub:owner/name", refusal(name))


def test_hub_data_without_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, datasets.IterableDatasetDict(train=hub_rows({"label": 1})))
    assert "hub:owner/name (train) has no column text" in refusal("hub:owner/name")
