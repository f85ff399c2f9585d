"""Calibration: the statistics of every MoE block over a user's data, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.data import ProgressHook
from moekit.errors import DataError
from moekit.measure.observe import TokenBatch, TokenBlocks, token_batches
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.recorder_store import RecordingStore
from moekit.surgery.statistics import BlockRecorder, BlockStatistics, Needs
from moekit.surgery.view import BlockView, block_views


def record(
    checkpoint: Checkpoint,
    data: TokenBlocks,
    needs: Needs = Needs(),  # noqa: B008  (a frozen value)
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    work: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: ProgressHook | None = None,
) -> list[BlockStatistics]:
    """The statistics of each MoE block of a checkpoint that need not fit into memory.

    Blocks are loaded one after the other, and each runs over all of the data before the next. At
    its highest the memory is that of one block's weights (or of the embedding, where that is
    larger), of the hidden states of all tokens (tokens, D) once, and of the activations of one
    batch.

    Args:
        checkpoint: the model.
        data: blocks of tokens, with an ``attention_mask`` where they hold padding.
        needs: what to record.
        batch_size: blocks that run together.
        max_batches: use at most so many batches.
        work: folder that keeps what is done, so that the same call goes on after an interruption;
            None keeps nothing. Whoever needs it no longer deletes it.
        device: where to compute.
        seed: draws the sample of router inputs.
        progress: told how far it is.

    Raises:
        DataError: there is no token that is not padding.
        CheckpointError: a tensor is damaged or not finite, or a router's logits are not finite.
    """
    batches = _batches_of(data, batch_size, max_batches)
    model = BlockwiseModel(checkpoint, device)
    store = RecordingStore.of(work, checkpoint, [needs, seed, _fingerprint(batches)])
    tell = _Teller(progress, len(model.layers) * len(batches))
    done, found, states = store.load()
    if states is None:
        states = model.embed(batches)
    for index in range(done, len(model.layers)):
        view = model.blocks[index]
        with model.loaded(index), _recording(view, needs, seed) as recorder:
            for number, batch in enumerate(batches):
                recorder.valid_N = batch.valid_N
                states[number] = model.step(index, batch, states[number])
                tell(index, index * len(batches) + number + 1)
        found += [] if recorder.block is None else [recorder.block.statistics()]
        store.save(index + 1, found, states)
    return found


def record_model(
    model: PreTrainedModel,
    data: TokenBlocks,
    needs: Needs = Needs(),  # noqa: B008  (a frozen value)
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    seed: int = 0,
) -> list[BlockStatistics]:
    """:func:`record` of a model that is in memory; its mode and weights are left as they were."""
    batches = _batches_of(data, batch_size, max_batches)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with ExitStack() as stack, torch.inference_mode():
            views = block_views(model)
            recorders = [stack.enter_context(_recording(v, needs, seed)) for v in views]
            for batch in batches:
                for recorder in recorders:
                    recorder.valid_N = batch.valid_N.to(model.device)
                mask = None if batch.mask_BT is None else batch.mask_BT.to(model.device)
                model.base_model(input_ids=batch.token_BT.to(model.device), attention_mask=mask)
    finally:
        model.train(was_training)
    return [r.block.statistics() for r in recorders if r.block is not None]


class _Hook:
    """Listens to the router of a block; to nothing where there is no block.

    Attributes:
        block: what adds up the calls.
        valid_N: False for padding, of the batch at work.
    """

    def __init__(self, block: BlockRecorder | None) -> None:
        self.block = block
        self.valid_N: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        assert self.block is not None
        assert self.valid_N is not None
        x = args[0].detach()
        self.block.add(x, output, self.valid_N.to(x.device))


@contextmanager
def _recording(view: BlockView | None, needs: Needs, seed: int) -> Iterator[_Hook]:
    if view is None:
        yield _Hook(None)
        return
    hook = _Hook(BlockRecorder(view, needs, seed))
    handle = view.architecture.router_module(view.block).register_forward_hook(hook)
    try:
        yield hook
    finally:
        handle.remove()


class _Teller:
    """Tells a progress bar which block is at work."""

    def __init__(self, progress: ProgressHook | None, total: int) -> None:
        self.progress = progress
        self.total = total

    def __call__(self, block: int, done: int) -> None:
        if self.progress is not None:
            self.progress(f"recording block {block}", done, self.total)


def _batches_of(data: TokenBlocks, batch_size: int, max_batches: int | None) -> list[TokenBatch]:
    batches = list(token_batches(data, batch_size, max_batches))
    if not any(bool(batch.valid_N.any()) for batch in batches):
        raise DataError("there is no token to calibrate with; give text, or more batches of it")
    return batches


def _fingerprint(batches: Sequence[TokenBatch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.token_BT.numpy().tobytes())
        digest.update(batch.valid_N.numpy().tobytes())
        digest.update(str(tuple(batch.token_BT.shape)).encode())
    return digest.hexdigest()
