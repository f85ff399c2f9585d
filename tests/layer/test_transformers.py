"""Our layer is transformers' layer: same weights, same outputs, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moekit.experts import SwiGLU
from moekit.layer import MoE, MoESpec
from moekit.routing import LossSite, RoutingLosses, Signals, SwitchBalance, TopK

WIDTH, HIDDEN, EXPERTS, K = 16, 8, 6, 2
SHARED = {"hidden_size": WIDTH, "num_experts_per_tok": K}
BANK = SwiGLU(count=EXPERTS, hidden=HIDDEN)


def mixtral() -> tuple[nn.Module, MoESpec]:
    config = MixtralConfig(intermediate_size=HIDDEN, num_local_experts=EXPERTS, **SHARED)
    return MixtralSparseMoeBlock(config), MoESpec(TopK(k=K), BANK)


def qwen3(norm: bool) -> tuple[nn.Module, MoESpec]:
    config = Qwen3MoeConfig(
        moe_intermediate_size=HIDDEN, num_experts=EXPERTS, norm_topk_prob=norm, **SHARED
    )
    router = TopK(k=K, normalize="selected" if norm else "none")
    return Qwen3MoeSparseMoeBlock(config), MoESpec(router, BANK)


def olmoe(norm: bool) -> tuple[nn.Module, MoESpec]:
    config = OlmoeConfig(
        intermediate_size=HIDDEN, num_experts=EXPERTS, norm_topk_prob=norm, **SHARED
    )
    router = TopK(k=K, normalize="selected" if norm else "none")
    return OlmoeSparseMoeBlock(config), MoESpec(router, BANK)


def qwen2() -> tuple[nn.Module, MoESpec]:
    config = Qwen2MoeConfig(
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=12,
        num_experts=EXPERTS,
        norm_topk_prob=False,
        **SHARED,
    )
    shared = SwiGLU(count=1, hidden=12)
    router = TopK(k=K, normalize="none")
    return Qwen2MoeSparseMoeBlock(config), MoESpec(router, BANK, shared=shared, shared_gate=True)


def deepseek() -> tuple[nn.Module, MoESpec]:
    config = DeepseekV3Config(
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        **SHARED,
    )
    router = TopK(
        k=K, score="sigmoid", scale=2.5, groups=3, top_groups=2, group_score="top2", bias_rate=1e-3
    )
    shared = SwiGLU(count=1, hidden=2 * HIDDEN)
    return DeepseekV3MoE(config), MoESpec(router, BANK, shared=shared)


BLOCKS = {
    "Mixtral": mixtral,
    "Qwen3 normalised": lambda: qwen3(True),
    "Qwen3": lambda: qwen3(False),
    "OLMoE": lambda: olmoe(False),
    "OLMoE normalised": lambda: olmoe(True),
    "Qwen2": qwen2,
    "DeepSeek-V3": deepseek,
}


def randomise(block: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 0.3)


def pairs(block: nn.Module, layer: MoE) -> list[tuple[Tensor, Tensor]]:
    """Their tensors beside ours; two of theirs may lie in one of ours."""
    found = [
        (block.gate.weight, layer.router.weight),
        (block.experts.gate_up_proj, layer.experts.gate_up_proj),
        (block.experts.down_proj, layer.experts.down_proj),
    ]
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if shared is not None:
        half = layer.shared.gate_up_proj.shape[1] // 2
        found += [
            (shared.gate_proj.weight, layer.shared.gate_up_proj[0, :half]),
            (shared.up_proj.weight, layer.shared.gate_up_proj[0, half:]),
            (shared.down_proj.weight, layer.shared.down_proj[0]),
        ]
    if layer.shared_gate is not None:
        found.append((block.shared_expert_gate.weight, layer.shared_gate.weight))
    if hasattr(block.gate, "e_score_correction_bias"):
        found.append((block.gate.e_score_correction_bias, layer.router.correction_bias_E))
    return found


def gradient_of(ours: Tensor) -> Tensor:
    """The gradient of one of our tensors, or of the slice of a parameter that it is."""
    if ours.grad is not None or ours._base is None:
        return ours.grad
    base = ours._base.grad
    return base.as_strided(ours.shape, ours.stride(), ours.storage_offset())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BLOCKS)
def test_same_weights_same_outputs_and_gradients(name: str, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    block, spec = BLOCKS[name]()
    block.train()
    randomise(block)
    layer = spec.build(WIDTH)
    with torch.no_grad():
        for theirs, ours in pairs(block, layer):
            ours.copy_(theirs)
    x_BTD = torch.randn(2, 9, WIDTH)
    x_theirs, x_ours = (x_BTD.clone().requires_grad_() for _ in range(2))
    wanted, y = block(x_theirs), layer(x_ours).y
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(y)
    (wanted * cotangent).sum().backward()
    (y * cotangent).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for theirs, ours in pairs(block, layer):
            if theirs.requires_grad:
                found = gradient_of(ours)
                torch.testing.assert_close(found, theirs.grad, rtol=1e-5, atol=1e-5)


def same_choice(ours, ids_NK: Tensor, weight_NK: Tensor) -> None:
    """Equal up to the order of slots, which transformers leaves open."""
    dense = torch.zeros(ours.tokens, ours.experts).scatter_(1, ids_NK, weight_NK)
    torch.testing.assert_close(ours.dense_weight_NE(), dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("groups", "top_groups", "k"), [(4, 2, 3), (2, 1, 4), (1, 1, 6)])
def test_deepseek_v3_selection(groups: int, top_groups: int, k: int, norm: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=16,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    randomise(theirs)
    router = TopK(
        k=k,
        score="sigmoid",
        normalize="selected" if norm else "none",
        scale=2.5,
        groups=groups,
        top_groups=top_groups,
        bias_rate=1e-3,
    )
    layer = MoESpec(router, SwiGLU(count=16, hidden=4)).build(WIDTH)
    layer.router.weight.data.copy_(theirs.weight)
    layer.router.correction_bias_E.copy_(theirs.e_score_correction_bias)
    x_ND = torch.randn(200, WIDTH)
    _, weight_NK, ids_NK = theirs(x_ND)
    same_choice(layer.router(x_ND), ids_NK, weight_NK)


def test_deepseek_v2_selection() -> None:
    config = DeepseekV2Config(
        hidden_size=WIDTH,
        num_attention_heads=2,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    theirs = DeepseekV2TopkRouter(config)
    randomise(theirs)
    router = TopK(k=3, normalize="none", scale=16.0, groups=4, top_groups=2, group_score="max")
    layer = MoESpec(router, SwiGLU(count=16, hidden=4)).build(WIDTH)
    layer.router.weight.data.copy_(theirs.weight)
    x_ND = torch.randn(200, WIDTH)
    _, weight_NK, ids_NK = theirs(x_ND)
    same_choice(layer.router(x_ND), ids_NK, weight_NK)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_switch_balance_is_load_balancing_loss_func(k: int, masked: bool) -> None:
    """Over three layers at once: transformers pools the layers, our scope global."""
    torch.default_generator.manual_seed(k)
    layers = [MoESpec(TopK(k=k), BANK).build(WIDTH) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.router.weight)
    mask_BT = torch.ones(4, 5, dtype=torch.bool)
    if masked:
        mask_BT[0, 3:] = mask_BT[2, 1:] = False
    signals = Signals(valid_N=mask_BT.flatten()) if masked else None
    routings = [layer.router(torch.randn(20, WIDTH), signals) for layer in layers]
    losses = RoutingLosses(
        [LossSite((SwitchBalance(weight=1.0, scope="global"),), x.router) for x in layers]
    )
    total, _ = losses(routings)
    logits = tuple(routing.logits_NE for routing in routings)
    theirs = load_balancing_loss_func(logits, EXPERTS, k, mask_BT.long() if masked else None)
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-6)
    weights = [layer.router.weight for layer in layers]
    for ours, wanted in zip(
        torch.autograd.grad(total, weights, retain_graph=True),
        torch.autograd.grad(theirs, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
