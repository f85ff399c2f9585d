"""Packed tokens on disk, and the data set of equal blocks over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

_SLAB = 4096


@dataclass(frozen=True)
class PackedDocument:
    """One tokenised document: its tokens with the end of text, its bytes, its group or -1."""

    tokens: NDArray[Any]
    bytes: int
    group: int


def token_dtype(vocabulary: int) -> str:
    """The narrowest type that holds every id below ``vocabulary``."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def write_split(folder: Path, split: str, documents: Iterable[PackedDocument], dtype: str) -> None:
    """Append ``documents`` to the token file of ``split``, and write where each of them ends."""
    ends: list[tuple[int, int, int]] = []
    tokens = size = 0
    with _tokens_path(folder, split).open("wb") as file:
        for document in documents:
            file.write(np.asarray(document.tokens, dtype=dtype).tobytes())
            tokens += len(document.tokens)
            size += document.bytes
            ends.append((tokens, size, document.group))
    np.save(_documents_path(folder, split), np.array(ends, dtype=np.int64).reshape(-1, 3))


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The tokens of one split, in blocks of ``sequence_length``.

    The documents of a split follow each other, each closed by an end of text, and are cut into
    blocks without regard to where a document ends; what is left at the end is dropped. The tokens
    stay on disk, mapped into memory, and a pickled data set carries only their path.

    Args:
        folder: where :func:`write_split` wrote.
        split: the name of the split.
        sequence_length: tokens in a block, T.
        dtype: the type of a stored token.

    Attributes:
        tokens: tokens in the split, with the last, incomplete block.
        bytes: UTF-8 bytes of text in the split.
        documents: documents in the split.
    """

    def __init__(self, folder: Path, split: str, sequence_length: int, dtype: str) -> None:
        self.split = split
        self.sequence_length = sequence_length
        self._path = _tokens_path(folder, split)
        self._dtype = dtype
        ends = np.load(_documents_path(folder, split), allow_pickle=False)
        self._token_ends, self._byte_ends, self._group_of = ends.T.copy()
        self.documents = len(ends)
        self.tokens = int(self._token_ends[-1]) if len(ends) else 0
        self.bytes = int(self._byte_ends[-1]) if len(ends) else 0

    def __len__(self) -> int:
        return self.tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Block ``index``: ``input_ids`` and ``labels``, both (T,) and equal.

        Models of transformers shift the labels themselves.
        """
        start = range(len(self))[index] * self.sequence_length
        block = self._mapped[start : start + self.sequence_length]
        input_ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mapped"}

    @cached_property
    def _mapped(self) -> NDArray[Any]:
        return np.memmap(self._path, dtype=self._dtype, mode="r")

    def first(self, count: int) -> Subset[dict[str, Tensor]]:
        """The first ``count`` blocks, or all where there are fewer."""
        return Subset(self, range(min(count, len(self))))

    def bytes_of(self, index: int) -> float:
        """UTF-8 bytes of text in block ``index``.

        The bytes of a document are spread evenly over its tokens, so a block that cuts one has a
        proportional part of it, and the blocks and the dropped tail add up to the split.
        """
        start = range(len(self))[index] * self.sequence_length
        return self._bytes_before(start + self.sequence_length) - self._bytes_before(start)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token of the blocks; nats a token / this / ln 2 = bits a byte.

        0 where there is no block.
        """
        used = len(self) * self.sequence_length
        return self._bytes_before(used) / used if used else 0.0

    def token_groups(self, index: int) -> Tensor:
        """The group of each token of block ``index``, (T,), -1 where it has none."""
        start = range(len(self))[index] * self.sequence_length
        return torch.from_numpy(self._groups_between(start, start + self.sequence_length))

    @cached_property
    def groups(self) -> Tensor:
        """The group that most tokens of each block have, (blocks,), -1 for none."""
        length, count = self.sequence_length, int(self._group_of.max()) + 2
        found = np.empty(len(self), dtype=np.int64)
        for first in range(0, len(self), _SLAB):
            last = min(first + _SLAB, len(self))
            group = self._groups_between(first * length, last * length) + 1
            block = np.repeat(np.arange(last - first), length)
            tally = np.bincount(block * count + group, minlength=(last - first) * count)
            found[first:last] = tally.reshape(-1, count).argmax(1) - 1
        return torch.from_numpy(found)

    def _bytes_before(self, position: int) -> float:
        ends, size = self._token_ends, self._byte_ends
        document = int(np.searchsorted(ends, position, side="left"))
        token_start = int(ends[document - 1]) if document else 0
        byte_start = int(size[document - 1]) if document else 0
        share = (position - token_start) / (int(ends[document]) - token_start)
        return byte_start + share * (int(size[document]) - byte_start)

    def _groups_between(self, start: int, stop: int) -> NDArray[np.int64]:
        documents = np.searchsorted(self._token_ends, np.arange(start, stop), side="right")
        groups: NDArray[np.int64] = self._group_of[documents]
        return groups


def _tokens_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens"


def _documents_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.documents.npy"
