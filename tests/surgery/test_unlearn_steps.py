"""Steps of unlearning against loops over sequences and tokens, and what a report says of them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import Blocks, tiny
from test_unlearn import ALGORITHMS, SHORT, TEXTS, state_of
from test_unlearn_checkpoints import StoppedError, Stops
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moekit.errors import DataError, DivergedError
from moekit.surgery import block_views
from moekit.surgery.run_store import RunStore
from moekit.surgery.unlearn import (
    GA,
    NPO,
    RMU,
    Algorithm,
    Attributed,
    GDiff,
    Named,
    Reading,
    Texts,
    UnlearnSpec,
    attribute_experts,
    read,
    unlearn,
    unlearn_model,
)
from moekit.surgery.unlearn.loop import Loop, order_of
from moekit.surgery.unlearn.unlearn import _Run
from moekit.training import SilentProgress

EXPERTS = ((0, 3), (1, 3), (1, 5))
WEIGHTED = (
    GA(),
    GDiff(weight=2.5),
    NPO(beta=0.1, weight=3.0),
    RMU(layer=2, coefficient=7.0, weight=4.0),
    RMU(weight=0.5),
)
STEP = UnlearnSpec(
    targets=Named(experts=EXPERTS),
    anchor=1.7,
    steps=2,
    until=None,
    batch_size=3,
    accumulate=2,
    learning_rate=1e-2,
    max_grad_norm=1e9,
)


class Answers(Blocks):
    """Blocks of which the first tokens are prompts that nothing is to be learned of."""

    prompt = 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = super().__getitem__(index)
        labels = block["input_ids"].clone()
        labels[: self.prompt] = -100
        return {**block, "labels": labels}


ANSWERS = Texts(Answers(), Answers(seed=3), Answers(seed=4), Answers(seed=5))


def wide() -> PreTrainedModel:
    model = tiny("olmoe").double()
    model.set_experts_implementation("eager")  # transformers' grouped_mm takes no float64
    return model


def loop_on(model: PreTrainedModel, texts: Texts, spec: UnlearnSpec) -> tuple[Loop, list[Tensor]]:
    run = _Run(model, texts, spec, RunStore(None), SilentProgress())
    loop = Loop(model, run.trained, run.choice, spec, texts, RunStore(None), SilentProgress())
    return loop, run.trained.leaves


class BySequence:
    """The losses of one sequence at a time, in the words of the papers."""

    def __init__(self, model: PreTrainedModel, before: PreTrainedModel, spec: UnlearnSpec) -> None:
        self.model, self.before, self.spec = model, before, spec

    def nats(self, model: PreTrainedModel, block: dict[str, Tensor]) -> list[Tensor]:
        ids, mask = block["input_ids"], block["attention_mask"]
        labels = block.get("labels", ids)
        output = model(ids[None], attention_mask=mask[None])
        log_TV = output.logits[0].log_softmax(-1)
        return [
            -log_TV[t - 1, ids[t]]
            for t in range(1, len(ids))
            if mask[t] and mask[t - 1] and labels[t] != -100
        ]

    def cross_entropy(self, blocks: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([n for block in blocks for n in self.nats(self.model, block)]).mean()

    def hidden(self, model: PreTrainedModel, block: dict[str, Tensor], layer: int) -> Tensor:
        found: list[Any] = []
        base: Any = model.base_model
        handle = base.layers[layer].register_forward_hook(lambda *given: found.append(given[2]))
        base(block["input_ids"][None], attention_mask=block["attention_mask"][None])
        handle.remove()
        hidden_TD = (found[0][0] if isinstance(found[0], tuple) else found[0]).view(-1, 16)
        learned = block.get("labels", block["input_ids"]) != -100
        return hidden_TD[block["attention_mask"].bool() & learned]

    def hidden_of(
        self, model: PreTrainedModel, blocks: list[dict[str, Tensor]], layer: int
    ) -> Tensor:
        return torch.cat([self.hidden(model, block, layer) for block in blocks])

    def forget(self, blocks: list[dict[str, Tensor]], first: list[dict[str, Tensor]]) -> Tensor:
        algorithm = self.spec.algorithm
        if isinstance(algorithm, NPO):
            terms = []
            for block in blocks:
                with torch.no_grad():
                    reference = torch.stack(self.nats(self.before, block)).sum()
                gap = torch.stack(self.nats(self.model, block)).sum() - reference
                terms.append(-2 / algorithm.beta * torch.log(torch.sigmoid(algorithm.beta * gap)))
            return torch.stack(terms).mean()
        if isinstance(algorithm, RMU):
            layer = 1 if algorithm.layer is None else algorithm.layer  # the last selected one
            length = algorithm.coefficient
            if length is None:
                norms = self.hidden_of(self.before, first, layer).detach().float().norm(dim=-1)
                length = 10 * float(norms.mean())
            v_D = torch.rand(16, generator=torch.Generator().manual_seed(self.spec.seed))
            target_D = (length * v_D / v_D.norm()).double()
            return (self.hidden_of(self.model, blocks, layer) - target_D).square().mean()
        return -self.cross_entropy(blocks)

    def retain(self, blocks: list[dict[str, Tensor]]) -> Tensor:
        algorithm = self.spec.algorithm
        if isinstance(algorithm, RMU):
            layer = 1 if algorithm.layer is None else algorithm.layer
            with torch.no_grad():
                reference = self.hidden_of(self.before, blocks, layer)
            return (self.hidden_of(self.model, blocks, layer) - reference).square().mean()
        return self.cross_entropy(blocks)

    def anchor(self, blocks: list[dict[str, Tensor]]) -> Tensor:
        """Over every token of the forget text that is no padding, prompts too."""
        total = torch.zeros((), dtype=torch.float64)
        for layer in sorted({layer for layer, _ in EXPERTS}):
            gate: Any = self.model.get_submodule(f"model.layers.{layer}.mlp.gate")
            wanted_E = torch.zeros(8, dtype=torch.float64)
            wanted_E[[expert for at, expert in EXPERTS if at == layer]] = 1
            terms = []
            for block in blocks:
                seen: list[Tensor] = []
                handle = gate.register_forward_hook(
                    lambda _, args, __, seen=seen: seen.append(args[0])
                )
                self.nats(self.model, block)
                handle.remove()
                p_NE = F.linear(seen[0].flatten(0, -2), gate.weight).softmax(-1)
                terms.append((p_NE - wanted_E).square().sum(-1)[block["attention_mask"].bool()])
            total = total + torch.cat(terms).mean()
        return total if self.spec.anchor_reduction == "sum" else total / 8


def leaf_gradients(model: PreTrainedModel) -> list[Tensor]:
    """The gradients of the experts' slices and of the routers, in the order of the leaves."""
    found: list[Tensor] = []
    for layer, expert in EXPERTS:
        experts: Any = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        gate_up, half = experts.gate_up_proj.grad[expert], experts.gate_up_proj.shape[1] // 2
        parts = {"gate": gate_up[:half], "up": gate_up[half:]}
        parts["down"] = experts.down_proj.grad[expert]
        view = block_views(model)[layer]
        found += [parts[name] for name, _ in view.expert(expert).items()]
    gates: list[Any] = [model.get_submodule(f"model.layers.{layer}.mlp.gate") for layer in (0, 1)]
    return found + [gate.weight.grad for gate in gates]


