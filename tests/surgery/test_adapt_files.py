"""Adapters on disk, merged, and trained: what is kept, what is refused, what goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_models import CONFIGS, Blocks, tiny
from test_adapt_mixture import DENSE, SPEC, adapted, llama, logits, trained
from torch import Tensor
from transformers import PreTrainedModel

from moekit.errors import CheckpointError, DataError, DivergedError, OutputError, SpecError
from moekit.surgery import register_experts
from moekit.surgery.adapt import (
    AdaptSpec,
    FitSpec,
    adapter_of,
    adapter_parameters,
    fit_adapter,
    forced_expert,
    install_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from moekit.surgery.adapt.files import SETTINGS, WEIGHTS
from moekit.training import SilentProgress

EVERYWHERE = SPEC.replace(attention=True)
FIT = FitSpec(steps=6, batch_size=2, accumulate=2, learning_rate=1e-2, check_every=2)


def model_of(name: str) -> PreTrainedModel:
    found: PreTrainedModel = DENSE[name]() if name in DENSE else tiny(name)
    return found


def double(name: str) -> PreTrainedModel:
    """In float64, which transformers' grouped_mm does not take."""
    model = model_of(name)
    if name in CONFIGS and not name.startswith("moekit"):
        model.set_experts_implementation("eager")
    return model.double()


