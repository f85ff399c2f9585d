"""The dense oracle: every expert on every token, one at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.dispatch import MergedDispatch
from moekit.experts import (
    AttentionHeadsExperts,
    ConstantExperts,
    CopyExperts,
    Experts,
    ExpertsBank,
    FeedForwardExperts,
    LinearExperts,
    ZeroExperts,
)
from moekit.layer import MoE
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
    if isinstance(bank, FeedForwardExperts | LinearExperts):
        return [_expert(bank, only_E, x_ND) for only_E in torch.eye(len(bank.kinds)).double()]
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


def _expert(bank: Experts, weight_E: Tensor, x_ND: Tensor) -> Tensor:
    """The expert whose parameters are the sum of the bank's with the weights (E,)."""

    def mixed(name: str) -> Tensor:
        value = bank.get_parameter(name).double()
        return sum(w * v for w, v in zip(weight_E.double(), value, strict=True))

    if isinstance(bank, LinearExperts):
        y = x_ND @ mixed("weight").T
        return y if bank.bias is None else y + mixed("bias")
    assert isinstance(bank, FeedForwardExperts)
    kind = type(bank.spec).__name__
    inner = x_ND @ mixed("gate_up_proj" if kind in ("SwiGLU", "GEGLU") else "up_proj").T
    if bank.up_bias is not None:
        inner = inner + mixed("up_bias")
    if kind in ("SwiGLU", "GEGLU"):
        width = inner.shape[1] // 2
        hidden = ACTIVATIONS[kind](inner[:, :width]) * inner[:, width:]
    else:
        hidden = ACTIVATIONS[kind](inner)
    y = hidden @ mixed("down_proj").T
    return y if bank.down_bias is None else y + mixed("down_bias")


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


def merged_output(bank: Experts, x_ND: Tensor, weight_NE: Tensor) -> Tensor:
    """The output of one merged expert a row, and of the experts that are not merged, float64."""
    if isinstance(bank, ExpertsBank):
        shares = weight_NE.split([len(part.kinds) for part in bank.parts], dim=1)
        parts = zip(bank.parts, shares, strict=True)
        return sum(merged_output(part, x_ND, share) for part, share in parts)
    if isinstance(bank, FeedForwardExperts | LinearExperts):
        rows = [_expert(bank, w, x[None]) for w, x in zip(weight_NE, x_ND.double(), strict=True)]
        used_N1 = (weight_NE != 0).any(1, keepdim=True)
        return torch.cat([x_ND.new_zeros(0, bank.out_width).double(), *rows]) * used_N1
    y_NEO = torch.stack(every_expert(bank, x_ND.double()), dim=1)
    return torch.einsum("ne,neo->no", weight_NE, y_NEO)


def layer_output(layer: MoE, x_ND: Tensor, routing: Routing) -> Tensor:
    """What the layer gives for a routing, by brute force, float64 (N, O)."""
    if isinstance(layer.dispatch, MergedDispatch):
        return merged_output(layer.experts, x_ND, weight_matrix(routing))
    return dense_output(layer.experts, x_ND, routing)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    if wanted.numel() == 0:
        return 0.0
    given, wanted = given.detach().double(), wanted.detach().double()
    return float((given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
