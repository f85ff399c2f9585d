"""Small packed corpora for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moekit.data import PackedDataset, TextData, TextSpec

ROOT = Path(__file__).resolve().parents[2]
Writer = Callable[..., Path]


def small(source: Path | str, **fields: Any) -> TextSpec:
    defaults = {"vocab_size": 300, "sequence_length": 16}
    return TextSpec(source=str(source), **{**defaults, **fields})


def splits(data: TextData) -> dict[str, PackedDataset]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def stream(dataset: PackedDataset) -> list[int]:
    return [token for block in dataset for token in block["input_ids"].tolist()]


def documents_in(data: TextData, split: str) -> set[str]:
    """The texts of a split, read back through the tokenizer, but for the cut-off last ones."""
    text = data.tokenizer.decode(stream(splits(data)[split]))
    return set(text.split("<|endoftext|>")[:-1])
