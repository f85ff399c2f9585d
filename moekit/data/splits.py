"""Which document belongs to training, validation or test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.errors import DataError

SPLITS = ("train", "validation", "test")


def content_key(text: str) -> bytes:
    """A digest of ``text`` without the white space around it; equal keys mean one document."""
    return hashlib.sha256(text.strip().encode()).digest()


def stronger(first: str | None, second: str | None) -> str | None:
    """The split of a document met in two: held-out text must not be trained on as well."""
    order = (None, *SPLITS)
    return max(first, second, key=order.index)


def assign_splits(
    keys: Sequence[bytes],
    given: Sequence[str | None],
    validation_share: float,
    test_share: float,
    seed: int,
) -> NDArray[np.int64]:
    """The split of each of D distinct documents, as an index into ``SPLITS``, (D,).

    Splits that the source gives are kept. Those of validation and test that it does not give are
    drawn from the rest: a document is in test if a hash of its content and ``seed``, as a number
    from 0 to 1, is below ``test_share``, and in validation if below ``test_share +
    validation_share``. So a document keeps its split when others are added or their order changes.
    Where a share of few documents comes out empty, the one with the lowest hash is taken.

    Args:
        keys: ``content_key`` of each document, no two alike.
        given: the split that the source gives each, or ``None``.
        validation_share: share of documents for validation.
        test_share: share of documents for test.
        seed: another seed is another draw.

    Raises:
        DataError: if there are too few documents for every split to get one.
    """
    split = np.array([SPLITS.index(name or "train") for name in given], dtype=np.int64)
    rank = np.array([_rank(key, seed) for key in keys])
    for name, share in (("test", test_share), ("validation", validation_share)):
        if name in given:
            continue
        free = split == 0
        chosen = free & (rank < share)
        if free.any() and not chosen.any():
            chosen[np.flatnonzero(free)[rank[free].argmin()]] = True
        split[chosen] = SPLITS.index(name)
        rank -= share  # validation takes the next stretch
    _require_all(split, given)
    return split


def _rank(key: bytes, seed: int) -> float:
    drawn = hashlib.sha256(f"split {seed} ".encode() + key).digest()
    return int.from_bytes(drawn[:6], "big") / 2**48


def _require_all(split: NDArray[np.int64], given: Sequence[str | None]) -> None:
    empty = [name for index, name in enumerate(SPLITS) if not (split == index).any()]
    if not empty:
        return
    what = "documents, all with a split of their own" if all(given) else "distinct documents"
    raise DataError(
        f"{len(split)} {what}, leave nothing for {' and '.join(empty)}; give more text, so that "
        "each of train, validation and test gets a document"
    )
