"""What a trained model does on held-out text: its loss, by group too, and its routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.data import TextData
from moekit.measure import ModelStatistics
from moekit.models.language import MoEDecoderForCausalLM


@dataclass(frozen=True)
class Survey:
    """Measurements on a whole split.

    Attributes:
        loss: mean cross-entropy in nats a target token.
        statistics: routing statistics, see :class:`moekit.measure.ModelStatistics`; empty for a
            model without MoE layers.
        group_losses: the loss of each group's tokens, where documents have groups.
    """

    loss: float
    statistics: dict[str, Any]
    group_losses: dict[str, float]


@torch.no_grad()
def survey(model: MoEDecoderForCausalLM, data: TextData, batch_size: int) -> Survey:
    """Run the validation split once in evaluation mode."""
    nn.Module.eval(model)
    dataset, groups = data.validation, len(data.groups)
    sums_G = torch.zeros(groups + 1, dtype=torch.float64)
    counts_G = torch.zeros(groups + 1, dtype=torch.float64)
    statistics: ModelStatistics | None = None
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        ids_BT = torch.stack([dataset[i]["input_ids"] for i in rows]).to(model.device)
        group_BT = torch.stack([dataset.token_groups(i) for i in rows])
        output = model(input_ids=ids_BT)
        losses_N = _target_losses(output.logits, ids_BT).double().cpu()
        group_N = group_BT[:, 1:].flatten() + 1  # -1 stands for no group
        sums_G.index_add_(0, group_N, losses_N)
        counts_G.index_add_(0, group_N, torch.ones_like(losses_N))
        if output.moe:
            kinds = [layer.experts.kinds for layer in model.moe_layers]
            own = ModelStatistics.of(output.moe, kinds)
            statistics = own if statistics is None else statistics + own
    return Survey(
        loss=float(sums_G.sum() / counts_G.sum()),
        statistics={} if statistics is None else statistics.summary(),
        group_losses={
            name: float(sums_G[i + 1] / counts_G[i + 1])
            for i, name in enumerate(data.groups)
            if counts_G[i + 1] > 0
        },
    )


def _target_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy of every target, flattened (B · (T - 1))."""
    predicted = logits_BTV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, ids_BT[:, 1:].flatten(), reduction="none")
