"""Upcycling from folder to folder: equal to that in memory, and whole or not at all."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_process import measured
from safetensors.torch import load_file, save_file
from test_upcycle_dense import DENSE, EVERY, dense_of, logits
from transformers import AutoModelForCausalLM, LlamaConfig

from moekit.errors import CheckpointError, OutputError, SpecError
from moekit.surgery import Upcycling, upcycle_checkpoint, upcycle_dense
from moekit.training import SilentProgress

SPEC = Upcycling(experts=3, k=2, reinit=0.25, noise=0.1, seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense_of(DENSE["llama"]).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return tmp_path / "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_the_weights_are_those_in_memory_to_the_bit(
    config: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("moekit.surgery.upcycle_dense")
    monkeypatch.setattr(module, "_SMALLEST_SHARD", 10_000)
    dense = dense_of(config).to(dtype)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", SPEC)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = upcycle_dense(dense, SPEC)
    assert type(found) is type(wanted)
    state = found.state_dict()
    for name, value in wanted.state_dict().items():
        assert state[name].dtype == value.dtype == dtype
        assert torch.equal(state[name], value), name


def test_plain_copies_start_as_the_dense_model(folder: Path, tmp_path: Path) -> None:
    upcycle_checkpoint(folder, tmp_path / "out", Upcycling(experts=4, k=2))
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(grown), logits(dense), rtol=1e-4, atol=1e-4)


def test_the_shared_expert_of_qwen_starts_at_nothing_and_learns() -> None:
    grown = upcycle_dense(dense_of(DENSE["qwen2"]), Upcycling(experts=4, k=2)).train()
    ids_BT = torch.arange(12).view(2, 6)
    grown(input_ids=ids_BT, labels=ids_BT).loss.backward()
    shared = grown.model.layers[0].mlp.shared_expert
    assert not bool(shared.down_proj.weight.any())
    assert bool(shared.down_proj.weight.grad.any())


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """The peak above what the process held before is a fraction of what is written."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    dense_of(config).save_pretrained(tmp_path / "dense", max_shard_size="30MB")
    facts = measured("upcycle_memory.py", tmp_path / "dense", tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    layer = size / 12
    # A shard that fills, a layer's experts, and their copy in the layout that is stored.
    assert facts["peak"] - facts["before"] < 20e6 + 3 * layer < size / 3, facts


def test_an_interrupted_run_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    class Stop(SilentProgress):
        def update(self, step: int, *rest: object) -> None:
            if step == 2:
                raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC, Stop())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    left = tmp_path / ".out.dead.part"  # of a process that was killed
    left.mkdir()
    upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    assert not left.exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(OutputError, match="is there already"):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)


def _change(folder: Path, change: Any) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if change(tensors):
            save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def _nan(tensors: dict[str, torch.Tensor]) -> bool:
    if NAME in tensors:
        tensors[NAME][0, 0] = torch.nan
    return NAME in tensors


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> bool:
    if NAME in tensors:
        tensors[NAME] = tensors[NAME][1:].clone()
    return NAME in tensors


def _missing(tensors: dict[str, torch.Tensor]) -> bool:
    return tensors.pop(NAME, None) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan, rf"\.safetensors: {NAME} holds NaN"),
        (_wrong_shape, rf"\.safetensors: {NAME} has shape \[23, 32\].*\[24, 32\]"),
        (_missing, NAME),
    ],
)
def test_damaged_tensors_are_named(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    _change(folder, change)
    with pytest.raises(CheckpointError, match=words):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_more_layers_than_the_config_says(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.[\w.]+, which is no part of"):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)


def test_what_older_versions_stored_beside_is_passed_over(folder: Path, tmp_path: Path) -> None:
    def older(tensors: dict[str, torch.Tensor]) -> bool:
        if NAME in tensors:
            tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return NAME in tensors

    _change(folder, older)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.layers.1.self_attn.rotary_emb.inv_freq"] = found["weight_map"][NAME]
    index.write_text(json.dumps(found))
    upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    assert (tmp_path / "out" / "config.json").is_file()


def test_other_bad_input(folder: Path, tmp_path: Path) -> None:
    (cut,) = list(folder.glob("*00002-of*.safetensors"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match=cut.name):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    cut.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CheckpointError, match="quantised"):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(SpecError, match="llama, mistral, qwen2, qwen3"):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        upcycle_checkpoint(folder, tmp_path / "out", SPEC)
    assert not list(tmp_path.iterdir())