@pytest.mark.parametrize("name", [*DENSE, *CONFIGS])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = trained(install_adapter(model_of(name), EVERYWHERE))
    save_adapter(model, tmp_path / "adapter", base="my/model")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    assert set(weights) == set(adapter_parameters(model))
    again = load_adapter(model_of(name), tmp_path / "adapter")
    assert adapter_of(again) == EVERYWHERE
    assert torch.equal(logits(again), logits(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("name", [*DENSE, *CONFIGS])
def test_plain_lora_merges_exactly(name: str) -> None:
    model = trained(install_adapter(double(name), EVERYWHERE.replace(experts=1)))
    wanted = logits(model).detach()
    names = {n for n, _ in model_of(name).named_parameters()}
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-8, atol=1e-8)
    assert {n for n, _ in merged.named_parameters()} == names
    assert not torch.allclose(logits(merged), logits(double(name)), atol=1e-2)
    with pytest.raises(SpecError, match="no adapter"):
        adapter_of(merged)
    install_adapter(merged, SPEC)  # nothing was left behind


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_merges_into_what_it_computes_alone(name: str, expert: int) -> None:
    model = trained(install_adapter(double(name), EVERYWHERE))
    with forced_expert(model, expert):
        wanted = logits(model).detach()
    torch.testing.assert_close(logits(merge_adapter(model, expert)), wanted, rtol=1e-8, atol=1e-8)


def test_a_mixture_is_not_merged_in_silence() -> None:
    model = adapted()
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.gate_proj has 3 LoRA experts.*0 to 2"):
        merge_adapter(model)
    with pytest.raises(SpecError, match="expert is 3"):
        merge_adapter(model, 3)


def test_lora_on_fused_experts_under_every_implementation() -> None:
    register_experts()
    model = trained(install_adapter(tiny("mixtral"), EVERYWHERE))
    found = []
    for name in ("eager", "grouped_mm", "moekit"):
        model.set_experts_implementation(name)
        found.append(logits(model).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_size_is_refused_by_both_shapes(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "adapter", base="my/llama")
    other = install_adapter(llama(), SPEC.replace(rank=2))
    with pytest.raises(CheckpointError, match=r"lora_A is \(3, 4, 16\).*\(3, 2, 16\).*my/llama"):
        load_adapter(other, tmp_path / "adapter")
    wider = install_adapter(llama(), SPEC.replace(experts=5))
    with pytest.raises(CheckpointError, match=r"\(3, 16\).*\(5, 16\)|\(3, 4, 16\).*\(5, 4, 16\)"):
        load_adapter(wider, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="combine"):
        load_adapter(install_adapter(llama(), SPEC.replace(combine="soft")), tmp_path / "adapter")
    mixtral = tiny("mixtral")
    wanted = logits(mixtral)
    with pytest.raises(CheckpointError, match="made for my/llama"):
        load_adapter(mixtral, tmp_path / "adapter")
    assert torch.equal(logits(mixtral), wanted)
    install_adapter(mixtral, SPEC)  # nothing was left on it


def test_damaged_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(adapted(), folder)
    weights = load_file(folder / WEIGHTS)
    first = next(iter(weights))
    for change, words in (
        ({first: weights[first] * torch.nan}, f"{first} .* NaN"),
        ({first: None}, f"lacks {first}"),
        ({"more.lora_A": torch.ones(1)}, r"more\.lora_A"),
    ):
        kept = {n: t for n, t in (weights | change).items() if t is not None}
        save_file(kept, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=words):
            load_adapter(llama(), folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read"):
        load_adapter(llama(), folder)
    (folder / SETTINGS).write_text(json.dumps({"base": "x", "adapter": {"kind": "AdaptSpec"}})[:-3])
    with pytest.raises(CheckpointError, match=f"{SETTINGS} cannot be read"):
        load_adapter(llama(), folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(llama(), tmp_path / "nothing")


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        save_adapter(adapted(), tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
    save_adapter(adapted(), tmp_path / "adapter")
    save_adapter(adapted(SPEC.replace(rank=2)), tmp_path / "adapter")  # its own kind is replaced
    assert adapter_of(load_adapter(llama(), tmp_path / "adapter")).rank == 2


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    install_adapter(model, EVERYWHERE.replace(dropout=0.1))
    blocks = Blocks()
    report = fit_adapter(model, blocks, blocks, FIT.replace(steps=10))
    losses = [look.held_out_loss for look in report.looks]
    assert losses[-1] < losses[0]
    assert [look.step for look in report.looks] == [0, 2, 4, 6, 8, 10]
    assert report.trained == sum(p.numel() for p in adapter_parameters(model).values())
    own = {
        n.replace(".base_layer", "").replace(".base.", "."): p for n, p in model.named_parameters()
    }
    for parameter_name, value in before.items():
        assert torch.equal(own[parameter_name], value), parameter_name


def test_the_first_step_is_adamw_on_the_mean_over_predicted_tokens() -> None:
    spec = FIT.replace(steps=1, warmup=0.0, max_grad_norm=1e9)
    blocks = Blocks(count=4)
    ours, theirs = adapted(SPEC.replace(balance=0.0)), adapted(SPEC.replace(balance=0.0))
    fit_adapter(ours, blocks, blocks, spec)
    theirs.train()
    optimiser = torch.optim.AdamW(
        adapter_parameters(theirs).values(), lr=spec.learning_rate, weight_decay=0.0
    )
    ids_BT, mask_BT = blocks.tokens, blocks.masks
    logits_BTV = theirs(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
    valid_BT = (mask_BT[:, 1:] * mask_BT[:, :-1]).bool()
    nats = torch.nn.functional.cross_entropy(logits_BTV[valid_BT], ids_BT[:, 1:][valid_BT])
    nats.backward()
    optimiser.step()
    for (n, one), two in zip(
        adapter_parameters(ours).items(), adapter_parameters(theirs).values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5, msg=n)


class _Stop(SilentProgress):
    """Ends the run after a step, as control-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def update(self, step: int, *rest: Any) -> None:
        if step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_bits(after: int, tmp_path: Path) -> None:
    def start() -> PreTrainedModel:
        torch.manual_seed(7)
        return install_adapter(llama(), SPEC.replace(dropout=0.2))

    whole, broken, resumed = start(), start(), start()
    blocks = Blocks()
    wanted = fit_adapter(whole, blocks, blocks, FIT)
    with pytest.raises(KeyboardInterrupt):
        fit_adapter(broken, blocks, blocks, FIT, work=tmp_path, reporter=_Stop(after))
    found = fit_adapter(resumed, blocks, blocks, FIT, work=tmp_path)
    assert [look.held_out_loss for look in found.looks] == [
        look.held_out_loss for look in wanted.looks
    ]
    for one, two in zip(
        adapter_parameters(whole).values(), adapter_parameters(resumed).values(), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("change", ["labels", "a block in the middle"])
def test_a_run_on_other_text_does_not_go_on(change: str, tmp_path: Path) -> None:
    class Text(Blocks):
        learned = 0

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            block = super().__getitem__(index)
            labels = block["input_ids"].clone()
            labels[: self.learned] = -100
            return {**block, "labels": labels}

    one, other = Text(), Text()
    if change == "labels":
        other.learned = 6
    else:
        other.tokens[3] = 7
    with pytest.raises(KeyboardInterrupt):
        fit_adapter(install_adapter(llama(), SPEC), one, one, FIT, work=tmp_path, reporter=_Stop(5))
    torch.manual_seed(7)
    fresh = fit_adapter(install_adapter(llama(), SPEC), other, other, FIT)
    torch.manual_seed(7)
    again = fit_adapter(install_adapter(llama(), SPEC), other, other, FIT, work=tmp_path)
    assert again == fresh


def test_runs_that_cannot_be(tmp_path: Path) -> None:
    blocks = Blocks()
    with pytest.raises(SpecError, match="no adapter"):
        fit_adapter(llama(), blocks, blocks, FIT)
    with pytest.raises(DataError, match="held-out text is empty"):
        fit_adapter(adapted(), blocks, Blocks(count=0), FIT)
    model = adapted()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(DivergedError):
        fit_adapter(model, blocks, blocks, FIT)
    for field, value in (("steps", 0), ("learning_rate", 0.0), ("warmup", 1.0)):
        with pytest.raises(SpecError, match=field):
            FitSpec(**{field: value})
    assert AdaptSpec().scale == 2.0
    assert not list(tmp_path.iterdir())


def test_labels_say_what_is_predicted() -> None:
    class Answers(Blocks):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            block = super().__getitem__(index)
            labels = block["input_ids"].clone()
            labels[:-1] = -100
            return {**block, "labels": labels}

    model = adapted()
    report = fit_adapter(model, Answers(), Answers(), FIT.replace(steps=1))
    last = adapted()
    ids_BT, mask_BT = Answers().tokens, Answers().masks
    with torch.no_grad():
        at_BV = last(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -2]
    wanted = torch.nn.functional.cross_entropy(at_BV, ids_BT[:, -1])
    assert report.looks[0].held_out_loss == pytest.approx(float(wanted), rel=1e-5)
