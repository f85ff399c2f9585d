"""The balance loss of LoRA mixtures: at known places, by a loop, and in the model's own loss."""

from __future__ import annotations

import pytest
import torch
from test_adapt_mixture import SPEC, adapted, llama, tokens
from torch import Tensor, nn

from moekit.surgery.adapt import MixtureRouter, adapter_parameters, install_adapter, mole_loss
from moekit.surgery.adapt.mixture import Mixed


def of_routers(model: nn.Module, probability_LNE: Tensor, shape: tuple[int, int]) -> None:
    """Put a made-up routing in place of the last call's."""
    routers = [m for m in model.modules() if isinstance(m, MixtureRouter)]
    for router, probability_NE in zip(routers, probability_LNE, strict=True):
        expert_NK = probability_NE.argmax(-1, keepdim=True)
        router.mixed = Mixed(shape, probability_NE, expert_NK, None)


def test_the_balance_loss_at_known_places() -> None:
    model = install_adapter(llama(), SPEC.replace(experts=2))
    even = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    even = even + torch.tensor([[1e-7, 0.0], [0.0, 1e-7]])  # each chosen once, p uniform
    of_routers(model, even.expand(2, 2, 2), (1, 2))
    for pooled in (False, True):
        assert float(mole_loss(model, pooled=pooled)) == pytest.approx(1 / 2, abs=1e-6)
    collapsed = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).expand(2, 4, 2)
    of_routers(model, collapsed, (1, 4))
    assert float(mole_loss(model)) == 1.0
    assert float(mole_loss(model, pooled=True)) == 0.5


@pytest.mark.parametrize("pooled", [False, True])
def test_the_balance_loss_is_a_mean_over_sequences(pooled: bool) -> None:
    model = install_adapter(llama(), SPEC)
    p_LBTE = torch.rand(2, 3, 5, 3, generator=torch.Generator().manual_seed(4)).softmax(-1)
    mask_BT = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 4 + [1]])
    of_routers(model, p_LBTE.flatten(1, 2), (3, 5))
    total = 0.0
    for b in range(3):
        kept = [t for t in range(5) if mask_BT[b, t]]
        shares, means = [], []
        for layer in range(2):
            p = torch.stack([p_LBTE[layer, b, t] for t in kept])
            shares.append(torch.bincount(p.argmax(-1), minlength=3) / len(kept))
            means.append(p.mean(0))
        if pooled:
            total += float(sum(shares) / 2 @ (sum(means) / 2))
        else:
            total += sum(float(c @ p) for c, p in zip(shares, means, strict=True)) / 2
    assert float(mole_loss(model, mask_BT, pooled)) == pytest.approx(total / 3, rel=1e-6)


def test_the_models_loss_has_the_balance_loss_in_training_only() -> None:
    model = adapted(SPEC.replace(balance=0.5))
    model.eval()
    plain = float(model(input_ids=tokens(), labels=tokens()).loss.detach())
    model.train()
    loss = float(model(input_ids=tokens(), labels=tokens()).loss.detach())
    assert loss == pytest.approx(plain + 0.5 * float(mole_loss(model).detach()), rel=1e-5)


def test_the_balance_loss_is_there_however_the_model_is_called() -> None:
    model = adapted(SPEC.replace(balance=5.0)).train()
    mask_BT = torch.ones_like(tokens())
    mask_BT[0, 5:] = 0
    labels_BT = tokens().masked_fill(mask_BT == 0, -100)
    named = model(input_ids=tokens(), attention_mask=mask_BT, labels=labels_BT).loss
    placed = model(tokens(), mask_BT, labels=labels_BT, return_dict=False)
    torch.testing.assert_close(placed[0], named)
    without = model(tokens(), labels=labels_BT).loss
    assert abs(float(without.detach() - named.detach())) > 1e-3
    assert getattr(model(tokens()), "loss", None) is None


def test_padding_changes_neither_loss_nor_gradients() -> None:
    found = []
    for padding in (0, 4):
        model = adapted(SPEC.replace(balance=1.0)).train()
        ids_BT = torch.nn.functional.pad(tokens(), (0, padding))
        mask_BT = torch.nn.functional.pad(torch.ones_like(tokens()), (0, padding))
        labels_BT = torch.nn.functional.pad(tokens(), (0, padding), value=-100)
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
        loss.backward()
        found.append([loss, *(p.grad for p in adapter_parameters(model).values())])
    for short, padded in zip(*found, strict=True):
        torch.testing.assert_close(short, padded, rtol=1e-4, atol=1e-6)
