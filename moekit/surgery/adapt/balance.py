"""The balance loss of mixtures of LoRA experts, and where tokens of each domain go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.errors import SignalError, SpecError
from moekit.surgery.adapt.mixture import Mixed, MixtureRouter


def mole_loss(
    model: nn.Module, attention_mask: Tensor | None = None, pooled: bool = False
) -> Tensor:
    """The balance loss of the model's last call, without its weight.

    Null experts each count with the mean share of all of them, so that only their sum matters
    (AdaMoE, arXiv 2406.13233, eq. of the null-aware loss).

    ``mean_b Σ_e c_be p_be``, with c the share of a sequence's tokens (and slots) that chose an
    expert, without gradient, and p its mean probability: 1 / E at perfect balance (LLaVA-MoLE,
    official code, where it is not multiplied by E). Router by router, then their mean.

    Args:
        model: with mixtures installed; it has been called in this step.
        attention_mask: (B, T), 0 for padding, which is left out.
        pooled: take c and p over all layers together first, as the official code does.

    Raises:
        SpecError: the model has no mixtures.
        SignalError: the mask is of another shape, or leaves nothing of a sequence; or the model has
            not been called yet.
    """
    shares = []
    for path, router in routers_of(model).items():
        mixed = _mixed(path, router)
        valid_BT1 = _valid(path, mixed, attention_mask)
        chosen_NE = F.one_hot(mixed.expert_NK, mixed.probability_NE.shape[1]).sum(1)
        chosen_NE = chosen_NE / mixed.expert_NK.shape[1]
        c_BE = _of_nulls(_mean(chosen_NE, valid_BT1), router.spec.experts)
        shares.append((c_BE, _mean(mixed.probability_NE, valid_BT1)))
    c_LBE, p_LBE = (torch.stack(parts) for parts in zip(*shares, strict=True))
    if pooled:
        c_LBE, p_LBE = c_LBE.mean(0), p_LBE.mean(0)
    return (c_LBE.detach() * p_LBE).sum(-1).mean()


def _of_nulls(c_BE: Tensor, experts: int) -> Tensor:
    """Each null expert with the mean share of all."""
    if c_BE.shape[1] == experts:
        return c_BE
    null_B1 = c_BE[:, experts:].mean(1, keepdim=True)
    return torch.cat([c_BE[:, :experts], null_B1.expand(-1, c_BE.shape[1] - experts)], 1)


def routers_of(model: nn.Module) -> dict[str, MixtureRouter]:
    """The routers of a model's mixtures, by path.

    Raises:
        SpecError: it has none.
    """
    found = {p: m for p, m in model.named_modules() if isinstance(m, MixtureRouter)}
    if not found:
        raise SpecError("the model has no mixture of LoRA experts; install one with experts > 1")
    return found


def _mixed(path: str, router: MixtureRouter) -> Mixed:
    if router.mixed is None:
        raise SignalError(f"{path} has routed nothing yet; call the model first")
    return router.mixed


def _valid(path: str, mixed: Mixed, mask_BT: Tensor | None) -> Tensor:
    """True for tokens that count, (B, T, 1)."""
    tokens = len(mixed.probability_NE)
    if mask_BT is None:
        shape = mixed.shape if len(mixed.shape) == 2 else (1, tokens)
        return torch.ones(*shape, 1, dtype=torch.bool, device=mixed.probability_NE.device)
    if mask_BT.ndim != 2 or mask_BT.numel() != tokens:
        raise SignalError(
            f"attention_mask has shape {tuple(mask_BT.shape)}; {path} routed {mixed.shape}; "
            "wanted one entry a token, (B, T)"
        )
    valid_BT = mask_BT.bool().to(mixed.probability_NE.device)
    if not bool(valid_BT.any(1).all()):
        raise SignalError(
            f"attention_mask leaves nothing of sequence {int(valid_BT.any(1).int().argmin())} for "
            f"{path}; leave such a sequence out of the batch"
        )
    return valid_BT[..., None]


def _mean(value_NE: Tensor, valid_BT1: Tensor) -> Tensor:
    """Each sequence's mean over its tokens, (B, E)."""
    value_BTE = value_NE.view(*valid_BT1.shape[:2], -1)
    return (value_BTE * valid_BT1).sum(1) / valid_BT1.sum(1)


@dataclass(frozen=True)
class LayerRouting:
    """Where one layer sent the tokens of each domain.

    Attributes:
        router: its path.
        share_DE: of each domain's choices, the share that fell on each expert; null experts are
            one, behind the others.
        information: mutual information of domain and expert over the entropy of the domain: 0 if
            experts tell nothing of it, 1 if they tell it.
    """

    router: str
    share_DE: tuple[tuple[float, ...], ...]
    information: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@torch.no_grad()
def routing_report(
    model: nn.Module, batch: dict[str, Tensor], domain_ids: Sequence[int]
) -> list[LayerRouting]:
    """Which experts the tokens of each domain use, layer by layer.

    Args:
        model: with mixtures installed; it is called once, in evaluation mode.
        batch: what to call it with: ``input_ids`` (B, T), perhaps ``attention_mask``, whose 0
            entries are left out.
        domain_ids: the domain of each sequence, 0 to D - 1.

    Raises:
        SpecError: the model has no mixtures.
        SignalError: there is not one domain a sequence.
    """
    routers, training = routers_of(model), model.training
    model.eval()
    try:
        model(**batch)
    finally:
        model.train(training)
    domain_B = torch.as_tensor(domain_ids)
    found = []
    for path, router in routers.items():
        mixed = _mixed(path, router)
        valid_BT = _valid(path, mixed, batch.get("attention_mask"))[..., 0].cpu()
        if domain_B.shape != valid_BT.shape[:1]:
            raise SignalError(
                f"domain_ids has {len(domain_B)} entries for {len(valid_BT)} sequences; wanted one "
                "each"
            )
        domain_N = domain_B[:, None].expand_as(valid_BT)[valid_BT]
        spec = router.spec
        expert_NK = mixed.expert_NK.cpu()[valid_BT.flatten()].clamp_max(spec.experts)
        found.append(layer_routing(path, domain_N, expert_NK, spec.experts + min(spec.null, 1)))
    return found


def layer_routing(path: str, domain_N: Tensor, expert_NK: Tensor, experts: int) -> LayerRouting:
    """The same of one layer, from each token's domain and experts."""
    slots = expert_NK.shape[1]
    pair_NK = domain_N[:, None] * experts + expert_NK
    domains = int(domain_N.max()) + 1
    count_DE = pair_NK.flatten().bincount(minlength=domains * experts).view(domains, experts)
    share_DE = count_DE / count_DE.sum(1, keepdim=True).clamp_min(1)
    joint_DE = count_DE.double() / (len(domain_N) * slots)
    p_D, p_E = joint_DE.sum(1), joint_DE.sum(0)
    known = _entropy(p_D) + _entropy(p_E) - _entropy(joint_DE.flatten())
    whole = _entropy(p_D)
    information = float(known / whole) if whole > 0 else 0.0
    return LayerRouting(path, tuple(map(tuple, share_DE.tolist())), information)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum()
