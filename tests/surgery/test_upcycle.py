"""Dense decoders whose feed-forward parts become mixtures of their copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit import (
    GEGLU,
    GELU,
    Bank,
    Copy,
    Dropless,
    MoESpec,
    Rectified,
    ReLURouting,
    SwiGLU,
    SwitchBalance,
    TopK,
)
from moekit.errors import SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.surgery import upcycle

WIDTH, VOCABULARY = 16, 64
DENSE = SwiGLU(count=1, hidden=24)
BANK = SwiGLU(count=8, hidden=24)
TIED = [
    MoESpec(TopK(k=1), BANK, losses=(SwitchBalance(0.01),)),
    MoESpec(TopK(k=3), BANK, Dropless(backend="loop")),
    MoESpec(TopK(k=2, score="sigmoid"), BANK),
    MoESpec(TopK(k=1), BANK, Rectified(factor=0.5, eval_factor=0.5, groups=8)),
    MoESpec(TopK(k=2), BANK, Rectified(factor=0.5, eval_factor=0.5, groups=4, fill_in=False)),
]


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


@pytest.mark.parametrize("dense", [DENSE, GELU(count=1, hidden=24, bias=True)], ids=str)
@pytest.mark.parametrize("layer", TIED, ids=lambda spec: f"{spec.router}-{spec.dispatch}")
def test_it_computes_what_the_dense_model_did(dense: Any, layer: MoESpec) -> None:
    model = decoder(dense, dense).double()
    grown = upcycle(model, layer.replace(experts=dense.replace(count=8))).eval()
    ids = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():
        for mode in (True, False):
            out, wanted = grown.train(mode)(ids), model.train(mode)(ids)
            torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-10, atol=1e-10)


def test_without_repair_dropped_tokens_show() -> None:
    layer = TIED[3].replace(dispatch=Rectified(eval_factor=0.5, groups=8, intra_device=False))
    model = decoder(DENSE, DENSE)
    ids = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():
        out = upcycle(model, layer).eval()(ids)
        assert not torch.allclose(out.logits, model(ids).logits, atol=1e-2)


def test_experts_are_copies_and_the_rest_is_kept() -> None:
    model = decoder(DENSE, DENSE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = upcycle(model, TIED[0])
    state = grown.state_dict()
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())
    for name, value in before.items():
        assert state[name].equal(value.expand_as(state[name])), name
    banks = [n for n in before if ".mlp.experts." in n]
    assert len(banks) == 4
    assert all(state[name].shape[0] == 8 for name in banks)
    added = [n for n in state if n not in before and "routing_losses" not in n]
    assert added == [f"model.layers.{i}.mlp.router.weight" for i in range(2)]
    assert not state[added[0]].equal(state[added[1]])
    assert grown.config.layer_specs == (TIED[0],) * 2


def test_experts_do_not_share_memory() -> None:
    grown = upcycle(decoder(DENSE), TIED[0])
    (layer,) = grown.moe_layers
    with torch.no_grad():
        layer.experts.down_proj[0].zero_()
    assert bool(layer.experts.down_proj[1].any())


def test_precision_is_kept(tmp_path: Path) -> None:
    """Also that of the rotary frequencies, which stay in float32 in a model loaded as bfloat16."""
    decoder(DENSE, DENSE).save_pretrained(tmp_path)
    model = MoEDecoderForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    layer = MoESpec(TopK(k=1), BANK, Dropless(backend="loop"))
    grown = upcycle(model, layer).eval()
    assert grown.dtype == torch.bfloat16
    rotary = model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert grown.model.rotary_emb.inv_freq.equal(rotary)
    ids = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():  # two blocks of bfloat16 sums in another order
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=5e-2, atol=5e-2)


def test_seeds_and_the_global_generator() -> None:
    model = decoder(DENSE)
    state = torch.get_rng_state()
    found = [upcycle(model, TIED[0], seed=s).moe_layers[0].router.weight for s in (0, 0, 1)]
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_it_saves_and_loads_and_trains(tmp_path: Path, aligned: Callable[[Any], Any]) -> None:
    grown = upcycle(decoder(DENSE, DENSE), TIED[3])
    grown.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # a mapped file is not aligned: sums differ in a last bit
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        assert aligned(loaded.eval())(ids).logits.equal(grown.eval()(ids).logits)
    loaded.train()(ids, labels=ids).loss.backward()
    assert loaded.moe_layers[0].router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("layers", "layer", "said"),
    [
        ((DENSE, TIED[0]), TIED[0], "layer 1 is a mixture of experts already"),
        ((DENSE,), TIED[0].replace(experts=SwiGLU(count=8, hidden=32)), "hidden=32"),
        ((DENSE,), TIED[0].replace(experts=GEGLU(count=8, hidden=24)), "got GEGLU"),
        ((DENSE,), TIED[0].replace(experts=SwiGLU(count=8, hidden=24, bias=True)), "bias=True"),
        ((DENSE,), MoESpec(ReLURouting(k=2), Bank((BANK, Copy(1)))), "got Bank"),
        ((DENSE,), TIED[0].replace(shared=SwiGLU(count=1, hidden=24)), "leave shared out"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(layers: Any, layer: MoESpec, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        upcycle(decoder(*layers), layer)
