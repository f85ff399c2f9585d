"""What the studies of compression share: calibrate once, compress in memory, measure the loss."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moekit.errors import DataError
from moekit.measure.observe import TokenBlocks
from moekit.surgery import BlockStatistics, Needs, block_views, prune_model, record_model
from moekit.surgery.budget import spread
from moekit.surgery.methods import Method

Blocks = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Compressed:
    """A model with fewer experts.

    Attributes:
        model: the model.
        experts: of each MoE block.
        passed_on: share of the removed experts' part that passes to others, mean over blocks; 0
            where experts are dropped whole.
    """

    model: PreTrainedModel
    experts: tuple[int, ...]
    passed_on: float


def drawn(data: TokenBlocks, count: int, seed: int) -> Blocks:
    """``count`` blocks of a data set by chance, none twice; all of them if there are no more."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:count]
    return [data[index] for index in order.tolist()]


def calibrated(
    model: PreTrainedModel, data: TokenBlocks, methods: Iterable[Method], seed: int = 0
) -> list[BlockStatistics]:
    """Statistics that serve all of the methods."""
    needs = Needs()
    for method in methods:
        needs = needs | method.needs
    return record_model(model, data, needs, batch_size=16, seed=seed)


def compressed(
    model: PreTrainedModel,
    method: Method,
    keep: float,
    statistics_: Sequence[BlockStatistics],
) -> Compressed:
    """A new model with the share ``keep`` of the experts, as ``moekit prune`` writes it."""
    views = block_views(model)
    counts = [round(keep * view.experts) for view in views]
    counts = spread(method, counts, views, statistics_)
    made, plans = prune_model(model, method, counts, statistics_)
    passed = [float(p.transfer_EK.sum(1)[p.removed].mean()) for p in plans if p.removed]
    made.eval()  # type: ignore[no-untyped-call]
    return Compressed(made, tuple(counts), statistics.fmean(passed) if passed else 0.0)


@torch.inference_mode()
def loss_of(model: PreTrainedModel, data: TokenBlocks, batch_size: int = 16) -> float:
    """Mean nats a predicted token over blocks without padding.

    Raises:
        DataError: there is no block.
    """
    if not len(data):
        raise DataError("there is no block of text to measure the loss on; give more text")
    nats, count = 0.0, 0
    for start in range(0, len(data), batch_size):
        rows = range(start, min(start + batch_size, len(data)))
        token_BT = torch.stack([data[row]["input_ids"] for row in rows]).to(model.device)
        logits_BTV = model(input_ids=token_BT, use_cache=False).logits[:, :-1].float()
        target_N = token_BT[:, 1:].flatten()
        nats += float(F.cross_entropy(logits_BTV.flatten(0, 1), target_N, reduction="sum"))
        count += target_N.numel()
    return nats / count
