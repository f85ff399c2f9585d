"""The losses of unlearning, as functions of likelihoods and hidden states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.data.pairs import IGNORED
from moekit.errors import SpecError


def token_nats(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Nats of every predicted token (B, T − 1); 0 where there is none."""
    logits_BTV = logits_BTV[:, :-1]
    if logits_BTV.dtype != torch.float64:
        logits_BTV = logits_BTV.float()
    nats = F.cross_entropy(
        logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none", ignore_index=IGNORED
    )
    return nats.view(target_BT.shape)


def mean_nats(nats_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Mean over the predicted tokens ()."""
    return nats_BT.sum() / (target_BT != IGNORED).sum().clamp_min(1)


def npo_loss(nats_B: Tensor, reference_B: Tensor | None, beta: float) -> Tensor:
    """Negative preference optimisation: ``−(2/β) mean log σ(β (NLL_θ − NLL_ref))``.

    At θ = θ_ref it is ``2 ln 2 / β`` and its gradient is that of gradient ascent on the mean summed
    NLL; further on, each sequence counts ``2 π_θ^β / (π_θ^β + π_ref^β)`` times (Zhang et al. 2024,
    arXiv 2404.05868).

    Args:
        nats_B: negative log-likelihood of each sequence, summed over its tokens.
        reference_B: the same under the frozen model before unlearning.
        beta: inverse temperature.

    Raises:
        SpecError: there is no reference, or it is not frozen.
    """
    _require_frozen(reference_B, "NPO")
    assert reference_B is not None
    return -2 / beta * F.logsigmoid(beta * (nats_B - reference_B)).mean()


def rmu_forget_loss(hidden_ND: Tensor, target_D: Tensor) -> Tensor:
    """Mean squared distance of hidden states from one random direction (Li et al. 2024)."""
    return _mean((_wide(hidden_ND) - target_D).square())


def rmu_retain_loss(hidden_ND: Tensor, reference_ND: Tensor | None) -> Tensor:
    """Mean squared distance of hidden states from those of the frozen model before.

    Raises:
        SpecError: there is no reference, or it is not frozen.
    """
    _require_frozen(reference_ND, "RMU")
    assert reference_ND is not None
    return _mean((_wide(hidden_ND) - _wide(reference_ND)).square())


def _mean(x_ND: Tensor) -> Tensor:
    """The mean; 0 of nothing, which a batch of padding leaves."""
    return x_ND.sum() / max(x_ND.numel(), 1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _require_frozen(reference: Tensor | None, name: str) -> None:
    if reference is None or reference.requires_grad:
        raise SpecError(
            f"{name} compares with the model before unlearning; give what that model, frozen, "
            "makes of the same batch"
        )
