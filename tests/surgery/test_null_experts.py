"""Null experts grafted on a trained decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit import (
    Bank,
    Copy,
    MoESpec,
    NullAwareBalance,
    Pathway,
    ReLURouting,
    RouterZ,
    SwiGLU,
    SwitchBalance,
    TopK,
    Zero,
)
from moekit.errors import SpecError
from moekit.measure import routing_statistics
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.surgery import add_null_experts

WIDTH, EXPERTS, VOCABULARY = 32, 4, 64
BANK = SwiGLU(count=EXPERTS, hidden=24)
LAYER = MoESpec(TopK(k=2), BANK, losses=(SwitchBalance(0.01), RouterZ(1e-3)))
LOSS = NullAwareBalance(0.02)


def decoder(*layers: Any) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    config = MoEDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        layers=list(layers),
    )
    return MoEDecoderForCausalLM(config).eval()


class Blocks:
    """Random tokens."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(VOCABULARY, (50,), generator=generator)}


@pytest.mark.parametrize(("count", "k"), [(4, 3), (8, 3), (4, 2), (12, 6)])
def test_the_load_starts_near_its_target(count: int, k: int) -> None:
    grown = add_null_experts(decoder(LAYER, LAYER), count, k, LOSS)
    found = routing_statistics(grown, Blocks()).summary()
    target = k * EXPERTS / (EXPERTS + count)
    for layer in found["layers"]:
        # Twins are within a thousandth of each other, so which comes first is a coin toss.
        assert layer["feed_forward_experts_per_token"] == pytest.approx(target, abs=0.15)


def test_the_true_experts_and_their_logits_are_unchanged() -> None:
    model = decoder(LAYER, SwiGLU(count=1, hidden=24), LAYER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = add_null_experts(model, 8, 3, LOSS)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())
    x_ND = torch.randn(100, WIDTH)
    for old, new in zip(model.moe_layers, grown.moe_layers, strict=True):
        old_NE, new_NE = old.router(x_ND).logits_NE, new.router(x_ND).logits_NE
        # Products of other shapes add up in another order; the weights themselves are equal.
        torch.testing.assert_close(new_NE[:, :EXPERTS], old_NE, rtol=1e-5, atol=1e-5)
        assert new.router.weight[:EXPERTS].equal(old.router.weight)
        for twin in (new_NE[:, EXPERTS : 2 * EXPERTS], new_NE[:, 2 * EXPERTS :]):
            assert not twin.equal(old_NE)
            torch.testing.assert_close(twin, old_NE, rtol=0, atol=1e-2)
        for one, other in zip(old.experts.parameters(), new.experts.parameters(), strict=True):
            assert one.equal(other)
    kept = [name for name in before if "mlp" not in name or "layers.1." in name]
    assert len(kept) > 10
    assert all(grown.state_dict()[name].equal(before[name]) for name in kept)


def test_the_spec_of_the_result() -> None:
    grown = add_null_experts(decoder(LAYER, SwiGLU(count=1, hidden=24)), 8, 3, LOSS)
    first, second = grown.config.layer_specs
    assert first == MoESpec(
        TopK(k=3, normalize="nonzero"), Bank((BANK, Zero(8))), losses=(RouterZ(1e-3), LOSS)
    )
    assert second == SwiGLU(count=1, hidden=24)


def test_it_is_the_old_model_when_only_true_experts_are_picked() -> None:
    """With the twins' logits pushed down and the same k, the function is that of the old model."""
    model = decoder(LAYER, LAYER)
    grown = add_null_experts(model, 4, 2, LOSS).eval()
    ids = torch.randint(VOCABULARY, (2, 9))
    mask = torch.tensor([0.0] * EXPERTS + [1e9] * 4)

    def push(_module: Any, _inputs: Any, routing: Any) -> Any:
        logits_NE = routing.logits_NE - mask
        weight_NK, expert_NK = logits_NE.softmax(-1).topk(2)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return routing.replace(expert_NK=expert_NK, weight_NK=weight_NK)

    for layer in grown.moe_layers:
        layer.router.register_forward_hook(push)
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_seeds() -> None:
    model = decoder(LAYER)
    weights = [
        add_null_experts(model, 4, 3, LOSS, seed=seed).moe_layers[0].router.weight
        for seed in (0, 0, 1)
    ]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    assert weights[0][:EXPERTS].equal(weights[2][:EXPERTS])


def test_it_saves_and_loads_and_trains(tmp_path: Path) -> None:
    grown = add_null_experts(decoder(LAYER, LAYER).to(torch.float64), 4, 3, LOSS)
    assert grown.dtype == torch.float64
    grown = grown.float()
    grown.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        assert loaded.eval()(ids).logits.equal(grown.eval()(ids).logits)
    output = loaded.train()(ids, labels=ids)
    assert set(output.routing_losses) == {"RouterZ", "NullAwareBalance"}
    output.loss.backward()
    gradient = loaded.moe_layers[0].router.weight.grad
    assert gradient is not None
    assert gradient[EXPERTS:].abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "count", "k", "said"),
    [
        (LAYER, 3, 3, "needs a multiple"),
        (LAYER, 6, 3, "needs a multiple"),
        (LAYER, 0, 2, "0 null experts|count"),
        (LAYER, -4, 2, "-4|count"),
        (LAYER, 4, 9, "k is 9"),
        (LAYER, 4, 0, "k is 0"),
        (MoESpec(ReLURouting(k=1), BANK), 4, 3, "ReLURouting over SwiGLU"),
        (MoESpec(Pathway(k=2), Bank((BANK, Copy(1)))), 4, 3, "Pathway over Bank"),
    ],
)
def test_what_cannot_be_grafted_is_refused(layer: Any, count: int, k: int, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        add_null_experts(decoder(layer), count, k, LOSS)
