"""What is recorded of one MoE block over calibration data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moekit.errors import CheckpointError, SpecError
from moekit.routing import Routing
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class Needs:
    """What is recorded beside the routers' counts, weights and logits, which cost little.

    Attributes:
        norms: the norms of the outputs of the experts that tokens chose; runs those once more.
        means: the mean output of every expert over all tokens; runs every expert on every token.
        samples: how many router inputs a block are kept.
    """

    norms: bool = False
    means: bool = False
    samples: int = 256

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.norms or other.norms,
            self.means or other.means,
            max(self.samples, other.samples),
        )


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the tokens of the calibration data, padding left out.

    Sums are in float64, and the router's decisions are its own, never taken again from its logits.

    Attributes:
        tokens: number of tokens N.
        count_E: tokens that chose each expert.
        weight_E: sum of the weights that they gave it.
        gram_EE: products of the logits of every two experts, summed over tokens: ``Zᵀ Z`` of the
            logits Z (N, E).
        norm_E: sum of the output norms of each expert over the tokens that chose it; or None.
        weighted_norm_E: the same, each norm times its token's weight; or None.
        mean_ED: mean output of each expert over all tokens, or None.
        input_SD: router inputs of a random sample of tokens, in no order.
    """

    tokens: int
    count_E: Tensor
    weight_E: Tensor
    gram_EE: Tensor
    norm_E: Tensor | None
    weighted_norm_E: Tensor | None
    mean_ED: Tensor | None
    input_SD: Tensor

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.count_E.numel()

    def logit_similarity(self, center: bool = False) -> Tensor:
        """Cosines of the logits of every two experts over the tokens (E, E).

        Args:
            center: take the mean over experts off each token's logits first, so that a constant
                added to all of them, which changes no routing, changes nothing.
        """
        gram_EE = self.gram_EE
        if center:
            experts = gram_EE.shape[0]
            off_EE = torch.eye(experts, dtype=gram_EE.dtype) - 1 / experts
            gram_EE = off_EE @ gram_EE @ off_EE
        length_E = gram_EE.diagonal().clamp_min(0).sqrt()
        length_EE = length_E[:, None] * length_E
        cosine_EE = torch.where(length_EE > 0, gram_EE / length_EE, 0.0).clamp(-1, 1)
        return cosine_EE.fill_diagonal_(1.0)

    def require_of(self, view: BlockView) -> None:
        """Refuse statistics of a block of another shape.

        Raises:
            SpecError: they are not of this number of experts and this width.
        """
        own, wanted = (self.experts, self.input_SD.shape[1]), tuple(view.router.weight.shape)
        if own != wanted:
            raise SpecError(
                f"{view.name} has {wanted[0]} experts of width {wanted[1]}, and these statistics "
                f"are of {own[0]} of width {own[1]}; record them with this model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for a file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tokens"] = torch.tensor(self.tokens)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> BlockStatistics:
        """The statistics that :meth:`tensors` gave."""
        values: dict[str, Any] = {f.name: tensors.get(f.name) for f in fields(cls)}
        return cls(**values | {"tokens": int(tensors["tokens"])})


class BlockRecorder:
    """Sums up what the router of one block is given and decides, call by call.

    Args:
        view: the block.
        needs: what to record.
        seed: draws the sample of router inputs.
    """

    def __init__(self, view: BlockView, needs: Needs, seed: int = 0) -> None:
        self.view = view
        self.needs = needs
        self._tokens = 0
        experts = view.experts
        self._count_E = torch.zeros(experts, dtype=torch.int64)
        self._weight_E, self._norm_E, self._weighted_norm_E = (
            torch.zeros(experts, dtype=torch.float64) for _ in range(3)
        )
        self._gram_EE = torch.zeros(experts, experts, dtype=torch.float64)
        self._sum_ED = torch.zeros(experts, view.router.weight.shape[1], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed + view.index)
        self._key_S = torch.empty(0, dtype=torch.float64)
        self._input_SD = torch.empty(0, view.router.weight.shape[1])

    def add(self, x: Tensor, output: Any, valid_N: Tensor) -> None:
        """Count one call of the router.

        Args:
            x: what it was given (..., D).
            output: what it returned.
            valid_N: False for padding.

        Raises:
            CheckpointError: the logits of a token are not finite.
        """
        view = self.view
        routing = view.architecture.read(view.name, output).without_padding(valid_N)
        x_ND = x.flatten(0, -2)[valid_N]
        routing = routing.replace(
            expert_NK=routing.expert_NK[valid_N], weight_NK=routing.weight_NK[valid_N]
        )
        logits_NE = view.logits(x_ND).double()
        if not bool(torch.isfinite(logits_NE).all()):
            raise CheckpointError(
                f"the router of {view.name} gives logits that are not finite; the weights below "
                "it overflow, so load the model in a wider type or mend it"
            )
        self._tokens += x_ND.shape[0]
        self._gram_EE += (logits_NE.T @ logits_NE).cpu()
        self._add_choices(routing)
        if self.needs.norms:
            self._add_norms(x_ND, routing)
        if self.needs.means:
            for expert in range(view.experts):
                y_ND = view.compute(view.expert(expert), x_ND)
                self._sum_ED[expert] += y_ND.double().sum(0).cpu()
        self._sample(x_ND)

    def statistics(self) -> BlockStatistics:
        """What was recorded so far."""
        norms = self.needs.norms
        return BlockStatistics(
            tokens=self._tokens,
            count_E=self._count_E.clone(),
            weight_E=self._weight_E.clone(),
            gram_EE=self._gram_EE.clone(),
            norm_E=self._norm_E.clone() if norms else None,
            weighted_norm_E=self._weighted_norm_E.clone() if norms else None,
            mean_ED=self._sum_ED / max(self._tokens, 1) if self.needs.means else None,
            input_SD=self._input_SD.clone(),
        )

    def _add_choices(self, routing: Routing) -> None:
        used_NK = routing.used_NK
        expert_R = routing.expert_NK[used_NK].cpu()
        weight_R = routing.weight_NK[used_NK].double().cpu()
        self._count_E += expert_R.bincount(minlength=self.view.experts)
        self._weight_E.index_add_(0, expert_R, weight_R)

    def _add_norms(self, x_ND: Tensor, routing: Routing) -> None:
        for expert in range(self.view.experts):
            token_R, slot_R = (routing.expert_NK == expert).nonzero(as_tuple=True)
            if not token_R.numel():
                continue
            y_RD = self.view.compute(self.view.expert(expert), x_ND[token_R])
            norm_R = y_RD.double().norm(dim=-1)
            weight_R = routing.weight_NK[token_R, slot_R].double()
            self._norm_E[expert] += norm_R.sum().cpu()
            self._weighted_norm_E[expert] += (weight_R * norm_R).sum().cpu()

    def _sample(self, x_ND: Tensor) -> None:
        """Keeps the tokens with the smallest random keys, a sample without repetition."""
        key_N = torch.rand(x_ND.shape[0], generator=self._generator, dtype=torch.float64)
        keys, inputs = (
            torch.cat([self._key_S, key_N]),
            torch.cat([self._input_SD, x_ND.cpu().float()]),
        )
        chosen = keys.argsort(stable=True)[: self.needs.samples]
        self._key_S, self._input_SD = keys[chosen], inputs[chosen]
