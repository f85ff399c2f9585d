"""Watch the routers of a model while it reads: ours, or any of transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moekit.errors import SpecError
from moekit.measure.gates import GateHooks
from moekit.measure.statistics import LayerStatistics, ModelStatistics
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing.routing import Routing


class TokenBlocks(Protocol):
    """A data set of token blocks, such as :class:`moekit.data.PackedDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` (T,), and an ``attention_mask`` (T,) where blocks hold padding."""


@dataclass(frozen=True)
class Observation:
    """What a model routed in one batch; rows are tokens in reading order.

    Attributes:
        token_N: token ids.
        valid_N: False for padding.
        group_N: group of each token, -1 for none; None where the data set has no groups.
        routings: the decision of each MoE layer in order, with no expert for padding.
        statistics: the counts of each MoE layer.
    """

    token_N: Tensor
    valid_N: Tensor
    group_N: Tensor | None
    routings: tuple[Routing, ...]
    statistics: ModelStatistics


@torch.no_grad()
def observe(
    model: nn.Module, dataset: TokenBlocks, batch_size: int = 8, max_batches: int | None = None
) -> Iterator[Observation]:
    """Run a model over blocks of tokens in evaluation mode, and yield what each batch routed.

    Args:
        model: a causal language model of moekit or of transformers.
        dataset: equally long blocks of tokens.
        max_batches: stop after so many batches.

    Raises:
        CheckpointError: the model has no router, or one that cannot be read.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in token_batches(dataset, batch_size, max_batches, device):
            yield _observe(model, batch)
    finally:
        model.train(was_training)


def routing_statistics(
    model: nn.Module, dataset: TokenBlocks, batch_size: int = 8, max_batches: int | None = None
) -> ModelStatistics:
    """The counts of every MoE layer over a data set; arguments and errors as :func:`observe`."""
    total: ModelStatistics | None = None
    for observation in observe(model, dataset, batch_size, max_batches):
        total = observation.statistics if total is None else total + observation.statistics
    return ModelStatistics(()) if total is None else total


@dataclass(frozen=True)
class TokenBatch:
    """Blocks of tokens side by side.

    Attributes:
        token_BT: token ids.
        mask_BT: 0 for padding, or None where there is none.
        group_N: group of each token, -1 for none; None where the data set has no groups.
    """

    token_BT: Tensor
    mask_BT: Tensor | None
    group_N: Tensor | None

    @property
    def valid_N(self) -> Tensor:
        """False for padding."""
        mask_BT = torch.ones_like(self.token_BT) if self.mask_BT is None else self.mask_BT
        return mask_BT.bool().flatten()


def token_batches(
    dataset: TokenBlocks,
    batch_size: int,
    max_batches: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[TokenBatch]:
    """The blocks of a data set in order, ``batch_size`` at a time.

    Raises:
        SpecError: ``batch_size`` is below 1, or ``max_batches`` below 0.
    """
    for indices in batch_indices(len(dataset), batch_size, max_batches):
        yield _collate(dataset, indices, device)


def batch_indices(blocks: int, batch_size: int, max_batches: int | None = None) -> list[range]:
    """The indices of each batch, in order.

    Raises:
        SpecError: as :func:`token_batches`.
    """
    if batch_size < 1:
        raise SpecError(f"batch_size is {batch_size}; wanted at least 1")
    if max_batches is not None and max_batches < 0:
        raise SpecError(f"{max_batches} batches are wanted at most; give 0 or more, or None")
    starts = range(0, blocks, batch_size)[:max_batches]
    return [range(start, min(start + batch_size, blocks)) for start in starts]


def _collate(dataset: TokenBlocks, indices: range, device: torch.device | str) -> TokenBatch:
    blocks = [dataset[index] for index in indices]
    padded = any("attention_mask" in block for block in blocks)
    masks = [
        block.get("attention_mask", torch.ones_like(block["input_ids"]))
        for block in blocks
        if padded
    ]
    groups_of = getattr(dataset, "token_groups", None)
    return TokenBatch(
        token_BT=torch.stack([block["input_ids"] for block in blocks]).to(device),
        mask_BT=torch.stack(masks).to(device) if masks else None,
        group_N=torch.cat([groups_of(i) for i in indices]).to(device) if groups_of else None,
    )


def _observe(model: nn.Module, batch: TokenBatch) -> Observation:
    run = _run_own if isinstance(model, MoEDecoderForCausalLM) else _run_foreign
    routings, statistics = run(model, batch)
    return Observation(
        batch.token_BT.flatten(), batch.valid_N, batch.group_N, tuple(routings), statistics
    )


def _run_own(model: nn.Module, batch: TokenBatch) -> tuple[list[Routing], ModelStatistics]:
    assert isinstance(model, MoEDecoderForCausalLM)
    outputs = model(batch.token_BT, attention_mask=batch.mask_BT, logits_to_keep=1).moe
    kinds = [layer.experts.kinds for layer in model.moe_layers]
    return [output.routing for output in outputs], ModelStatistics.of(outputs, kinds)


def _run_foreign(model: nn.Module, batch: TokenBatch) -> tuple[list[Routing], ModelStatistics]:
    with GateHooks(model) as hooks:
        model(input_ids=batch.token_BT, attention_mask=batch.mask_BT)
    routings = [routing.without_padding(batch.valid_N) for routing in hooks.routings]
    statistics = tuple(LayerStatistics.of_routing(routing) for routing in routings)
    return routings, ModelStatistics(statistics)
