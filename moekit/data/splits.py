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
    Of few documents each split gets at least one: the lowest hashes are held out.

    Args:
        keys: ``content_key`` of each document, no two alike.
        given: the split that the source gives each, or ``None``.
        validation_share: share of documents for validation.
        test_share: share of documents for test; 0 for no test split but what is given.
        seed: another seed is another draw.

    Raises:
        DataError: if there are too few documents for every split to get one.
    """
    drawn = [
        (name, share)
        for name, share in (("test", test_share), ("validation", validation_share))
        if share and name not in given
    ]
    split = np.array([SPLITS.index(name or "train") for name in given], dtype=np.int64)
    rank = np.array([_rank(key, seed) for key in keys])
    _require_enough(int((split == 0).sum()), [name for name, _ in drawn], given)
    edge = 0.0
    for place, (name, share) in enumerate(drawn):
        edge += share
        free = np.flatnonzero(split == 0)
        still_needed = len(drawn) - place  # by the splits after this one, training among them
        count = np.clip((rank[free] < edge).sum(), 1, len(free) - still_needed)
        split[free[np.argsort(rank[free], kind="stable")[:count]]] = SPLITS.index(name)
    return split


def _rank(key: bytes, seed: int) -> float:
    drawn = hashlib.sha256(f"split {seed} ".encode() + key).digest()
    return int.from_bytes(drawn[:6], "big") / 2**48


def _require_enough(free: int, drawn: list[str], given: Sequence[str | None]) -> None:
    if free > len(drawn):
        return
    wanting = " and ".join([", ".join(["train", *drawn[1:]]), *drawn[:1]])
    what = "documents not held out" if any(given) else "distinct documents"
    raise DataError(f"{free} {what} are too few for {wanting}, which need one each; give more text")
