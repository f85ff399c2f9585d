"""Unlearning checkpoints on disk: what is written, gone on with, refused, and left alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_models import CONFIGS, VOCABULARY, Blocks, tiny
from transformers import AutoModelForCausalLM

from moekit.errors import CheckpointError, DivergedError, OutputError
from moekit.surgery import Budget, prune
from moekit.surgery.methods import MSMoE
from moekit.surgery.unlearn import (
    GA,
    NPO,
    RMU,
    Algorithm,
    Everything,
    GDiff,
    Texts,
    UnlearnSpec,
    unlearn,
    unlearn_model,
)
from moekit.training import SilentProgress

TEXTS = Texts(Blocks(), Blocks(seed=3), Blocks(seed=4), Blocks(seed=5))
SHORT = UnlearnSpec(
    steps=3,
    until=None,
    check_every=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    batch_size=2,
    accumulate=2,
)
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
ALGORITHMS: list[Algorithm] = [GA(), GDiff(), NPO(beta=0.1), RMU(weight=1.0)]


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    tiny("olmoe").save_pretrained(tmp_path / "olmoe", max_shard_size="20KB")
    (tmp_path / "olmoe" / "tokenizer.json").write_text("{}")
    return tmp_path / "olmoe"


NARROW = [(name, "bfloat16") for name in ("olmoe", "gpt_oss", "deepseek_v3", "moekit_decoder")]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in CONFIGS), *NARROW])
def test_the_written_checkpoint_differs_in_the_trained_weights(
    name: str, dtype: str, tmp_path: Path
) -> None:
    tiny(name).to(getattr(torch, dtype)).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    files = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    report = unlearn(tmp_path / "model", tmp_path / "out", TEXTS, SHORT)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    different = 0
    for path, data in files.items():
        new = tmp_path / "out" / path.name
        if path.suffix != ".safetensors":
            assert new.read_bytes() == data
            continue
        before, after = load_file(path), load_file(new)
        assert before.keys() == after.keys()
        different += sum(int((after[key] != before[key]).sum()) for key in before)
    assert different == report.changed > 0.3 * report.trained
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    unlearn_model(model, TEXTS, SHORT)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[key]), key
    told = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    assert loaded.generate(IDS, **told).shape == (2, 16)


def test_every_parameter_of_a_checkpoint_with_tied_ends(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    spec = SHORT.replace(targets=Everything())
    unlearn(tmp_path / "model", tmp_path / "out", TEXTS, spec)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    unlearn_model(model, TEXTS, spec)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(t.equal(loaded.state_dict()[key]) for key, t in model.state_dict().items())


class StoppedError(Exception):
    """An interruption."""


class Stops(SilentProgress):
    """Stops a run before it ends."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps: list[int] = []

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        if loss is not None:
            self.steps.append(step)
            if step == self.at:
                raise StoppedError


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_an_interrupted_run_goes_on(algorithm: Algorithm, olmoe: Path, tmp_path: Path) -> None:
    spec = SHORT.replace(algorithm=algorithm, steps=7)
    whole = unlearn(olmoe, tmp_path / "whole", TEXTS, spec)
    with pytest.raises(StoppedError):
        unlearn(olmoe, tmp_path / "out", TEXTS, spec, reporter=Stops(at=5))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "olmoe", "whole"]
    told = Stops(at=-1)
    again = unlearn(olmoe, tmp_path / "out", TEXTS, spec, reporter=told)
    assert told.steps == [5, 6, 7]
    assert again == whole
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["olmoe", "out", "whole"]


def test_a_run_that_ended_is_not_run_again(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = sys.modules[unlearn.__module__]

    def full(*_: Any) -> None:
        raise OutputError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(where, "write_unlearned", full)
        with pytest.raises(OutputError, match="no space"):
            unlearn(olmoe, tmp_path / "out", TEXTS, SHORT)
    told = Stops(at=-1)
    again = unlearn(olmoe, tmp_path / "out", TEXTS, SHORT, reporter=told)
    assert told.steps == []
    assert again == unlearn(olmoe, tmp_path / "whole", TEXTS, SHORT)


def test_another_run_does_not_go_on_with_what_one_left(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        unlearn(olmoe, tmp_path / "out", TEXTS, SHORT, reporter=Stops(at=3))
    told = Stops(at=-1)
    unlearn(olmoe, tmp_path / "out", TEXTS, SHORT.replace(seed=1), reporter=told)
    assert told.steps == [1, 2, 3]


def test_a_run_that_diverges_writes_nothing(olmoe: Path, tmp_path: Path) -> None:
    spec = SHORT.replace(algorithm=GA(), learning_rate=1e30, steps=20)
    with pytest.raises(DivergedError, match="nothing is written"):
        unlearn(olmoe, tmp_path / "out", TEXTS, spec)
    assert not (tmp_path / "out").exists()


def test_a_model_pruned_to_unequal_layers_is_refused(olmoe: Path, tmp_path: Path) -> None:
    prune(olmoe, tmp_path / "pruned", MSMoE(), Budget(ratio=0.5), Blocks())
    with pytest.raises(CheckpointError, match="unlearn from the model before"):
        unlearn(tmp_path / "pruned", tmp_path / "out", TEXTS, SHORT)


def test_checkpoints_that_cannot_be_used(olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputError, match="is there already"):
        unlearn(olmoe, tmp_path / "out", TEXTS, SHORT)
    shard = next(path for path in sorted(olmoe.glob("*.safetensors")))
    tensors = load_file(shard)
    key = next(iter(tensors))
    tensors[key].view(-1)[0] = math.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{shard.name}: {key} holds NaN"):
        unlearn(olmoe, tmp_path / "other", TEXTS, SHORT)
    config = json.loads((olmoe / "config.json").read_text())
    (olmoe / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(CheckpointError, match="quantised"):
        unlearn(olmoe, tmp_path / "other", TEXTS, SHORT)
    assert not (tmp_path / "other").exists()
