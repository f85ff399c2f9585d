"""The dense oracle: every expert on every token, one at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.experts import (
    AttentionHeadsExperts,
    ConstantExperts,
    CopyExperts,
    Experts,
    ExpertsBank,
    FeedForwardExperts,
    ZeroExperts,
)
from moekit.routing import Routing

ACTIVATIONS = {
    "SwiGLU": lambda z: z * torch.sigmoid(z),
    "GEGLU": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "GELU": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "ReLU": lambda z: z.clamp_min(0),
}


def every_expert(bank: Experts, x_ND: Tensor) -> list[Tensor]:
    """The outputs (N, O) of each expert of ``bank`` on every row."""
    if isinstance(bank, ExpertsBank):
        return [y for part in bank.parts for y in every_expert(part, x_ND)]  # type: ignore[arg-type]
    if isinstance(bank, FeedForwardExperts):
        return [_feed_forward(bank, e, x_ND) for e in range(len(bank.kinds))]
    if isinstance(bank, AttentionHeadsExperts):  # without attention: two linear maps
        maps = zip(bank.query_proj.double(), bank.output_proj.double(), strict=True)
        return [x_ND @ query.T @ output.T for query, output in maps]
    if isinstance(bank, ConstantExperts):
        return [_constant(bank, e, x_ND) for e in range(len(bank.kinds))]
    if isinstance(bank, CopyExperts):
        return [x_ND for _ in bank.kinds]
    if isinstance(bank, ZeroExperts):
        return [torch.zeros_like(x_ND) for _ in bank.kinds]
    raise AssertionError(f"the oracle does not know {type(bank).__name__}")


def _feed_forward(bank: FeedForwardExperts, e: int, x_ND: Tensor) -> Tensor:
    kind = type(bank.spec).__name__
    up = bank.get_parameter("gate_up_proj" if kind in ("SwiGLU", "GEGLU") else "up_proj")[e]
    inner = x_ND @ up.double().T
    if bank.up_bias is not None:
        inner = inner + bank.up_bias[e].double()
    if kind in ("SwiGLU", "GEGLU"):
        width = inner.shape[1] // 2
        hidden = ACTIVATIONS[kind](inner[:, :width]) * inner[:, width:]
    else:
        hidden = ACTIVATIONS[kind](inner)
    y = hidden @ bank.down_proj[e].double().T
    return y if bank.down_bias is None else y + bank.down_bias[e].double()


def _constant(bank: ConstantExperts, e: int, x_ND: Tensor) -> Tensor:
    mix = bank.mix_proj[e].double()
    a = torch.exp(x_ND @ mix[0])
    b = torch.exp(x_ND @ mix[1])
    share = (a / (a + b))[:, None]
    return share * x_ND + (1 - share) * bank.constant[e].double()


def weight_matrix(routing: Routing) -> Tensor:
    """The combine weights (N, E), in float64, read slot by slot."""
    rows = []
    for n in range(routing.tokens):
        row = [torch.zeros((), dtype=torch.float64) for _ in range(routing.experts)]
        for k in range(routing.expert_NK.shape[1]):
            e = int(routing.expert_NK[n, k])
            if e >= 0:
                row[e] = row[e] + routing.weight_NK[n, k].double()
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else torch.zeros(0, routing.experts, dtype=torch.float64)


def dense_output(bank: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """The layer's output by brute force, float64 (N, O)."""
    y_NEO = torch.stack(every_expert(bank, x_ND.double()), dim=1)
    return torch.einsum("ne,neo->no", weight_matrix(routing), y_NEO)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    if wanted.numel() == 0:
        return 0.0
    given, wanted = given.detach().double(), wanted.detach().double()
    return float((given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
