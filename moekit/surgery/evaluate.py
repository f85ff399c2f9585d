"""What a checkpoint is worth and costs, block by block: perplexity and the time of its experts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.data import ProgressHook
from moekit.errors import DataError
from moekit.measure.observe import TokenBlocks, token_batches
from moekit.measure.perplexity import summed_nats
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint did with held-out text.

    Attributes:
        loss: mean nats a predicted token.
        tokens: predicted tokens; padding and the first token of a block are not.
        expert_seconds_per_token: time in the routed experts of all blocks, for each block the
            median over the batches, padding included.
        parameters: of the whole model, tied ones once.
        bytes: of the stored tensors.
    """

    loss: float
    tokens: int
    expert_seconds_per_token: float
    parameters: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    checkpoint: Checkpoint,
    data: TokenBlocks,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    device: str = "cpu",
    progress: ProgressHook | None = None,
    description: str = "evaluating",
) -> Evaluation:
    """Run a checkpoint over held-out text in about the memory of one block, see :func:`record`.

    Raises:
        DataError: no token is predicted.
    """
    batches = list(token_batches(data, batch_size, max_batches))
    model = BlockwiseModel(checkpoint, device)
    states = model.embed(batches) if batches else []
    seconds, done, total = 0.0, 0, (len(model.layers) + 1) * len(batches)
    for index in range(len(model.layers)):
        with model.loaded(index), _timing(model, index) as spans:
            for number, batch in enumerate(batches):
                states[number] = model.step(index, batch, states[number])
                done += 1
                _tell(progress, description, done, total)
        if spans:
            seconds += statistics.median(spans)
    losses, count = 0.0, 0
    with model.head():
        for batch, state in zip(batches, states, strict=True):
            loss, predicted = summed_nats(model.logits(batch, state), batch)
            losses, count, done = losses + loss, count + predicted, done + 1
            _tell(progress, description, done, total)
    if count == 0:
        raise DataError("the held-out text has no token to predict; give more of it")
    skeleton = checkpoint.skeleton()
    return Evaluation(
        loss=losses / count,
        tokens=count,
        expert_seconds_per_token=seconds,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        bytes=sum(tensor.bytes for tensor in checkpoint.stored.values()),
    )


@contextmanager
def _timing(model: BlockwiseModel, index: int) -> Iterator[list[float]]:
    """Seconds a token of every call of the routed experts of a layer."""
    view, spans = model.blocks[index], list[float]()
    if view is None:
        yield spans
        return
    started = [0.0]

    def start(_: nn.Module, args: tuple[Any, ...]) -> None:
        _wait(args[0])
        started[0] = time.perf_counter()

    def stop(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        _wait(args[0])
        spans.append((time.perf_counter() - started[0]) / max(args[0].shape[0], 1))

    experts = view.architecture.experts_module(view.block)
    handles = [experts.register_forward_pre_hook(start), experts.register_forward_hook(stop)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _tell(progress: ProgressHook | None, description: str, done: int, total: int) -> None:
    if progress is not None:
        progress(description, done, total)
