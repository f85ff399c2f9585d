"""From a source to packed, memory-mapped training, validation and test data."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moekit.cache import cached, default_cache
from moekit.data.blocks import PackedDataset, PackedDocument, token_dtype, write_split
from moekit.data.columns import Columns
from moekit.data.fingerprint import digest_of, fingerprint_of
from moekit.data.sources import Source, documents_of, open_source
from moekit.data.splits import SPLITS, assign_splits
from moekit.data.spool import Spool
from moekit.data.tokenizer import (
    SMALLEST_VOCABULARY,
    encode,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
)
from moekit.errors import DataError
from moekit.spec import Spec

ProgressHook = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and of how much if that is known."""

_FORMAT = 1
_BATCH_BYTES = 1 << 20
_EVERY = 256


@dataclass(frozen=True)
class TextSpec(Spec):
    """Text to train on, and how it is split, tokenised and packed.

    Attributes:
        source: see :mod:`moekit.data.sources`.
        tokenizer: folder or hub name of a tokenizer; ``None`` trains a byte-level BPE on the
            training split.
        vocab_size: size of the vocabulary when one is trained.
        sequence_length: tokens in a block.
        validation_share: share of the documents for validation, unless the source gives splits.
        test_share: share of the documents for test, unless the source gives splits; 0 for none.
        text_column: column of the text in JSON lines, parquet and hub data sets.
        group_column: column of the group.
        split_column: column of the split.
        limit_bytes: use at most so much of the source.
        seed: draws the split and shuffles the training documents.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    vocab_size: int = 4096
    sequence_length: int = 256
    validation_share: float = 0.05
    test_share: float = 0.05
    text_column: str | None = None
    group_column: str | None = None
    split_column: str | None = None
    limit_bytes: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`~moekit.errors.SpecError` if a number is out of its range."""
        self.require(self.source.strip() != "", "source is empty; name a file, a folder or stdlib")
        smallest = SMALLEST_VOCABULARY
        self.require(
            self.vocab_size >= smallest,
            f"vocab_size is {self.vocab_size}; wanted {smallest} or more",
        )
        self.require(
            self.sequence_length >= 2,
            f"sequence_length is {self.sequence_length}; wanted 2 or more",
        )
        self.require(
            0 <= self.seed < 2**63, f"seed is {self.seed}; wanted 0 or more, and below 2**63"
        )
        self.require(
            self.validation_share > 0 and self.test_share >= 0,
            "validation_share must be more than 0, and test_share 0 or more",
        )
        self.require(
            self.validation_share + self.test_share < 1,
            "validation_share and test_share must leave something to train on",
        )
        self.require(
            self.limit_bytes is None or self.limit_bytes > 0,
            f"limit_bytes is {self.limit_bytes}; wanted more than 0, or None for no limit",
        )

    @property
    def columns(self) -> Columns:
        """The columns that were named."""
        return Columns(self.text_column, self.group_column, self.split_column)


@dataclass(frozen=True)
class TextData:
    """Packed text, ready to train on.

    Attributes:
        train: blocks of the training split, its documents in a seeded order.
        validation: blocks of the validation split, in reading order.
        test: blocks of the test split, in reading order.
        tokenizer: what the ids mean.
        report: what was read, as JSON values: source, documents, tokens, bytes, bytes_per_token and
            blocks of each split, vocabulary, duplicates_removed, files_skipped by kind.
        groups: name of each group id.
    """

    train: PackedDataset
    validation: PackedDataset
    test: PackedDataset
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]
    groups: tuple[str, ...]


def prepare(
    spec: TextSpec, cache: Path | None = None, progress: ProgressHook | None = None
) -> TextData:
    """Read, split, tokenise and pack what ``spec`` describes, or load it from the cache.

    Documents that are equal but for white space around them are kept once, so that none is in two
    splits, and a tokenizer is trained on the training split alone. The text itself is on disk
    meanwhile, not in memory.

    Args:
        spec: what to prepare.
        cache: folder to keep results in; ``MOEKIT_CACHE`` or ``~/.cache/moekit``.
        progress: told how far it is.

    Raises:
        DataError: if the source cannot be read, or is too small for a block of every split.
        CheckpointError: if the tokenizer cannot be loaded.
        OutputError: if the cache cannot be written.

    Example:
        >>> data = prepare(TextSpec(limit_bytes=2_000_000))  # doctest: +SKIP
        >>> data.train[0]["input_ids"].shape  # doctest: +SKIP
        torch.Size([256])
    """
    cache = cache or default_cache()
    source = open_source(spec.source, spec.columns)
    work = _Preparation(spec, source, cache, progress or _silent)
    folder = cached(cache / "text" / _key(spec, source), work.build)
    return _load(folder, spec, source.description)


