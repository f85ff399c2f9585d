"""The decoder against the decoders of transformers, with the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moekit import MoESpec, SwiGLU, SwitchBalance, TopK

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
RENAMED = {
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.shared_expert_gate.weight": "mlp.shared_gate.weight",
}


def converted(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a transformers decoder under our names: gate and up fused, with an expert axis."""
    found = dict(named)
    ours = {}
    for name, tensor in found.items():
        for theirs, own in RENAMED.items():
            name = name.replace(theirs, own)
        if name.endswith("up_proj.weight"):
            continue
        if name.endswith("gate_proj.weight"):
            up = found[name.replace("gate_proj", "up_proj")]
            ours[_bank(name).replace("gate_proj.weight", "gate_up_proj")] = torch.cat([tensor, up])[
                None
            ]
        elif name.endswith(("mlp.down_proj.weight", "shared_expert.down_proj.weight")):
            ours[_bank(name).replace(".weight", "")] = tensor[None]
        else:
            ours[name] = tensor
    return ours


def _bank(name: str) -> str:
    return (
        name.replace("mlp.shared_expert.", "mlp.shared.")
        .replace("mlp.gate_proj", "mlp.experts.gate_proj")
        .replace("mlp.down_proj", "mlp.experts.down_proj")
    )


def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    missing, unexpected = ours.load_state_dict(converted(theirs.state_dict().items()), strict=False)
    assert not unexpected
    assert not missing


def assert_same_gradients(theirs: nn.Module, ours: nn.Module) -> None:
    expected = converted((n, p.grad) for n, p in theirs.named_parameters())
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_decoder_equals_llama(build, ids, attention, tied):
    theirs = LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=tied)
    ).eval()
    ours = build("dense", tie_word_embeddings=tied, attn_implementation=attention)
    theirs.set_attn_implementation(attention)
    copy_weights(theirs, ours)
    expected = theirs(ids, labels=ids)
    found = ours(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("rope", ["llama3", "yarn", "linear", "dynamic"])
def test_scaled_rotary_positions_equal_llama(build, ids, rope):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope in ("llama3", "yarn"):
        parameters |= {"original_max_position_embeddings": 8}
    sizes = {**SIZES, "rope_parameters": parameters, "max_position_embeddings": 32}
    theirs = LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 48})).eval()
    ours = build("dense", rope_parameters=dict(parameters), max_position_embeddings=32)
    copy_weights(theirs, ours)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_moe_decoder_equals_mixtral_with_its_balance_loss(build, ids, padded):
    theirs = MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.3,
        )
    ).train()
    balance = SwitchBalance(weight=0.3, scope="global")  # transformers pools the layers' tokens
    ours = build(MoESpec(TopK(k=2), SwiGLU(count=4, hidden=24), losses=(balance,))).train()
    copy_weights(theirs, ours)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if padded:
        mask[0, 7:] = 0
        labels[mask == 0] = -100
    expected = theirs(ids, attention_mask=mask, labels=labels)
    found = ours(ids, attention_mask=mask, labels=labels)
    real = mask.bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.routing_losses["SwitchBalance"], expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    assert_same_gradients(theirs, ours)


def test_shared_expert_equals_qwen2_moe_between_dense_layers(build, ids):
    theirs = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            intermediate_size=40,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            qkv_bias=False,
            use_sliding_window=False,
        )
    ).eval()
    moe = MoESpec(
        TopK(k=2, normalize="none"),
        SwiGLU(count=4, hidden=24),
        shared=SwiGLU(count=1, hidden=16),
        shared_gate=True,
    )
    ours = build([moe, SwiGLU(count=1, hidden=40), moe])
    copy_weights(theirs, ours)
    expected, found = theirs(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    assert_same_gradients(theirs, ours)
