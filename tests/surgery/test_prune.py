"""Pruning checkpoints on disk: what is written, reported, refused, and left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_models import CONFIGS, VOCABULARY, Blocks, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moekit.errors import CheckpointError, DataError, OutputError
from moekit.measure import inspect_checkpoint
from moekit.surgery import block_views
from moekit.surgery.budget import Budget
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.evaluate import evaluate
from moekit.surgery.methods import DERN, REAP, Frequency, HCSMoE, Method, MSMoE, Random, Uncurl
from moekit.surgery.prune import prune, prune_model
from moekit.surgery.pruned import PrunedMoEForCausalLM
from moekit.surgery.recorder import record, record_model

DATA, HELD_OUT = Blocks(), Blocks(seed=7)
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
HALF = Budget(ratio=0.5)
METHODS: list[Method] = [
    Random(),
    REAP(allocation="global"),
    DERN(alpha=0.1),
    DERN(alpha=0.1, router="probability"),
    Uncurl(),
    HCSMoE(),
    MSMoE(),
    MSMoE(router="average", allocation="uniform"),
]


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    tiny("olmoe").save_pretrained(tmp_path / "olmoe", max_shard_size="20KB")
    (tmp_path / "olmoe" / "tokenizer.json").write_text("{}")
    return tmp_path / "olmoe"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.to_dict().get('router')}")
def test_saved_loaded_and_generating(method: Method, olmoe: Path, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in olmoe.iterdir()}
    report = prune(olmoe, tmp_path / "out", method, HALF, DATA, HELD_OUT, batch_size=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    counts = [block.experts for block in report.blocks]
    ordinary = not method.reroutes and len(set(counts)) == 1
    assert report.ordinary == ordinary
    assert (type(loaded) is PrunedMoEForCausalLM) == (not ordinary)
    model = tiny("olmoe")
    small, _ = prune_model(model, method, counts, record_model(model, DATA, method.needs))
    told = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert loaded.generate(IDS, **told).equal(small.generate(IDS, **told))
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, small(IDS).logits, rtol=1e-4, atol=1e-4)
    assert sum(counts) == 12
    if method.allocation == "uniform":
        assert counts == [4, 4, 4]
    assert report.before is not None
    assert report.after is not None
    stored = inspect_checkpoint(tmp_path / "out")
    assert report.after.parameters == stored.total < report.before.parameters
    assert report.after.bytes == stored.stored_bytes < report.before.bytes
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert {path: path.read_bytes() for path in olmoe.iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["olmoe", "out"]


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_all_writes_the_same_tensors(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "model")
    report = prune(tmp_path / "model", tmp_path / "out", MSMoE_or_reap(name), Budget(ratio=1), DATA)
    assert report.ordinary
    assert report.before is None
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "out"))
    assert old.keys() == new.keys()
    assert all(new[key].equal(value) for key, value in old.items())


def MSMoE_or_reap(name: str) -> Method:
    return REAP() if name.startswith("moekit") else MSMoE()


def test_perplexity_is_that_of_the_whole_model(olmoe: Path) -> None:
    model, total, count = tiny("olmoe"), 0.0, 0
    for row, mask in zip(HELD_OUT.tokens, HELD_OUT.masks, strict=True):
        with torch.no_grad():
            logits = model(row[None], attention_mask=mask[None]).logits[0].double()
        for t in range(1, len(row)):
            if mask[t] and mask[t - 1]:
                total -= float(F.log_softmax(logits[t - 1], dim=-1)[row[t]])
                count += 1
    found = evaluate(Checkpoint(olmoe), HELD_OUT, batch_size=4)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.expert_seconds_per_token > 0
    with pytest.raises(DataError, match="no token to predict"):
        evaluate(Checkpoint(olmoe), Blocks(count=0))


def test_similarity_of_removed_to_kept_experts(olmoe: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(olmoe)
    report = prune(olmoe, tmp_path / "out", Frequency(), HALF, DATA)
    stats = record(Checkpoint(olmoe), DATA)
    for block, view, stat in zip(report.blocks, block_views(model), stats, strict=True):
        removed = [e for e in range(8) if e not in block.kept]
        best = []
        for e in removed:
            y = view.compute(view.expert(e), stat.input_SD)
            others = [view.compute(view.expert(k), stat.input_SD) for k in block.kept]
            best.append(max(float(F.cosine_similarity(y, o).mean()) for o in others))
        assert block.similarity == pytest.approx(sum(best) / 4, abs=1e-4)
        assert block.passed_on == 0.0


class StoppedError(Exception):
    """An interruption."""


def test_an_interrupted_run_goes_on(olmoe: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def tell(what: str, done: int, _: int | None) -> None:
        said.append(f"{what} {done}")
        if len(said) == 4:
            raise StoppedError

    settings: dict[str, Any] = {"batch_size": 2, "progress": tell}
    with pytest.raises(StoppedError):
        prune(olmoe, tmp_path / "out", REAP(), HALF, DATA, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "olmoe"]
    prune(olmoe, tmp_path / "out", REAP(), HALF, DATA, **settings)
    assert said[:4] == [f"recording block {b} {d}" for b, d in ((0, 1), (0, 2), (0, 3), (1, 4))]
    assert said[4:] == [f"recording block {(d - 1) // 3} {d}" for d in range(4, 10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["olmoe", "out"]
    whole = prune(olmoe, tmp_path / "whole", REAP(), HALF, DATA, batch_size=2)
    again = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert again[key].equal(value)
    assert whole.calibration_tokens == int(DATA.masks.sum())


@pytest.mark.parametrize("during", ["evaluating before", "evaluating after"])
def test_a_run_that_stops_in_its_comparison_goes_on(
    during: str, olmoe: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    stops = True

    def tell(what: str, *_: int | None) -> None:
        said.append(what)
        if stops and what == during:
            raise StoppedError

    settings: dict[str, Any] = {"batch_size": 2, "progress": tell}
    with pytest.raises(StoppedError):
        prune(olmoe, tmp_path / "out", REAP(), HALF, DATA, DATA, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "olmoe"]
    stops = False
    said.clear()
    again = prune(olmoe, tmp_path / "out", REAP(), HALF, DATA, DATA, **settings)
    assert not any(what.startswith("recording") for what in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["olmoe", "out"]
    whole = prune(olmoe, tmp_path / "whole", REAP(), HALF, DATA, DATA, batch_size=2)
    assert (again.blocks, again.before is None) == (whole.blocks, False)
    assert again.after is not None
    assert whole.after is not None
    assert again.after.loss == whole.after.loss


def test_bad_inputs_leave_nothing_behind(olmoe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    index = json.loads((olmoe / "model.safetensors.index.json").read_text())
    path = olmoe / index["weight_map"][name]
    whole = path.read_bytes()
    tensors = load_file(path)
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{path.name}: {name} holds NaN"):
        prune(olmoe, tmp_path / "out", REAP(), HALF, DATA)
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=f"{path.name} is cut off"):
        prune(olmoe, tmp_path / "out", REAP(), HALF, DATA)
    path.write_bytes(whole)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no token to calibrate"):
        prune(olmoe, tmp_path / "out", REAP(), HALF, Blocks(count=0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(OutputError, match="is there already"):
        prune(olmoe, tmp_path / "full", REAP(), HALF, DATA)
    with pytest.raises(CheckpointError, match="is not a folder, and cannot be fetched"):
        prune(tmp_path / "none", tmp_path / "out", REAP(), HALF, DATA)


def test_a_model_pruned_to_unequal_layers_is_not_pruned_again(olmoe: Path, tmp_path: Path) -> None:
    prune(olmoe, tmp_path / "out", MSMoE(), HALF, DATA)
    assert evaluate(Checkpoint(tmp_path / "out"), HELD_OUT).loss > 0
    with pytest.raises(CheckpointError, match="start from the model before"):
        prune(tmp_path / "out", tmp_path / "again", REAP(), HALF, DATA)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "model")
    checkpoint, needs = Checkpoint(tmp_path / "model"), REAP().needs
    slow, fast = (record(checkpoint, DATA, needs, device=d) for d in ("cpu", "cuda"))
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(b.gram_EE, a.gram_EE, rtol=1e-2, atol=1e-1)
        assert int((a.count_E - b.count_E).abs().sum()) <= 4  # near ties
    report = prune(checkpoint.folder, tmp_path / "out", REAP(), HALF, DATA, HELD_OUT, device="cuda")
    assert report.before is not None
    want = evaluate(checkpoint, HELD_OUT)
    assert report.before.loss == pytest.approx(want.loss, rel=1e-2)
