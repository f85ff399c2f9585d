"""Modules added to and pruned from trained decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit import (
    GELU,
    AttentionHeads,
    Bank,
    Entropy,
    Hash,
    L1Balance,
    ModuleRouting,
    MoESpec,
    MutualInformation,
    ReLURouting,
    SwiGLU,
    TopK,
    Zero,
)
from moekit.errors import SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.surgery import (
    ModuleUsage,
    extend_modules,
    module_usage,
    prune_modules,
    train_new_modules,
)
from moekit.surgery.rebuild import mixtures

ROUTER = ModuleRouting(k=2, hidden=12)
LOSSES = (MutualInformation(0.1),)
HEADS = MoESpec(ROUTER, AttentionHeads(count=4, heads=2, inner=16), losses=LOSSES)
FEED_FORWARD = MoESpec(ROUTER, GELU(count=6, hidden=24), losses=LOSSES)
ATTENTION_0, FEED_FORWARD_0 = "model.layers.0.self_attn.mixture", "model.layers.0.mlp"


def decoder(
    layers: Any = FEED_FORWARD, attention: Any = HEADS, **config: Any
) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"initializer_range": 0.2, **config}
    return MoEDecoderForCausalLM(
        MoEDecoderConfig(**sizes, layers=layers, attention=attention)
    ).eval()


class Blocks:
    """Random tokens, the last of each block padding."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids_T = torch.randint(61, (20,), generator=generator)
        return {"input_ids": ids_T, "attention_mask": (torch.arange(20) < 18).long()}


def tokens(seed: int = 9) -> Tensor:
    return torch.randint(61, (3, 15), generator=torch.Generator().manual_seed(seed))


def usage_of(model: MoEDecoderForCausalLM, use: Callable[[int], float]) -> ModuleUsage:
    """A table that says how much the module of each id is used, in every mixture."""
    kinds = {m.name: len(m.layer.experts.kinds) for m in mixtures(model)}
    return ModuleUsage({name: tuple(map(use, range(count))) for name, count in kinds.items()})