@dataclass(frozen=True)
class _Preparation:
    """One run from documents to packed files."""

    spec: TextSpec
    source: Source
    cache: Path
    progress: ProgressHook

    def build(self, folder: Path) -> None:
        skipped: Counter[str] = Counter()
        with Spool(folder / "documents.spool") as spool:
            self._read(spool, skipped)
            split = self._assign(spool)
            tokenizer = self._tokenizer(spool, np.flatnonzero(split == 0))
            tokenizer.save_pretrained(str(folder / "tokenizer"))
            dtype = token_dtype(max(tokenizer.get_vocab().values()) + 1)
            names = sorted({group for group in spool.groups if group is not None})
            for index, name in enumerate(SPLITS):
                order = np.flatnonzero(split == index)
                if name == "train":
                    order = np.random.default_rng(self.spec.seed).permutation(order)
                documents = self._tokenise(name, spool, order, tokenizer, names)
                write_split(folder, name, documents, dtype)
            meta = {
                "dtype": dtype,
                "groups": names,
                "duplicates_removed": spool.duplicates,
                "files_skipped": dict(sorted(skipped.items())),
                "splits_given": any(spool.given),
            }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def _read(self, spool: Spool, skipped: Counter[str]) -> None:
        documents = documents_of(self.source, self.spec.limit_bytes, skipped)
        for number, document in enumerate(documents, start=1):
            spool.add(document)
            if number % _EVERY == 0:
                self.progress("reading documents", number, None)
        self.progress("reading documents", len(spool), len(spool))

    def _assign(self, spool: Spool) -> NDArray[np.int64]:
        spec = self.spec
        try:
            return assign_splits(
                spool.keys, spool.given, spec.validation_share, spec.test_share, spec.seed
            )
        except DataError as error:
            raise DataError(f"{self.source.description}: {error}") from None

    def _tokenizer(self, spool: Spool, train: NDArray[np.int64]) -> PreTrainedTokenizerBase:
        if self.spec.tokenizer is not None:
            return load_tokenizer(self.spec.tokenizer)
        self.progress("training the tokenizer", 0, 1)
        trained = train_tokenizer(spool.texts(train.tolist()), self.spec.vocab_size, self.cache)
        self.progress("training the tokenizer", 1, 1)
        return trained

    def _tokenise(
        self,
        split: str,
        spool: Spool,
        order: NDArray[np.int64],
        tokenizer: PreTrainedTokenizerBase,
        names: list[str],
    ) -> Iterator[PackedDocument]:
        end = end_of_text_id(tokenizer)
        number_of = {name: number for number, name in enumerate(names)}
        done = 0
        for batch in spool.batches(order.tolist(), _BATCH_BYTES):
            encoded = encode(tokenizer, [spool.text(number) for number in batch])
            for number, ids in zip(batch, encoded, strict=True):
                group = spool.groups[number]
                yield PackedDocument(
                    np.array([*ids, end]),
                    spool.bytes_of(number),
                    -1 if group is None else number_of[group],
                )
            done += len(batch)
            self.progress(f"packing {split}", done, len(order))


def _key(spec: TextSpec, source: Source) -> str:
    """What the packed files depend on: all but how the source is spelled and the block length."""
    fields = asdict(spec)
    for name in ("source", "sequence_length", "tokenizer", "vocab_size"):
        del fields[name]
    tokenizer = (
        ["trained", spec.vocab_size, tokenizers.__version__]
        if spec.tokenizer is None
        else ["loaded", _tokenizer_key(spec.tokenizer)]
    )
    return digest_of([_FORMAT, fields, source.fingerprint(), tokenizer])


def _tokenizer_key(name: str) -> str:
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        return name
    return fingerprint_of(sorted(path for path in folder.iterdir() if path.is_file()))


def _load(folder: Path, spec: TextSpec, description: str) -> TextData:
    meta = json.loads((folder / "meta.json").read_text())
    open_split = partial(
        PackedDataset, folder, sequence_length=spec.sequence_length, dtype=meta["dtype"]
    )
    data = {name: open_split(split=name) for name in SPLITS}
    for packed in data.values():
        if packed.split != "test" or spec.test_share:
            _require_block(packed, description)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return TextData(
        **data,
        tokenizer=tokenizer,
        report=_report(data, meta, description, len(tokenizer)),
        groups=tuple(meta["groups"]),
    )


def _require_block(packed: PackedDataset, description: str) -> None:
    if len(packed) == 0:
        share = "" if packed.split == "train" else f", a larger {packed.split}_share"
        raise DataError(
            f"{description}: {packed.tokens} tokens for {packed.split}, and a block has "
            f"{packed.sequence_length}; give more text{share} or a shorter sequence_length"
        )


def _report(
    data: dict[str, PackedDataset], meta: dict[str, Any], description: str, vocabulary: int
) -> dict[str, Any]:
    return {
        "source": description,
        "documents": {name: packed.documents for name, packed in data.items()},
        "bytes": {name: packed.bytes for name, packed in data.items()},
        "tokens": {name: packed.tokens for name, packed in data.items()},
        "bytes_per_token": {name: packed.bytes_per_token for name, packed in data.items()},
        "blocks": {name: len(packed) for name, packed in data.items()},
        "vocabulary": vocabulary,
        "groups": meta["groups"],
        "splits_given": meta["splits_given"],
        "duplicates_removed": meta["duplicates_removed"],
        "files_skipped": meta["files_skipped"],
    }


def _silent(description: str, done: int, total: int | None) -> None:
    """Tell nobody."""
