"""The studies' models and their training: balance, loss, and that transformers loads them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moekit.errors import DataError
from moekit.measure.gates import find_gates
from moekit.surgery import Budget, block_views, prune
from moekit.surgery.methods import DERN, HCSMoE, Method, Uncurl
from moekit.systems.compression import calibrated, compressed, drawn, loss_of
from moekit.systems.dern_experiment import SIZE, grown, shuffle_neurons
from moekit.systems.domain_models import (
    BALANCE,
    BIAS_RATE,
    FAMILIES,
    Schedule,
    Size,
    _Balance,
    fit,
    olmoe,
)

TINY = Size(width=16, hidden=8, layers=2, heads=2, experts=8, k=2, positions=32)
VOCABULARY, END = 40, 0


def blocks(count: int = 12, length: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row} for row in tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_and_the_result_is_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family](TINY, VOCABULARY, END, seed=1)
    same = FAMILIES[family](TINY, VOCABULARY, END, seed=1)
    for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True):
        assert a.equal(b)
    data, losses = blocks(), list[float]()
    before = loss_of(model, data)
    assert before == pytest.approx(math.log(VOCABULARY), rel=0.05)
    fit(
        model,
        data,
        Schedule(steps=60, batch_size=4, learning_rate=1e-2),
        lambda _, loss: losses.append(loss),
    )
    assert len(losses) == 60
    assert loss_of(model, data) < before - 0.3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loss_of(loaded, data) == pytest.approx(loss_of(model, data), rel=1e-5)
    (counts,) = {view.experts for view in block_views(loaded)}
    assert counts == TINY.experts


def test_rate() -> None:
    schedule = Schedule(steps=100, learning_rate=2.0)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.4)
    assert max(rates) == rates[4] == rates[5] == 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert schedule.rate(100) == pytest.approx(0.2)


def test_balance_loss_by_hand() -> None:
    model = olmoe(TINY, VOCABULARY, END)
    with torch.no_grad(), _Balance(model) as balance:
        model(input_ids=torch.stack([b["input_ids"] for b in blocks(3)]))
        wanted = []
        for logits_NE, expert_NK in balance.seen.values():
            mean_E = F.softmax(logits_NE, dim=1).mean(0)
            share = [float((expert_NK == e).sum()) / len(expert_NK) for e in range(8)]
            wanted.append(8 * sum(s * float(m) for s, m in zip(share, mean_E, strict=True)))
        assert len(wanted) == TINY.layers
        assert float(balance.loss()) == pytest.approx(BALANCE * sum(wanted) / len(wanted))
        balance.update()
        assert not balance.seen
    model(input_ids=blocks(1)[0]["input_ids"][None])
    assert not balance.seen  # the hooks are gone


def test_bias_moves_towards_even_load() -> None:
    model = FAMILIES["deepseek"](TINY, VOCABULARY, END)
    (gate,) = find_gates(model).values()
    with _Balance(model) as balance:
        model(input_ids=torch.stack([b["input_ids"] for b in blocks(3)]))
        _, expert_NK = balance.seen[gate]
        load = [int((expert_NK == e).sum()) for e in range(8)]
        assert float(balance.loss()) == 0
        balance.update()
    mean = sum(load) / 8
    wanted = [BIAS_RATE * ((n < mean) - (n > mean)) for n in load]
    bias_E = gate.e_score_correction_bias
    assert isinstance(bias_E, torch.Tensor)
    assert bias_E.tolist() == pytest.approx(wanted)


def test_loss_of_counts_every_token_once() -> None:
    model, data = olmoe(TINY, VOCABULARY, END).eval(), blocks(5)
    rows = []
    with torch.inference_mode():
        for block in data:
            logits_TV = model(input_ids=block["input_ids"][None]).logits[0].double()
            nats_TV = -logits_TV.log_softmax(1)
            rows += [float(nats_TV[t, block["input_ids"][t + 1]]) for t in range(15)]
    for batch_size in (1, 2, 5, 8):
        assert loss_of(model, data, batch_size) == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    with pytest.raises(DataError, match="no block"):
        loss_of(model, [])


def test_drawn() -> None:
    data = blocks(10)
    some = drawn(data, 4, seed=1)
    assert len({id(block) for block in some}) == 4
    assert len(drawn(data, 99, seed=1)) == 10
    assert [id(b) for b in drawn(data, 4, seed=1)] == [id(b) for b in some]
    assert [id(b) for b in drawn(data, 4, seed=2)] != [id(b) for b in some]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [DERN(alpha=-1.0), Uncurl(), HCSMoE()], ids=lambda m: m.name)
def test_in_memory_is_what_prune_writes(family: str, method: Method, tmp_path: Path) -> None:
    model, data = FAMILIES[family](TINY, VOCABULARY, END).eval(), blocks(8)
    made = compressed(model, method, 0.5, calibrated(model, data, [method]))
    assert set(made.experts) == {4}
    assert made.passed_on == pytest.approx(1)
    model.save_pretrained(tmp_path / "whole")
    prune(tmp_path / "whole", tmp_path / "half", method, Budget(ratio=0.5), data, batch_size=8)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    token_BT = torch.stack([block["input_ids"] for block in data])
    with torch.inference_mode():
        gap = made.model(input_ids=token_BT).logits - written(input_ids=token_BT).logits
    assert float(gap.abs().max()) < 1e-5


def test_upcycled_models_of_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise the grown model is the dense one; shuffling neurons changes nothing."""
    dense = olmoe(SIZE.replace(experts=1, k=1), 258, END, 3).eval()
    token_BT = torch.stack([block["input_ids"] for block in blocks(2)])
    monkeypatch.setattr("moekit.systems.dern_experiment.NOISE", 0.0)
    model = grown(dense, 1).eval()
    with torch.inference_mode():
        wanted = dense(input_ids=token_BT).logits
        assert torch.allclose(model(input_ids=token_BT).logits, wanted, atol=1e-5)
    monkeypatch.setattr("moekit.systems.dern_experiment.NOISE", 0.1)
    model = grown(dense, 1).eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.inference_mode():
        wanted = model(input_ids=token_BT).logits
    shuffle_neurons(model, 2)
    assert any(not v.equal(before[n]) for n, v in model.state_dict().items())
    with torch.inference_mode():
        assert torch.allclose(model(input_ids=token_BT).logits, wanted, atol=1e-5)
