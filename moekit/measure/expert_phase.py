"""How long the experts of a model take, and how many rows they compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.layer import MoE
from moekit.models.language import DenseFeedForward


class ExpertPhase:
    """Times the expert phase of every call of a model inside the block.

    The phase is planning, gathering, computing and combining the rows of each MoE layer, its
    shared expert, and each dense feed-forward layer; the router is not in it, and of a mixture of
    attention modules attention itself is. On CUDA the device
    is synchronised before and after each part, so that kernels are timed and not their launches;
    the model as a whole then runs slower than it would.

    Args:
        model: any module with :class:`~moekit.layer.MoE` or dense feed-forward layers inside.

    Attributes:
        seconds: time in the phase.
        tokens: rows that entered the dispatches of MoE layers, each layer counting its own;
            padding included.

    Example:
        >>> from moekit import MoESpec, SwiGLU, TopK
        >>> layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16)).build(width=8)
        >>> with ExpertPhase(layer) as phase:
        ...     _ = layer(torch.randn(10, 8))
        >>> phase.rows_per_token
        2.0
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._model = model
        self._rows: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._started = 0.0

    @property
    def rows_per_token(self) -> float:
        """Rows that reached a product in an MoE layer's experts, a token and layer.

        Shared experts and dense layers, which compute every row, are not counted.
        """
        if self.tokens == 0:
            return 0.0
        return int(torch.stack(self._rows).sum()) / self.tokens

    def __enter__(self) -> ExpertPhase:
        for module in self._model.modules():
            if isinstance(module, MoE):
                self._watch(module.dispatch)
                self._handles.append(module.dispatch.register_forward_hook(self._count))
                if module.shared is not None:
                    self._watch(module.shared)
            elif isinstance(module, DenseFeedForward):
                self._watch(module)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, module: nn.Module) -> None:
        self._handles.append(module.register_forward_pre_hook(self._start))
        self._handles.append(module.register_forward_hook(self._stop))

    def _start(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _synchronise(inputs[0])
        self._started = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _synchronise(inputs[0])
        self.seconds += time.perf_counter() - self._started

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.tokens += inputs[0].shape[0]
        self._rows.append(output.rows_E.sum())


@dataclass(frozen=True)
class ExpertPhaseResult:
    """Forward cost of one model, as the median over repeats.

    Attributes:
        seconds_per_token: time in the expert phase over all layers.
        rows_per_token: product rows of the MoE layers a token and layer.
        share: share of the whole forward pass that the phase takes.
        repeats: expert-phase seconds a token of each repeat, to judge the noise by.
    """

    seconds_per_token: float
    rows_per_token: float
    share: float
    repeats: tuple[float, ...]


@torch.inference_mode()
def compare_expert_phase(
    models: Mapping[str, nn.Module], batches: Sequence[Tensor], repeats: int = 5
) -> dict[str, ExpertPhaseResult]:
    """Time the expert phase of several models on the same tokens.

    The models take turns, and in each repeat another one goes first, so that a machine that warms
    up or slows down is unfair to none. One untimed pass goes before.

    Args:
        models: name to causal language model; run in evaluation mode and left as they were.
        batches: token ids (B, T), on the models' device.
        repeats: timed passes over ``batches``.
    """
    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            _measure(model.eval(), batches)
        runs: dict[str, list[ExpertPhaseResult]] = {name: [] for name in models}
        for repeat in range(repeats):
            for name in _rotated(list(models), repeat):
                runs[name].append(_measure(models[name], batches))
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {name: _median(results) for name, results in runs.items()}


def _measure(model: nn.Module, batches: Sequence[Tensor]) -> ExpertPhaseResult:
    tokens = sum(batch.numel() for batch in batches)
    _synchronise(batches[0])
    start = time.perf_counter()
    with ExpertPhase(model) as phase:
        for batch in batches:
            model(input_ids=batch)
    _synchronise(batches[0])
    whole = time.perf_counter() - start
    seconds = phase.seconds / tokens
    return ExpertPhaseResult(seconds, phase.rows_per_token, phase.seconds / whole, (seconds,))


def _median(results: Sequence[ExpertPhaseResult]) -> ExpertPhaseResult:
    seconds = [result.seconds_per_token for result in results]
    return ExpertPhaseResult(
        seconds_per_token=statistics.median(seconds),
        rows_per_token=statistics.median(result.rows_per_token for result in results),
        share=statistics.median(result.share for result in results),
        repeats=tuple(seconds),
    )


def _rotated(names: list[str], by: int) -> list[str]:
    first = by % max(len(names), 1)
    return names[first:] + names[:first]


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
