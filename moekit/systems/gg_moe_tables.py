"""Tables for GG MoE's experiment: scikit-learn's, split and prepared as the released code does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.errors import MissingExtraError

TABLES = ("digits", "breast cancer", "wine", "diabetes")
JITTER = 1e-5


@dataclass(frozen=True)
class Split:
    """Three parts of a table.

    Attributes:
        train_x, validation_x, test_x: columns, each made normal by its quantiles in training.
        train_y, validation_y, test_y: classes, or a number in units of its deviation in training.
        outputs: number of classes; 1 for a number.
    """

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int

    def to(self, device: str) -> Split:
        """The split on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Split(**moved)


def load_table(name: str, seed: int) -> Split:
    """Split a table at random, 60% to train on, 20% to choose by, 20% to test.

    Everything is fitted on the training part. Its columns are jittered before their quantiles are
    taken, so that steps between equal values do not count.

    Raises:
        MissingExtraError: scikit-learn, which ships the tables, is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.preprocessing import QuantileTransformer
    except ImportError:
        raise MissingExtraError(
            "the tables come with scikit-learn, which is not installed; "
            'run pip install "moekit[experiments]"'
        ) from None
    found = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    columns, wanted = np.asarray(found.data, dtype=np.float64), np.asarray(found.target)
    random = np.random.default_rng(seed)
    order = random.permutation(len(wanted))
    first, second = round(0.6 * len(order)), round(0.8 * len(order))
    parts = np.split(order, [first, second])
    train = columns[parts[0]]
    transformer = QuantileTransformer(
        n_quantiles=max(min(len(train) // 30, 1000), 10),
        output_distribution="normal",
        subsample=None,
        random_state=seed,
    ).fit(train + random.normal(0, JITTER, train.shape) * train.std(0))
    xs = [torch.from_numpy(transformer.transform(columns[part])).float() for part in parts]
    ys, outputs = _wanted(wanted, parts)
    return Split(xs[0], ys[0], xs[1], ys[1], xs[2], ys[2], outputs)


def _wanted(wanted: Any, parts: list[Any]) -> tuple[list[Tensor], int]:
    if wanted.dtype.kind == "f":
        train = wanted[parts[0]]
        scaled = (wanted - train.mean()) / train.std()
        return [torch.from_numpy(scaled[part]).float() for part in parts], 1
    classes = torch.from_numpy(wanted).long()
    return [classes[torch.from_numpy(part)] for part in parts], int(classes.max()) + 1