def reloaded(model: MoEDecoderForCausalLM, folder: Any) -> MoEDecoderForCausalLM:
    model.save_pretrained(folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return loaded


# --- extension ----------------------------------------------------------------------------------


def test_neutral_new_modules_change_nothing() -> None:
    model = decoder().double()
    grown = extend_modules(model, attention=2, feed_forward=3, router_init="neutral")
    assert [len(layer.experts.kinds) for layer in grown.moe_layers] == [6, 9] * 2
    torch.testing.assert_close(grown(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-12)


def test_old_weights_and_router_rows_are_kept_and_new_ones_come_behind() -> None:
    model = decoder()
    grown = extend_modules(model, feed_forward=3)
    x_ND = torch.randn(30, 32)
    for old, new in zip(model.moe_layers, grown.moe_layers, strict=True):
        before, after = old.router(x_ND).logits_NE, new.router(x_ND).logits_NE
        torch.testing.assert_close(after[:, : before.shape[1]], before)
    theirs = grown.state_dict()
    for name, value in model.state_dict().items():
        moved = name.replace("mlp.experts.", "mlp.experts.parts.0.")
        assert torch.equal(theirs[moved], value), name
    assert not torch.equal(grown(tokens()).logits, model(tokens()).logits)


def test_only_new_modules_and_rows_learn() -> None:
    grown = extend_modules(decoder(), attention=2, feed_forward=3).train()
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    optimiser = torch.optim.AdamW(
        [p for p in grown.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for seed in range(3):
        grown(tokens(seed), labels=tokens(seed)).loss.backward()
        optimiser.step()
    for name, parameter in grown.named_parameters():
        new = ".added_0_" in name or ".parts.1." in name
        assert (parameter.grad is not None) == new, name
        assert torch.equal(parameter, before[name]) != new, name


def test_a_second_extension_trains_its_own_modules_alone(tmp_path: Any) -> None:
    twice = extend_modules(extend_modules(decoder(), feed_forward=2), feed_forward=1)
    learning = {name for name, p in twice.named_parameters() if p.requires_grad}
    assert all(".added_1_" in name or ".parts.2." in name for name in learning)
    assert len(learning) == 2 * 4
    again = reloaded(twice, tmp_path)
    assert all(p.requires_grad for p in again.parameters())
    train_new_modules(again)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == learning
    train_new_modules(again, whole_router=True)
    routers = {name for name, p in again.named_parameters() if ".router." in name}
    whole = {name for name, p in again.named_parameters() if p.requires_grad}
    assert whole == learning | {name for name in routers if ".mlp." in name}


def test_the_new_experts_are_like_those_with_matrix_products() -> None:
    bank = Bank((GELU(count=3, hidden=8), Zero(2)))
    grown = extend_modules(decoder(FEED_FORWARD.replace(experts=bank)), feed_forward=2)
    assert grown.config.mixture_specs[1].experts == Bank((*bank.parts, GELU(count=2, hidden=8)))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ({}, {}, "wanted at least one"),
        ({}, {"attention": -1, "feed_forward": 2}, "wanted at least one"),
        ({"attention": None}, {"attention": 2}, "no mixture as attention"),
        (
            {"layers": FEED_FORWARD.replace(router=TopK(k=2))},
            {"feed_forward": 2},
            r"layers.0.mlp is routed by TopK; modules are added .* ModuleRouting",
        ),
    ],
)
def test_refused_extensions(model: dict[str, Any], options: dict[str, int], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        extend_modules(decoder(**model), **options)
    with pytest.raises(SpecError, match="no modules were added"):
        train_new_modules(decoder())


# --- usage and pruning --------------------------------------------------------------------------


def test_usage_is_the_share_of_tokens() -> None:
    model = decoder()
    usage = module_usage(model, Blocks(), batch_size=4)
    counts = {m.name: [0] * len(m.layer.experts.kinds) for m in mixtures(model)}
    for block in (Blocks()[index] for index in range(6)):
        out = model(block["input_ids"][None], attention_mask=block["attention_mask"][None])
        for name, record in zip(counts, out.moe, strict=True):
            for module in record.routing.expert_NK[:18].flatten().tolist():
                counts[name][module] += 1
    for name, counted in counts.items():
        assert usage.frequency[name] == pytest.approx([n / (6 * 18) for n in counted])


@pytest.mark.parametrize("mode", ["slice", "mask"])
def test_tokens_whose_modules_survive(mode: Any, tmp_path: Any) -> None:
    """``mask`` leaves their weights alone; ``slice`` divides them by 1 - p of the removed."""
    model = decoder()
    pruned = prune_modules(
        model, usage_of(model, lambda m: float(m != 1)), threshold=0.5, mode=mode
    )
    assert [len(layer.experts.kinds) for layer in pruned.moe_layers] == [3, 5] * 2
    x_ND = torch.randn(200, 32)
    for old, new in zip(model.moe_layers, pruned.moe_layers, strict=True):
        before, after = old.router(x_ND), new.router(x_ND)
        survives_N = (before.expert_NK != 1).all(1)
        assert 0 < int(survives_N.sum()) < 200
        renamed_NK = before.expert_NK - (before.expert_NK > 1).long()
        assert torch.equal(after.expert_NK[survives_N], renamed_NK[survives_N])
        removed_N1 = before.scores_NE[:, 1:2] if mode == "slice" else 0.0
        wanted_NK = before.weight_NK / (1 - removed_N1)
        torch.testing.assert_close(after.weight_NK[survives_N], wanted_NK[survives_N])
    again = reloaded(pruned, tmp_path)
    torch.testing.assert_close(again(tokens()).logits, pruned(tokens()).logits)


def test_a_masked_model_computes_what_the_whole_one_does_where_nothing_is_missed() -> None:
    model = decoder()
    for router in (layer.router for layer in model.moe_layers):  # module 1 is never chosen
        router.weight.data[1] = 0
        router.weight.data[[0, 2, 3]] = router.weight.data[[0, 2, 3]].abs()
        router.hidden_bias.data += 3
    usage = module_usage(model, Blocks())
    assert all(values[1] == 0 for values in usage.frequency.values())
    masked = prune_modules(model, usage_of(model, lambda m: float(m != 1)), share=0.25, mode="mask")
    torch.testing.assert_close(masked(tokens()).logits, model(tokens()).logits)
    sliced = prune_modules(model, usage_of(model, lambda m: float(m != 1)), share=0.25)
    assert (sliced(tokens()).logits - model(tokens()).logits).abs().max() > 1e-3


def test_pruning_makes_the_model_smaller() -> None:
    model = decoder()
    pruned = prune_modules(model, module_usage(model, Blocks()), share=0.5)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    modules = 2 * (2 * 2 * 32 * 16 + 3 * 2 * 32 * 24)
    assert sizes[0] - sizes[1] == modules + 2 * (2 + 3) * 12  # and their rows of the routers
    stored = {name: value.shape for name, value in pruned.state_dict().items()}
    assert stored[f"{ATTENTION_0}.experts.query_proj"] == (2, 16, 32)
    assert stored[f"{FEED_FORWARD_0}.experts.up_proj"] == (3, 24, 32)
    assert [spec.experts.count for spec in pruned.config.mixture_specs] == [2, 3] * 2


def test_the_least_used_go_and_their_share_is_of_each_mixture() -> None:
    model = decoder()
    pruned = prune_modules(
        model, usage_of(model, lambda m: 1 / (m + 1)), share=0.5, parts=("attention",)
    )
    assert [len(layer.experts.kinds) for layer in pruned.moe_layers] == [2, 6] * 2
    bank, old = pruned.moe_layers[0].experts, model.moe_layers[0].experts
    assert torch.equal(bank.query_proj, old.query_proj[:2])


def test_mixtures_end_up_of_different_sizes_and_go_on_learning() -> None:
    model = decoder()
    usage = usage_of(model, lambda _: 1.0)
    usage = ModuleUsage({**usage.frequency, FEED_FORWARD_0: (1.0, 0.0, 1.0, 0.0, 0.0, 1.0)})
    pruned = prune_modules(model, usage, threshold=0.5).train()
    assert [len(layer.experts.kinds) for layer in pruned.moe_layers] == [4, 3, 4, 6]
    pruned(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("mode", ["slice", "mask"])
@pytest.mark.parametrize("gone", [[0, 4], [6, 7], [0, 1, 2, 3, 4, 5]])
def test_pruning_what_was_extended(mode: Any, gone: list[int], tmp_path: Any) -> None:
    """Whole blocks may go: the added ones, or the original ones."""
    grown = extend_modules(decoder(), feed_forward=2)
    usage = usage_of(grown, lambda m: float(m not in gone))
    pruned = prune_modules(grown, usage, threshold=0.5, mode=mode, parts=("feed_forward",))
    x_ND = torch.randn(50, 32)
    kept = [m for m in range(8) if m not in gone]
    for old, new in zip(grown.moe_layers[1::2], pruned.moe_layers[1::2], strict=True):
        before, after = old.router(x_ND), new.router(x_ND)
        torch.testing.assert_close(after.logits_NE, before.logits_NE[:, kept])
        if mode == "mask":
            wanted = before.scores_NE[:, kept].gather(1, after.expert_NK)
            torch.testing.assert_close(after.weight_NK, wanted)
    again = reloaded(pruned, tmp_path)
    torch.testing.assert_close(again(tokens()).logits, pruned(tokens()).logits)


def test_masking_twice_keeps_the_whole_softmax() -> None:
    model = decoder()
    once = prune_modules(
        model, usage_of(model, lambda m: float(m != 0)), threshold=0.5, mode="mask"
    )
    twice = prune_modules(once, usage_of(once, lambda m: float(m != 0)), threshold=0.5, mode="mask")
    x_ND = torch.randn(50, 32)
    for old, new in zip(model.moe_layers, twice.moe_layers, strict=True):
        after = new.router(x_ND)
        wanted = old.router(x_ND).scores_NE[:, 2:].gather(1, after.expert_NK)
        torch.testing.assert_close(after.weight_NK, wanted)


@pytest.mark.parametrize(
    "layer",
    [
        MoESpec(TopK(k=2, bias=True, noise=True, bias_rate=1e-3), SwiGLU(6, 24, bias=True)),
        MoESpec(ReLURouting(k=2, init_std=0.2), SwiGLU(6, 24), losses=(L1Balance(k=2),)),
    ],
    ids=lambda spec: type(spec.router).__name__,
)
def test_other_routers_are_cut_too(layer: MoESpec, tmp_path: Any) -> None:
    model = decoder(layer, attention=None)
    pruned = prune_modules(model, usage_of(model, lambda m: float(m > 1)), threshold=0.5)
    x_ND = torch.randn(50, 32)
    for old, new in zip(model.moe_layers, pruned.moe_layers, strict=True):
        before, after = old.router(x_ND).logits_NE, new.router(x_ND).logits_NE
        torch.testing.assert_close(after, before[:, 2:])
    again = reloaded(pruned, tmp_path)
    torch.testing.assert_close(again(tokens()).logits, pruned(tokens()).logits)
    with pytest.raises(SpecError, match="keeps no rows of removed modules; use mode slice"):
        prune_modules(model, usage_of(model, float), threshold=0.5, mode="mask")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either a threshold of use or the share"),
        ({"threshold": 0.1, "share": 0.1}, "either a threshold of use or the share"),
        ({"share": 1.5}, "share is 1.5; wanted a share from 0 to 1"),
        (
            {"share": 0.75},
            f"{ATTENTION_0} would be left with 1 modules and its router takes 2 a token",
        ),
        ({"threshold": 0.9}, f"{ATTENTION_0} would be left with 0 modules"),
    ],
)
def test_refused_pruning(options: dict[str, float], said: str) -> None:
    model = decoder()
    with pytest.raises(SpecError, match=said):
        prune_modules(model, usage_of(model, lambda _: 0.5), **options)


def test_the_usage_of_another_model_is_refused() -> None:
    model = decoder()
    others = [decoder(attention=None), decoder(FEED_FORWARD.replace(experts=GELU(5, 24)))]
    for other in others:
        with pytest.raises(SpecError, match=r"the usage table has .* of this very model"):
            prune_modules(model, module_usage(other, Blocks()), share=0.25)
    with pytest.raises(SpecError, match="there is none here"):
        module_usage(model, Blocks(), max_batches=0)


def test_a_router_that_cannot_be_cut() -> None:
    model = decoder(MoESpec(Hash(k=2), GELU(6, 24)), attention=None)
    with pytest.raises(SpecError, match="routed by Hash, which cannot be cut"):
        prune_modules(model, usage_of(model, float), share=0.5)


def test_what_is_pruned_may_have_been_concentrated() -> None:
    """A loss that changes over steps starts anew, and the rest is as it was."""
    concentrated = Entropy(0.1, of="marginal", then=((10, 0.0),))
    model = decoder(FEED_FORWARD.replace(losses=(concentrated,)))
    model.routing_losses.losses[1].step.fill_(7)
    pruned = prune_modules(model, module_usage(model, Blocks()), share=0.25)
    assert [int(loss.step) for loss in pruned.routing_losses.losses if hasattr(loss, "step")] == [0]
