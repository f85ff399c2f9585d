"""Routing statistics of transformers' own models, against their gates computed again by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import JetMoeConfig, JetMoeForCausalLM, LlamaConfig, LlamaForCausalLM

from moekit.errors import CheckpointError
from moekit.measure import observe, routing_statistics
from moekit.measure.gates import GateHooks
from moekit.measure.tokens import summarise


class Blocks:
    """Random tokens, some of them padding."""

    def __init__(self, padding: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, VOCABULARY, (3, 10), generator=generator)
        self.masks = torch.ones_like(self.tokens)
        if padding:
            self.masks[1, :4] = 0
        self.padding = padding

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.tokens[index]}
        return item | {"attention_mask": self.masks[index]} if self.padding else item


def gates_of(model: nn.Module) -> list[nn.Module]:
    """Gates by their own weight, not by the code under test."""
    wanted = ("mlp.gate", "mlp.router", "block_sparse_moe.router", "block_sparse_moe.gate")
    found = [m for n, m in model.named_modules() if n.endswith(wanted)]
    return [m for m in found if isinstance(getattr(m, "weight", None), Tensor)]


def chosen(gate: nn.Module, x_D: Tensor, name: str) -> tuple[list[int], list[float]]:
    """The experts and the probabilities of one token, in float64 and Python."""
    logits = gate.weight.detach().double() @ x_D.double()
    if getattr(gate, "bias", None) is not None:
        logits = logits + gate.bias.detach().double()
    scores: list[float] = logits.tolist()
    allowed = range(len(scores))
    if name == "deepseek_v3":
        groups = [list(allowed)[g * 2 : g * 2 + 2] for g in range(4)]
        best = sorted(groups, key=lambda g: -sum(1 / (1 + math.exp(-scores[e])) for e in g))[:2]
        allowed = [e for g in best for e in g]  # type: ignore[assignment]
    experts = sorted(allowed, key=lambda e: -scores[e])[: gate.top_k]
    if name == "deepseek_v3":
        gated = [1 / (1 + math.exp(-s)) for s in scores]
    else:
        gated = [math.exp(s - max(scores)) for s in scores]
    return experts, [g / sum(gated) for g in gated]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_gates_computed_by_hand(name: str, padding: bool) -> None:
    model, data = tiny_model(name), Blocks(padding)
    gates = gates_of(model)
    inputs: list[list[Tensor]] = [[] for _ in gates]
    for gate, seen in zip(gates, inputs, strict=True):
        gate.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].reshape(-1, 16).clone())
        )
    got = routing_statistics(model, data, batch_size=2).summary()
    assert len(got["layers"]) == len(gates) > 0
    valid = data.masks.flatten().tolist()
    for gate, seen, layer in zip(gates, inputs, got["layers"], strict=True):
        load, entropy = [0] * gate.weight.shape[0], 0.0
        for x_D, is_token in zip(torch.cat(seen), valid, strict=True):
            if is_token:
                experts, shares = chosen(gate, x_D, name)
                for expert in experts:
                    load[expert] += 1
                entropy -= sum(p * math.log(p) for p in shares if p > 0)
        assert layer["load"] == load
        assert layer["tokens"] == sum(valid)
        assert layer["rows_per_token"] == gate.top_k
        assert layer["entropy"] == pytest.approx(entropy / sum(valid), rel=1e-4)
        assert layer["load_violation"] == pytest.approx(max(load) * len(load) / sum(load))


def test_tokens_of_each_expert_are_listed_for_foreign_models_too() -> None:
    model, data = tiny_model("mixtral"), Blocks(padding=True)
    texts = [f" t{i}" for i in range(VOCABULARY)]
    got = summarise(observe(model, data), texts, top=VOCABULARY, minimum=1)
    load = got.statistics.summary()["layers"][1]["load"]
    assert [sum(use.count for use in expert.by_count) for expert in got.experts[1]] == load
    assert got.histogram == (0.0, 0.0, 1.0)


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model("olmoe")
    routing_statistics(model, Blocks(False), max_batches=1)
    assert all(not gate._forward_hooks for gate in gates_of(model))


def test_a_dense_model_is_refused_with_what_can_be_read() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no router.*Mixtral.*GPT-OSS"):
        routing_statistics(model, Blocks(False))


def test_an_architecture_with_another_kind_of_router_is_refused() -> None:
    config = JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=16,
        num_local_experts=4,
    )
    with pytest.raises(CheckpointError, match="no router that can be read"):
        routing_statistics(JetMoeForCausalLM(config), Blocks(False))


class OddRouter(nn.Module):
    """A router that returns what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 4),
        (torch.zeros(2, 4), torch.zeros(2, 2)),
        (torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2)),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64)),
        (None, torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64)),
    ],
)
def test_an_output_that_is_no_decision_is_refused_by_name(output: Any) -> None:
    block = nn.Module()
    block.gate, block.experts = OddRouter(output), nn.ModuleList()
    model = nn.Sequential(block)
    with pytest.raises(CheckpointError, match=r"router of 0 \(OddRouter\)"), GateHooks(model):
        block.gate()


def test_masked_ids_count_for_no_expert() -> None:
    block = nn.Module()
    ids = torch.tensor([[0, 4], [3, -1]])
    block.gate = OddRouter((torch.randn(2, 4), torch.rand(2, 2), ids))
    block.experts = nn.ModuleList()
    with GateHooks(nn.Sequential(block)) as hooks:
        block.gate()
    assert hooks.routings[0].expert_NK.tolist() == [[0, -1], [3, -1]]
    assert hooks.routings[0].load_E().tolist() == [1, 0, 0, 1]


def test_probabilities_handed_out_for_logits_are_taken_as_they_are() -> None:
    block = nn.Module()
    probabilities = torch.randn(6, 4).softmax(-1)
    weights, ids = probabilities.topk(2)
    block.gate = OddRouter((probabilities, weights / weights.sum(-1, keepdim=True), ids))
    block.experts = nn.ModuleList()
    with GateHooks(nn.Sequential(block)) as hooks:
        block.gate()
    scores = hooks.routings[0].scores_NE
    assert scores is not None
    torch.testing.assert_close(scores, probabilities)
