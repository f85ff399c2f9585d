"""Small MoE models of transformers' own classes, trained from scratch for the surgery studies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from moekit.measure.gates import find_gates
from moekit.measure.observe import TokenBlocks
from moekit.spec import Spec
from moekit.surgery.experts_backend import register_experts
from moekit.training.decay import decayed_names
from moekit.training.order import ShuffledPasses

BIAS_RATE = 1e-3  # DeepSeek-V3's
BALANCE = 0.01  # weight of the loss, OLMoE's


@dataclass(frozen=True)
class Size(Spec):
    """Size of a model.

    Attributes:
        width: D.
        hidden: H of an expert.
        layers: decoder layers; the first of a DeepSeek-V3 has no experts.
        heads: of attention.
        experts: routed ones a layer.
        k: routed ones a token.
        positions: longest sequence.
        normalize: whether the weights of a token in an OLMoE sum to 1; those of OLMoE do not.
    """

    width: int = 128
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    k: int = 2
    positions: int = 512
    normalize: bool = False


@dataclass(frozen=True)
class Schedule(Spec):
    """One training with AdamW, a linear warmup over 5% of the steps and a cosine decay to 10%.

    Attributes:
        steps: optimiser steps.
        batch_size: blocks a step.
        learning_rate: the highest.
        seed: of the data's order.
    """

    steps: int = 2000
    batch_size: int = 8
    learning_rate: float = 3e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(0.05 * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def olmoe(size: Size, vocabulary: int, end: int, seed: int = 0) -> PreTrainedModel:
    """An OLMoE: softmax top-k, balanced by a loss.

    Args:
        size: its size.
        vocabulary: number of token ids.
        end: id of the end of text.
        seed: of the weights.
    """
    config = OlmoeConfig(
        **_common(size, vocabulary, end),
        intermediate_size=size.hidden,
        num_experts=size.experts,
        norm_topk_prob=size.normalize,
    )
    return _built(OlmoeForCausalLM, config, seed)


def deepseek(size: Size, vocabulary: int, end: int, seed: int = 0) -> PreTrainedModel:
    """A DeepSeek-V3: latent attention, sigmoid top-k balanced by a bias, one shared expert.

    Arguments are those of :func:`olmoe`.
    """
    head = size.width // size.heads
    config = DeepseekV3Config(
        **_common(size, vocabulary, end),
        intermediate_size=(size.k + 1) * size.hidden,
        moe_intermediate_size=size.hidden,
        n_routed_experts=size.experts,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=size.width // 2,
        kv_lora_rank=size.width // 2,
        qk_rope_head_dim=head // 2,
        qk_nope_head_dim=head // 2,
        v_head_dim=head,
    )
    return _built(DeepseekV3ForCausalLM, config, seed)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"olmoe": olmoe, "deepseek": deepseek}


def fit(
    model: PreTrainedModel,
    data: TokenBlocks,
    schedule: Schedule,
    told: Callable[[int, float], None] | None = None,
) -> None:
    """Train all weights of a model in place; its experts run on moekit's kernels meanwhile.

    Load is kept even by a balance loss, or by the routers' bias where they have one.

    Args:
        model: one of this module's.
        data: blocks of tokens.
        schedule: how long.
        told: called with each step that is done and its cross-entropy in nats a token.
    """
    register_experts()
    before = model.config._experts_implementation
    model.set_experts_implementation("moekit")
    model.train()
    optimiser = _optimiser(model)
    order = iter(ShuffledPasses(len(data), schedule.steps * schedule.batch_size, schedule.seed))
    with _Balance(model) as balance:
        for step in range(schedule.steps):
            batch = [data[next(order)]["input_ids"] for _ in range(schedule.batch_size)]
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step)
            token_BT = torch.stack(batch).to(model.device)
            loss = model(input_ids=token_BT, labels=token_BT, use_cache=False).loss
            optimiser.zero_grad()
            (loss + balance.loss()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            balance.update()
            if told is not None:
                told(step + 1, loss.item())
    model.set_experts_implementation(before)
    model.eval()  # type: ignore[no-untyped-call]


class _Balance:
    """Even load in training, layer by layer: by a loss, or by the bias of routers that have one.

    The loss is Switch Transformer's (arXiv 2101.03961, eq. 4). That of transformers' OLMoE adds up
    the loads of all layers first, and lets experts of a layer die. The bias follows DeepSeek-V3
    (arXiv 2412.19437, sec. 2.1.2); transformers keeps it and never changes it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gates: list[Any] = list(find_gates(model).values())
        self.seen: dict[Any, tuple[Tensor, Tensor]] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _Balance:
        self.handles = [gate.register_forward_hook(self._keep) for gate in self.gates]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def loss(self) -> Tensor:
        """Mean over layers, of those without a bias."""
        losses = [
            logits_NE.shape[1] * (_load(logits_NE, expert_NK) @ logits_NE.softmax(1).mean(0))
            for gate, (logits_NE, expert_NK) in self.seen.items()
            if not _has_bias(gate)
        ]
        return BALANCE * torch.stack(losses).mean() if losses else torch.zeros(())

    def update(self) -> None:
        """Raise the bias of experts below the mean load of the step, lower that of the others."""
        for gate, (logits_NE, expert_NK) in self.seen.items():
            if _has_bias(gate):
                load_E = _load(logits_NE, expert_NK)
                gate.e_score_correction_bias += BIAS_RATE * (load_E.mean() - load_E).sign()
        self.seen.clear()

    def _keep(self, gate: Any, _: Any, output: Any) -> None:
        self.seen[gate] = (output[0].float(), output[2])


def _has_bias(gate: Any) -> bool:
    return hasattr(gate, "e_score_correction_bias")


def _load(logits_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """Choices of each expert a token (E,)."""
    count_E = expert_NK.flatten().bincount(minlength=logits_NE.shape[1])
    return count_E.float() / len(logits_NE)


def _common(size: Size, vocabulary: int, end: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "num_experts_per_tok": size.k,
        "max_position_embeddings": size.positions,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "use_cache": False,
    }


def _built(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
    return model


def _optimiser(model: PreTrainedModel) -> torch.optim.Optimizer:
    decayed = set(decayed_names(model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))
