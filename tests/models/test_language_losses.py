"""What the model is trained on: losses by hand, accumulation, and padding that counts nowhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from moekit import MoESpec, RouterZ, SwiGLU, SwitchBalance, TopK
from moekit.models.language import MoECausalLMOutput


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- losses -------------------------------------------------------------------------------------


def test_loss_equals_hand_computation(build, ids):
    weight = 0.25
    spec = MoESpec(TopK(k=2), SwiGLU(4, hidden=24), losses=(SwitchBalance(weight=weight),))
    model = build(spec).train()
    labels = ids.clone()
    labels[0, :5] = -100
    output = model(ids, labels=labels)
    negative = []
    for row in range(2):
        for position in range(10):
            target = labels[row, position + 1].item()
            if target != -100:
                scores = output.logits[row, position].tolist()
                total = math.log(sum(math.exp(s) for s in scores))
                negative.append(total - scores[target])
    assert output.cross_entropy.item() == pytest.approx(sum(negative) / len(negative), rel=1e-5)
    balance = 0.0
    for record in output.moe:
        probabilities = record.routing.logits_NE.softmax(-1)
        chosen = probabilities.topk(2).indices
        fraction = torch.stack([(chosen == e).any(1).float().mean() for e in range(4)])
        balance += 4 * (fraction * probabilities.mean(0)).sum().item()
    assert output.routing_losses["SwitchBalance"].item() == pytest.approx(balance, rel=1e-5)
    expected = sum(negative) / len(negative) + weight * balance
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert not output.routing_losses["SwitchBalance"].requires_grad


def test_evaluation_loss_is_the_cross_entropy_alone(layers, build, ids):
    output = build(layers)(ids, labels=ids)
    assert torch.equal(output.loss, output.cross_entropy)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_without_labels_nothing_is_lost(build, ids):
    output = build("top_k").train()(ids)
    assert output.loss is None
    assert output.cross_entropy is None
    assert output.routing_losses == {}
    assert len(output.moe) == 3


def test_accumulated_micro_batches_give_the_loss_and_gradients_of_the_whole(build):
    """z-loss is a mean over tokens, so that its micro-batches add up exactly like cross-entropy."""
    spec = MoESpec(TopK(k=2), SwiGLU(4, hidden=24), losses=(RouterZ(weight=0.5),))
    model = build(spec).train()
    ids = torch.randint(0, 61, (4, 9))
    whole = model(ids, labels=ids)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    targets = torch.tensor(4 * 8)
    total, means = torch.tensor(0.0), []
    for part in (ids[:1], ids[1:]):
        output = model(part, labels=part, num_items_in_batch=targets)
        output.loss.backward()
        total += output.loss.detach()
        means.append(output.cross_entropy.item() * part.shape[0])
    torch.testing.assert_close(total, whole.loss)
    assert sum(means) / 4 == pytest.approx(whole.cross_entropy.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_a_micro_batch_without_targets_adds_nothing_to_the_step(build, ids):
    model = build("top_k").train()
    output = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=20)
    assert output.loss.item() == 0
    assert output.cross_entropy.isnan()


def test_labels_shifted_by_the_caller_are_counted_as_they_are(build, ids):
    model = build("top_k").train()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    ours = model(ids, labels=ids, num_items_in_batch=40)
    theirs = model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=40)
    torch.testing.assert_close(theirs.loss, ours.loss)
    torch.testing.assert_close(theirs.cross_entropy, ours.cross_entropy)


def test_a_tuple_starts_with_loss_and_logits(build, ids):
    model = build("top_k")
    named = model(ids, labels=ids)
    assert isinstance(named, MoECausalLMOutput)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert next(iter(named)) == "loss"


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_influences_nothing(layers, build, ids, side, attention, training):
    """One row, so that even routers and capacities that see the whole batch see the same."""
    model = build(layers, attn_implementation=attention).train(training)
    row = ids[:1]
    pad = (4, 0) if side == "left" else (0, 4)
    padded, mask = F.pad(row, pad, value=5), F.pad(torch.ones_like(row), pad)
    labels = padded.masked_fill(mask == 0, -100)
    plain, found = model(row, labels=row), model(padded, attention_mask=mask, labels=labels)
    real = mask[0].bool()
    torch.testing.assert_close(found.logits[:, real], plain.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, plain.loss)
    assert found.routing_losses.keys() == plain.routing_losses.keys()
    for name, value in plain.routing_losses.items():
        torch.testing.assert_close(found.routing_losses[name], value)
    for ours, theirs in zip(found.moe, plain.moe, strict=True):
        assert torch.equal(ours.rows_E, theirs.rows_E)
        assert torch.equal(ours.dropped, theirs.dropped)
        assert torch.equal(ours.routing.load_E(), theirs.routing.load_E())
        assert ours.routing.valid_tokens() == theirs.routing.valid_tokens() == 11
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


def test_what_padding_holds_influences_nothing(causal_layers, build, ids):
    model = build(causal_layers)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 8:] = 0
    other = torch.where(mask == 0, (ids + 7) % 61, ids)
    labels = ids.masked_fill(mask == 0, -100)
    first = model(ids, attention_mask=mask, labels=labels)
    second = model(other, attention_mask=mask, labels=labels)
    real = mask.bool()
    torch.testing.assert_close(first.logits[real], second.logits[real])
    for name, value in first.routing_losses.items():
        torch.testing.assert_close(second.routing_losses[name], value)


def test_packed_sequences_do_not_attend_to_each_other(build, ids):
    model = build("top_k")
    position_ids = torch.cat([torch.arange(11), torch.arange(11)])[None]
    packed = model(ids.reshape(1, -1), position_ids=position_ids).logits
    torch.testing.assert_close(packed.view(2, 11, -1), model(ids).logits, atol=1e-5, rtol=1e-5)