@pytest.mark.parametrize("texts", [TEXTS, ANSWERS], ids=["texts", "answers"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("algorithm", WEIGHTED, ids=lambda a: f"{a.name}-{a.retain_weight}")
def test_the_gradients_of_a_step_are_those_of_a_loop(
    algorithm: Algorithm, reduction: Any, texts: Texts
) -> None:
    """Of the second step, when the model is no longer the one before."""
    spec = STEP.replace(algorithm=algorithm, anchor_reduction=reduction)
    model = wide()
    before = copy.deepcopy(model)
    loop, leaves = loop_on(model, texts, spec)
    with loop.trained.training():
        loop._step(1)
        now = copy.deepcopy(model).requires_grad_(True)
        now.zero_grad()
        loop._step(2)
        given = [leaf.grad for leaf in leaves]
    forget, retain = (
        [data[index] for index in order_of(data, spec, seed)]
        for data, seed in ((texts.forget, 0), (texts.retain, 1))
        if data is not None
    )
    losses = BySequence(now, before, spec)
    first = [texts.forget[index] for index in range(spec.batch_size)]
    for start in (6, 9):  # the second step's two batches
        part, kept = forget[start : start + 3], retain[start : start + 3]
        loss = losses.forget(part, first) + spec.anchor * losses.anchor(part)
        if algorithm.retain_weight:
            loss = loss + algorithm.retain_weight * losses.retain(kept)
        (loss / 2).backward()
    for ours, theirs in zip(given, leaf_gradients(now), strict=True):
        assert ours is not None
        # Norms of transformers' models work in float32, whatever the model; without one in
        # between, in the last layer, it is 1e-15.
        assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_a_step_is_adamw_with_decay_on_gradients_of_a_bounded_norm() -> None:
    spec = STEP.replace(algorithm=GA(), weight_decay=0.3, max_grad_norm=1e-5)
    model = wide()
    loop, leaves = loop_on(model, TEXTS, spec)
    old = [leaf.detach().clone() for leaf in leaves]
    with loop.trained.training():
        loop._step(1)
        gradients = [leaf.grad for leaf in leaves]
    norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
    assert float(norm) == pytest.approx(1e-5, rel=1e-4)
    for was, leaf, gradient in zip(old, leaves, gradients, strict=True):
        assert gradient is not None
        stepped = was * (1 - 1e-2 * 0.3) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(leaf.detach(), stepped, rtol=1e-9, atol=1e-12)


def test_narrow_models_are_trained_in_float32_and_gradients_of_before_are_dropped() -> None:
    found = []
    for stale in (False, True):
        model = tiny("olmoe").bfloat16()
        if stale:
            model(input_ids=TEXTS.forget[0]["input_ids"][None]).logits.sum().backward()
        loop, leaves = loop_on(model, TEXTS, STEP.replace(algorithm=GA()))
        assert {leaf.dtype for leaf in leaves} == {torch.float32}
        with loop.trained.training():
            loop._step(1)
        found.append(state_of(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def counted(model: PreTrainedModel, data: Blocks) -> tuple[float, float, int]:
    """Loss, accuracy and tokens, one token after another."""
    nats, right = [], 0
    for index in range(len(data)):
        block = data[index]
        ids, mask = block["input_ids"], block["attention_mask"]
        logits_TV = model(ids[None], attention_mask=mask[None]).logits[0].detach()
        for t in range(1, len(ids)):
            if mask[t] and mask[t - 1]:
                nats.append(-float(logits_TV[t - 1].log_softmax(-1)[ids[t]]))
                right += int(logits_TV[t - 1].argmax() == ids[t])
    return sum(nats) / len(nats), right / len(nats), len(nats)


def test_a_reading_is_a_count_token_by_token() -> None:
    model, data = tiny("olmoe"), Blocks(seed=9)
    found = read(model, data, batch_size=4)
    loss, accuracy, tokens = counted(model, data)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert (found.accuracy, found.tokens) == (pytest.approx(accuracy), tokens)


def test_the_report_is_what_is_read_before_and_after() -> None:
    model = tiny("olmoe")
    texts = [data for data in (TEXTS.forget_held_out, TEXTS.retain_held_out) if data is not None]
    first = [read(model, data, 2) for data in texts]
    scores_LE = attribute_experts(model, TEXTS.forget, batch_size=2)
    spec = SHORT.replace(learning_rate=5e-2, targets=Attributed(count=2))
    report = unlearn_model(model, TEXTS, spec)
    assert report.retain is not None
    for name, side, before, data in zip(
        ("forget", "retain"), (report.forget, report.retain), first, texts, strict=True
    ):
        after = read(model, data, 2)
        assert side == {"before": before.to_dict(), "after": after.to_dict()}
        assert before.loss != after.loss
        assert report.overlap[name] == before.overlap(after)
    assert report.overlap["forget"] != report.overlap["retain"]
    assert min(report.overlap["forget"]) < 1
    for chosen in report.experts:
        assert chosen.affinity == pytest.approx(float(scores_LE[chosen.layer, chosen.expert]))
    assert (report.looks[0].forget_nats, report.looks[-1].retain_nats) == (
        first[0].loss,
        read(model, texts[1], 2).loss,
    )


def test_perplexities_beyond_numbers_are_none_in_json() -> None:
    report = unlearn_model(tiny("olmoe"), TEXTS, SHORT)
    huge = Reading(800.0, 0.0, 1, ())
    assert huge.perplexity == math.inf
    side = {"before": report.forget["before"], "after": huge.to_dict()}
    found = type(report)(**{**vars(report), "forget": side}).to_dict()
    assert found["forget"]["after"]["perplexity"] is None
    assert found["forget"]["after"]["loss"] == 800.0
    json.dumps(found, allow_nan=False)


def test_a_run_that_diverges_leaves_the_model_as_it_was() -> None:
    model = tiny("olmoe")
    before = state_of(model)
    with pytest.raises(DivergedError):
        unlearn_model(model, TEXTS, SHORT.replace(algorithm=GA(), learning_rate=1e30, steps=20))
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


@pytest.mark.parametrize("change", ["labels", "attribution"])
def test_a_run_on_other_text_does_not_go_on(change: str, tmp_path: Path) -> None:
    """Other labels of the same tokens; or text that only attribution reads, so other experts."""
    tiny("olmoe").save_pretrained(tmp_path / "olmoe")
    spec = SHORT.replace(steps=4, batch_size=1, accumulate=1)
    one = Answers(count=40)
    with pytest.raises(StoppedError):
        unlearn(
            tmp_path / "olmoe",
            tmp_path / "out",
            Texts(one, TEXTS.retain, TEXTS.forget_held_out, TEXTS.retain_held_out),
            spec,
            reporter=Stops(at=3),
        )
    other = Answers(count=40)
    if change == "labels":
        other.prompt = 3
    else:
        drawn = set(order_of(other, spec, 0))
        for index in set(range(40)) - drawn:
            other.tokens[index] = 7
    texts = Texts(other, TEXTS.retain, TEXTS.forget_held_out, TEXTS.retain_held_out)
    told = Stops(at=-1)
    fresh = unlearn(tmp_path / "olmoe", tmp_path / "fresh", texts, spec)
    again = unlearn(tmp_path / "olmoe", tmp_path / "out", texts, spec, reporter=told)
    assert told.steps == [1, 2, 3, 4]
    assert again == fresh


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_text_with_nothing_to_learn_is_refused(algorithm: Algorithm) -> None:
    padding, prompts = Blocks(), Answers()
    padding.masks[:] = 0
    prompts.prompt = 12
    for data in (padding, prompts):
        texts = Texts(data, TEXTS.retain, TEXTS.forget_held_out, TEXTS.retain_held_out)
        spec = SHORT.replace(algorithm=algorithm, targets=Named(experts=((0, 1),)))
        with pytest.raises(DataError, match="no token to predict"):
            unlearn_model(tiny("olmoe"), texts, spec)


def test_misdirection_starts_from_the_first_text_that_is_no_padding() -> None:
    data = Blocks(count=8)
    data.masks[:4] = 0
    texts = Texts(data, TEXTS.retain, TEXTS.forget_held_out, TEXTS.retain_held_out)
    report = unlearn_model(tiny("olmoe"), texts, SHORT.replace(algorithm=RMU(weight=1.0)))
    assert report.changed > 0
