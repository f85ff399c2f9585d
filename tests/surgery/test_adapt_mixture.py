"""Mixtures of LoRA experts: what they compute, against loops, peft and plain formulas."""

from __future__ import annotations

from typing import Any, get_args

import peft
import pytest
import torch
from surgery_models import CONFIGS, VOCABULARY, random_model, tiny
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
)

from moekit.dispatch.plan import Plan
from moekit.errors import SignalError, SpecError
from moekit.surgery.adapt import (
    AdaptSpec,
    LoRAExperts,
    MixtureRouter,
    adapter_parameters,
    forced_expert,
    install_adapter,
    mole_loss,
    routing_report,
)
from moekit.surgery.adapt.spec import Combine

MODES = get_args(Combine)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
SPEC = AdaptSpec(experts=3, rank=4, alpha=8, dropout=0.0, attention=False)


def llama(seed: int = 0) -> PreTrainedModel:
    return random_model(LlamaConfig(**SIZES), seed)


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision)
    return LlavaForConditionalGeneration(config).eval()


DENSE = {
    "llama": llama,
    "gpt2": lambda: random_model(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=1)
    ),
    "phi3": lambda: random_model(Phi3Config(**SIZES)),
    "llava": llava,
}


def trained(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """An adapter as it might be after training: nothing of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            std = 1.0 if "mole_router" in name else 0.3
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(spec: AdaptSpec = SPEC) -> PreTrainedModel:
    return trained(install_adapter(llama(), spec))


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=tokens()).logits
    return out


class Loop(nn.Module):
    """The same feed-forward part, token by token, in the words of the paper."""

    def __init__(self, part: nn.Module, spec: AdaptSpec) -> None:
        super().__init__()
        self.part, self.spec = part, spec

    def weights(self, p_E: Tensor) -> Tensor:
        chosen = torch.zeros_like(p_E)
        chosen[p_E.topk(self.spec.k).indices] = 1
        match self.spec.combine:
            case "soft":
                return p_E
            case "gate":
                return chosen * p_E
            case "normalized":
                return chosen * p_E / (chosen * p_E).sum()
            case "ste":
                return chosen / self.spec.k + p_E - p_E.detach()
            case "sparse_ste":
                return chosen * (1 / self.spec.k + p_E - p_E.detach())
        return chosen / self.spec.k

    def adapted(self, name: str, x_I: Tensor, weight_E: Tensor) -> Tensor:
        own: Any = self.part.get_submodule(name)
        y_O = own.base(x_I)
        for e in range(self.spec.experts):
            pair = own.lora_B[e] @ (own.lora_A[e] @ x_I)
            y_O = y_O + weight_E[e] * self.spec.alpha / self.spec.rank * pair
        return y_O

    def forward(self, x_ND: Tensor) -> Tensor:
        router: Any = self.part.get_submodule("mole_router")
        rows = []
        for x_D in x_ND:
            weight_E = self.weights(router.linear(x_D).softmax(-1))
            gate = torch.nn.functional.silu(self.adapted("gate_proj", x_D, weight_E))
            inner = gate * self.adapted("up_proj", x_D, weight_E)
            rows.append(self.adapted("down_proj", inner, weight_E))
        return torch.stack(rows)


@pytest.mark.parametrize("combine", MODES)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_and_gradients_are_those_of_a_loop(combine: Combine, k: int, seed: int) -> None:
    spec = SPEC.replace(combine=combine, k=k)
    model = trained(install_adapter(llama(seed).double(), spec), seed).train()
    part: nn.Module = model.get_submodule("model.layers.1.mlp")
    x_ND = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    cotangent_ND = torch.randn(11, 16, dtype=torch.float64)
    leaves = [x_ND, *(p for p in part.parameters() if p.requires_grad)]
    found = []
    for run in (part, Loop(part, spec)):
        y_ND = run(x_ND)
        gradients = torch.autograd.grad(y_ND, leaves, cotangent_ND, materialize_grads=True)
        found.append([y_ND, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("name", [*DENSE, *CONFIGS])
def test_before_training_the_model_computes_the_same_to_the_bit(name: str, attention: bool) -> None:
    model = DENSE[name]() if name in DENSE else tiny(name)
    wanted = logits(model)
    own = {n: p.clone() for n, p in model.named_parameters()}
    install_adapter(model, SPEC.replace(attention=attention))
    assert torch.equal(logits(model), wanted)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    ours = adapter_parameters(model)
    assert ours
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter_name in ours)
        assert (parameter.grad is not None) == (parameter_name in ours)
    assert len(own) + len(ours) == len(list(model.named_parameters()))


def test_a_vision_tower_is_left_alone() -> None:
    model = install_adapter(llava(), SPEC.replace(attention=True))
    assert all(".language_model." in name for name in adapter_parameters(model))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_expert_is_the_lora_of_peft(seed: int) -> None:
    ours = trained(install_adapter(llama(seed), SPEC.replace(experts=1)), seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    theirs = peft.inject_adapter_in_model(config, llama(seed))
    for path, module in ours.named_modules():
        if isinstance(module, LoRAExperts):
            layer = theirs.get_submodule(path)
            layer.lora_A["default"].weight.data = module.lora_A[0].detach()
            layer.lora_B["default"].weight.data = module.lora_B[0].detach()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)


def test_equal_experts_are_plain_lora_unless_weighted_by_the_gate() -> None:
    plain = adapted(SPEC.replace(experts=1))
    for combine in MODES:
        model = adapted(SPEC.replace(combine=combine))
        for path, module in model.named_modules():
            if isinstance(module, LoRAExperts):
                one: Any = plain.get_submodule(path)
                module.lora_A.data = one.lora_A.detach().expand(3, -1, -1).clone()
                module.lora_B.data = one.lora_B.detach().expand(3, -1, -1).clone()
        same = torch.allclose(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
        assert same == (combine != "gate")


@pytest.mark.parametrize("training", [False, True])
def test_straight_through_modes_compute_what_hard_does_to_the_bit(training: bool) -> None:
    found = [
        logits(adapted(SPEC.replace(combine=combine)).train(training))
        for combine in ("hard", "sparse_ste", "ste")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("combine", MODES)
def test_the_task_teaches_the_router_in_every_mode_but_hard(combine: Combine) -> None:
    # Of one expert alone the normalized weight is 1, which teaches nothing.
    k = 2 if combine == "normalized" else 1
    model = adapted(SPEC.replace(combine=combine, balance=0.0, k=k)).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        if "mole_router" in name:
            taught = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert taught == (combine != "hard"), name


def test_all_projections_see_one_routing_and_each_token_one_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    gather = Plan.gather

    def watch(self: Plan, x_ND: Tensor) -> Tensor:
        rows = gather(self, x_ND)
        seen.append((id(self), len(rows)))
        return rows

    monkeypatch.setattr(Plan, "gather", watch)
    model = adapted()
    model(input_ids=tokens(3, 9))
    assert [rows for _, rows in seen] == [27] * 6  # 2 layers, 3 projections
    assert len({plan for plan, _ in seen[:3]}) == 1
    chosen = model.get_submodule("model.layers.0.mlp.mole_router").mixed.expert_NK
    assert len(chosen[:9].unique()) > 1  # within one sequence


def test_a_forced_expert_gets_every_token() -> None:
    model = adapted()
    with forced_expert(model, 2):
        logits(model)
        router: Any = model.get_submodule("model.layers.0.mlp.mole_router")
        assert router.mixed.expert_NK.unique().tolist() == [2]
    logits(model)
    assert len(router.mixed.expert_NK.unique()) > 1


def test_where_the_domains_go() -> None:
    model = install_adapter(llama(), SPEC.replace(experts=2))
    for router in (m for m in model.modules() if isinstance(m, MixtureRouter)):
        nn.init.zeros_(router.linear.weight)
        router.linear.bias.data = torch.tensor([1.0, 0.0])
    (first, second) = routing_report(model, {"input_ids": tokens(2, 9)}, [0, 1])
    assert first.share_DE == second.share_DE == ((1.0, 0.0), (1.0, 0.0))
    assert first.information == 0.0
    mask_BT = torch.ones(2, 9, dtype=torch.long)
    mask_BT[0, :5] = 0
    (padded, _) = routing_report(
        model, {"input_ids": tokens(2, 9), "attention_mask": mask_BT}, [0, 1]
    )
    assert padded.share_DE == first.share_DE


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"experts": 0}, "experts is 0"),
        ({"k": 4}, "k is 4; wanted 1 to 3"),
        ({"combine": "mean"}, "combine"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"balance": -1.0}, "balance"),
        ({"null": -1}, "null is -1"),
        ({"null": 2}, "wanted normalized or gate"),
        ({"null": 2, "combine": "gate", "k": 6}, "k is 6; wanted 1 to 5"),
        ({"feed_forward": False, "attention": False}, "nothing would be adapted"),
    ],
)
def test_specs_that_contradict_themselves(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        AdaptSpec(**fields)


def test_models_and_calls_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="cannot be adapted"):
        install_adapter(
            random_model(
                OPTConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=16,
                    ffn_dim=20,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    word_embed_proj_dim=16,
                )
            ),
            SPEC,
        )
    model = install_adapter(llama(), SPEC)
    with pytest.raises(SpecError, match=r"model\.layers\.0\.mlp\.gate_proj has an adapter already"):
        install_adapter(model, SPEC)
    with pytest.raises(SignalError, match=r"mlp\.mole_router has routed nothing"):
        mole_loss(model)
    model(input_ids=tokens(3, 9))
    with pytest.raises(SignalError, match=r"shape \(3, 8\); model\.layers\.0\.mlp\.mole_router"):
        mole_loss(model, torch.ones(3, 8))
    mask_BT = torch.ones(3, 9)
    mask_BT[1] = 0
    with pytest.raises(SignalError, match="nothing of sequence 1"):
        mole_loss(model, mask_BT)
    with pytest.raises(SignalError, match="domain_ids has 2 entries for 3"):
        routing_report(model, {"input_ids": tokens()}, [0, 1])
    with pytest.raises(SpecError, match="no mixture"):
        mole_loss(llama())
    with pytest.raises(SpecError, match="no adapter"):
        adapter_parameters(llama())
    with pytest.raises(SpecError, match="expert is 3"), forced_expert(model, 3):
        pass
