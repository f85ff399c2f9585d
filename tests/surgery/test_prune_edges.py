"""Pruning where something is odd: types, masks, places, counts, seeds, statistics of others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_models import CONFIGS, VOCABULARY, Blocks, random_model, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moekit.errors import OutputError, SpecError
from moekit.measure.observe import token_batches
from moekit.surgery import Budget, PruneReport, block_views, prune, upcycle_checkpoint
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.methods import DERN, REAP, Frequency, HCSMoE, Method, MSMoE, Random, Uncurl
from moekit.surgery.prune import prune_model
from moekit.surgery.recorder import record, record_model
from moekit.surgery.shards import appearing
from moekit.surgery.upcycle_dense import Upcycling

HALF = Budget(ratio=0.5)


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    tiny("olmoe").save_pretrained(tmp_path / "olmoe")
    return tmp_path / "olmoe"


class PartlyMasked(Blocks):
    """Blocks of which only those with padding have a mask."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = super().__getitem__(index)
        if bool((block["attention_mask"] == 1).all()):
            del block["attention_mask"]
        return block


def test_blocks_without_a_mask_beside_blocks_with_one(olmoe: Path) -> None:
    found, wanted = (record(Checkpoint(olmoe), data) for data in (PartlyMasked(), Blocks()))
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens == int(Blocks().masks.sum())
        assert one.weight_E.equal(other.weight_E)


