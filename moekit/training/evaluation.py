"""Mean cross-entropy of a language model over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from moekit.errors import DataError

_IGNORED = -100  # as everywhere in transformers


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    max_batches: int | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> float:
    """Mean nats a predicted token, every token weighing the same.

    Draws no random numbers, so evaluating does not change a training run. Where a process group
    is initialised, each rank evaluates its part of the batches and all return the same mean.

    Args:
        model: a causal language model that returns ``cross_entropy`` given ``labels``.
        dataset: items with ``input_ids`` and ``labels`` (T,).
        batch_size: sequences a forward pass.
        max_batches: use only so many batches from the start.
        collate: makes a batch of a list of items.

    Raises:
        DataError: there is nothing to predict.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with _in_eval_mode(model):
        for batch in _batches(dataset, batch_size, max_batches, collate):
            inputs = {name: value.to(device) for name, value in batch.items()}
            targets = predicted_tokens(inputs)
            nats = model(**inputs, use_cache=False).cross_entropy.double() * targets
            total += torch.stack([torch.where(targets > 0, nats, 0.0), targets.double()])
    if _distributed():
        dist.all_reduce(total)
    if total[1] == 0:
        raise DataError("there is nothing to evaluate: the data set holds no token to predict")
    return float(total[0] / total[1])


def predicted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens of a batch are predicted ()."""
    return (shifted_labels(batch) != _IGNORED).sum()


def shifted_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The label (B, T) that each position of a batch predicts, -100 for none.

    The first token of a sequence is nobody's target, with padding on its left or without.
    """
    labels = batch.get("shift_labels")
    if labels is None:
        labels = nn.functional.pad(batch["labels"][..., 1:], (0, 1), value=_IGNORED)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(~mask.bool(), _IGNORED)


def _batches(
    dataset: Any,
    size: int,
    limit: int | None,
    collate: Callable[[list[Any]], Any],
) -> Iterator[dict[str, Tensor]]:
    """This rank's batches."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    starts = range(0, len(dataset), size)[:limit]
    for start in starts[rank::ranks]:
        stop = min(start + size, len(dataset))
        yield collate([dataset[index] for index in range(start, stop)])


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