@pytest.mark.parametrize("method", [REAP(), DERN(alpha=0.1), HCSMoE()], ids=lambda m: m.name)
def test_parts_stored_in_several_types(method: Method, olmoe: Path, tmp_path: Path) -> None:
    """Gates in bfloat16 and the rest in float32, as some converted checkpoints have them."""
    path = olmoe / "model.safetensors"
    tensors = {
        name: value.bfloat16() if "gate_proj" in name or "up_proj" in name else value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    report = prune(olmoe, tmp_path / "out", method, HALF, Blocks())
    assert all(block.similarity is not None for block in report.blocks)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(small(input_ids=Blocks().tokens).logits.isfinite().all())


def test_the_folder_that_one_is_in_is_not_replaced(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (Path("."), tmp_path / "here", Path("../here")):
        with pytest.raises(OutputError, match="the folder that you are in"):
            prune(olmoe, place, Frequency(), HALF, Blocks())
        with pytest.raises(OutputError, match="the folder that you are in"), appearing(place):
            raise AssertionError("not reached")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("kind", [Random, Uncurl])
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_that_no_generator_takes(kind: Any, seed: int) -> None:
    with pytest.raises(SpecError, match=f"seed is {seed}; wanted 0 to"):
        kind(seed=seed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0; wanted at least 1"),
        ({"max_batches": -1}, "-1 batches are wanted at most"),
        ({"held_out_batches": -2}, "-2 batches are wanted at most"),
    ],
)
def test_batches_that_cannot_be(settings: dict[str, int], said: str, olmoe: Path) -> None:
    with pytest.raises(SpecError, match=said):
        prune(olmoe, olmoe.parent / "out", Frequency(), HALF, Blocks(), Blocks(), **settings)
    assert not (olmoe.parent / "out").exists()


@pytest.mark.parametrize(
    ("blocks", "size", "most"), [(7, 3, None), (7, 3, 2), (6, 3, 0), (1, 9, 5)]
)
def test_batches_are_the_blocks_in_order(blocks: int, size: int, most: int | None) -> None:
    data = Blocks(count=blocks)
    batches = list(token_batches(data, size, most))
    read = [row for batch in batches for row in batch.token_BT]
    wanted = list(data.tokens)[: None if most is None else size * most]
    assert len(read) == len(wanted)
    assert all(one.equal(other) for one, other in zip(read, wanted, strict=True))
    assert all(len(batch.token_BT) == size for batch in batches[:-1])


def test_counts_and_statistics_of_another_model() -> None:
    model = tiny("olmoe")
    stats = record_model(model, Blocks())
    for counts, given, said in (
        ([4, 4], stats, "got 2 numbers of experts for 3 MoE blocks"),
        ([4] * 3, stats[:1], "got 1 statistics for 3 MoE blocks"),
    ):
        with pytest.raises(SpecError, match=said):
            prune_model(model, Frequency(), counts, given)
    with pytest.raises(SpecError, match="reap needs the norms"):
        prune_model(model, REAP(), [4] * 3, stats)
    fewer = [dataclasses.replace(s, count_E=s.count_E[:6]) for s in stats]
    with pytest.raises(SpecError, match="has 8 experts of width 16, and these statistics are of 6"):
        prune_model(model, Frequency(), [4] * 3, fewer)
    narrow = [dataclasses.replace(s, input_SD=s.input_SD[:, :5]) for s in stats]
    with pytest.raises(SpecError, match="of width 5; record them with this model"):
        prune_model(model, Frequency(), [4] * 3, narrow)


def test_what_comes_with_a_result_is_there_when_it_appears(olmoe: Path, tmp_path: Path) -> None:
    """A stop while a report is made leaves no result, and the same call goes on."""
    output, seen = tmp_path / "out", list[PruneReport]()

    def stopped(made: Path, report: PruneReport) -> None:
        assert (made / "config.json").exists()
        assert not output.exists()
        seen.append(report)
        raise KeyboardInterrupt

    def written(made: Path, report: PruneReport) -> None:
        assert not output.exists()
        (made / "moekit_prune.json").write_text(json.dumps(report.to_dict()))

    with pytest.raises(KeyboardInterrupt):
        prune(olmoe, output, REAP(), HALF, Blocks(), finish=stopped)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "olmoe"]
    report = prune(olmoe, output, REAP(), HALF, Blocks(), finish=written)
    assert seen == [report]
    assert json.loads((output / "moekit_prune.json").read_text())["blocks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["olmoe", "out"]


def test_upcycling_gives_its_folder_before_it_appears(tmp_path: Path, dense: Path) -> None:
    def stopped(made: Path) -> None:
        assert (made / "config.json").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle_checkpoint(dense, tmp_path / "out", Upcycling(4, 2), finish=stopped)
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_keep_float32_however_a_result_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """A third is no number of bfloat16, and logits would say so."""
    config = CONFIGS["olmoe"]()
    config.intermediate_size = 24  # shares are twenty-fourths
    random_model(config).to(dtype).save_pretrained(tmp_path / "model")
    method = DERN(router="probability", alpha=-0.9)
    prune(tmp_path / "model", tmp_path / "out", method, HALF, Blocks())
    for wanted in (torch.float32, torch.bfloat16, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=wanted)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        shares = {n: b for n, b in loaded.named_buffers() if n.endswith("transfer_EK")}
        assert len(shares) == 3
        for name, value in shares.items():
            assert value.dtype == torch.float32
            assert value.equal(stored[name])
            assert not value.equal(value.bfloat16().float())
        expert = next(p for n, p in loaded.named_parameters() if "down_proj" in n)
        assert expert.dtype == (dtype if wanted == "auto" else wanted)


def test_probabilities_of_the_removed_are_lost_where_nothing_moves() -> None:
    """At alpha=1 a token's weight for an expert that is gone goes nowhere, and the rest stays."""
    model = tiny("olmoe").double()  # type: ignore[no-untyped-call]
    model.set_experts_implementation("eager")
    stats = record_model(model, Blocks())
    small, plans = prune_model(model, DERN(router="probability", alpha=1.0), [4] * 3, stats)
    small.inner.set_experts_implementation("eager")
    x_ND = torch.randn(20, 16, dtype=torch.float64)
    for view, made, plan in zip(block_views(model), block_views(small.inner), plans, strict=True):
        _, weight_NK, expert_NK = view.architecture.router_module(view.block)(x_ND)
        wanted = torch.zeros_like(x_ND)
        for token in range(20):
            for weight, expert in zip(weight_NK[token], expert_NK[token].tolist(), strict=True):
                if expert in plan.keep:
                    wanted[token] += weight * view.compute(view.expert(expert), x_ND[token])
        got = made.block(x_ND[None])
        got = got[0] if isinstance(got, tuple) else got
        torch.testing.assert_close(got[0], wanted, rtol=1e-6, atol=1e-9)


def test_fewer_experts_than_a_token_takes_where_rows_are_kept(olmoe: Path, tmp_path: Path) -> None:
    """Three of eight are chosen, and their weights pass to the two that are left."""
    for number, method in enumerate((MSMoE(allocation="uniform"), DERN(router="probability"))):
        out = tmp_path / f"out{number}"
        report = prune(olmoe, out, method, Budget(experts=2), Blocks())
        assert [block.experts for block in report.blocks] == [2, 2, 2]
        small = AutoModelForCausalLM.from_pretrained(out)
        assert bool(small(input_ids=Blocks().tokens).logits.isfinite().all())
    with pytest.raises(SpecError, match="2 experts are too few"):
        prune(olmoe, tmp_path / "other", REAP(), Budget(experts=2), Blocks())


def test_one_word_is_a_list_of_it() -> None:
    assert Method.named("dern", parts="up") == DERN(parts=("up",))
    assert Method.named("dern", parts=["up", "gate"]) == DERN(parts=("up", "gate"))
    with pytest.raises(SpecError, match="parts is"):
        Method.named("dern", parts="bias")
