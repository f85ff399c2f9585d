"""Calibration against counts by hand, without padding, block by block, and interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_process import measured
from safetensors.torch import load_file, save_file
from surgery_models import CONFIGS, WIDTH, Blocks, own_config, random_model, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit import HeavyBall, MoESpec, SwiGLU, TopK
from moekit.errors import CheckpointError, DataError, SpecError
from moekit.measure.observe import token_batches
from moekit.models.language import MoEDecoderConfig
from moekit.surgery import block_views
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.recorder import record, record_model
from moekit.surgery.statistics import BlockStatistics, Needs

ALL = Needs(norms=True, means=True, samples=20)
EXTRA = {
    "moekit_momentum": lambda: own_config(
        MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), residual=HeavyBall(mu=0.5)),
        SwiGLU(count=1, hidden=8),
        MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), residual=HeavyBall(mu=0.5)),
    )
}


def saved(model: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def by_hand(model: PreTrainedModel, data: Blocks) -> list[dict[str, Any]]:
    """The sums, token by token in Python, with the whole model in memory and one batch."""
    views = block_views(model)
    calls: list[Any] = [None] * len(views)
    hooks = []
    for place, view in enumerate(views):

        def keep(_: Any, x: Any, y: Any, place: int = place) -> None:
            calls[place] = (x[0].reshape(-1, WIDTH), y)

        router = view.architecture.router_module(view.block)
        hooks.append(router.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=data.tokens, attention_mask=data.masks)
    for hook in hooks:
        hook.remove()
    return [sums(v, *call, data.masks.flatten()) for v, call in zip(views, calls, strict=True)]


def sums(view: Any, x_ND: Tensor, output: Any, mask_N: Tensor) -> dict[str, Any]:
    routing = view.architecture.read("router", output)
    experts = view.experts
    found: dict[str, Any] = {
        "tokens": 0,
        "count": [0] * experts,
        "weight": [0.0] * experts,
        "norm": [0.0] * experts,
        "weighted": [0.0] * experts,
        "mean": torch.zeros(experts, WIDTH, dtype=torch.float64),
        "logits": [],
        "inputs": [],
    }
    for t in range(len(x_ND)):
        if not mask_N[t]:
            continue
        found["tokens"] += 1
        found["inputs"].append(x_ND[t])
        found["logits"].append(routing.logits_NE[t].double())
        for e, w in zip(routing.expert_NK[t].tolist(), routing.weight_NK[t].tolist(), strict=True):
            y_D = view.compute(view.expert(e), x_ND[t : t + 1])[0].double()
            found["count"][e] += 1
            found["weight"][e] += w
            found["norm"][e] += float(y_D.norm())
            found["weighted"][e] += w * float(y_D.norm())
        for e in range(experts):
            found["mean"][e] += view.compute(view.expert(e), x_ND[t : t + 1])[0].double()
    found["mean"] /= found["tokens"]
    return found


def check(got: BlockStatistics, want: dict[str, Any]) -> None:
    assert got.tokens == want["tokens"]
    assert got.count_E.tolist() == want["count"]
    assert got.weight_E.tolist() == pytest.approx(want["weight"], rel=1e-5)
    assert got.norm_E is not None
    assert got.weighted_norm_E is not None
    assert got.mean_ED is not None
    assert got.norm_E.tolist() == pytest.approx(want["norm"], rel=1e-4)
    assert got.weighted_norm_E.tolist() == pytest.approx(want["weighted"], rel=1e-4)
    torch.testing.assert_close(got.mean_ED, want["mean"], rtol=1e-3, atol=1e-5)
    logits_NE = torch.stack(want["logits"])
    torch.testing.assert_close(got.gram_EE, logits_NE.T @ logits_NE, rtol=1e-4, atol=1e-3)
    all_ND = torch.stack(want["inputs"])
    near = torch.cdist(got.input_SD, all_ND).argmin(-1)
    assert len(set(near.tolist())) == len(got.input_SD) == 20  # no token twice
    torch.testing.assert_close(got.input_SD, all_ND[near], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*CONFIGS, *EXTRA])
def test_block_by_block_equals_a_count_by_hand(name: str, tmp_path: Path) -> None:
    model = tiny(name) if name in CONFIGS else random_model(EXTRA[name]())
    data = Blocks()
    folder = saved(model, tmp_path, max_shard_size="20KB")
    got = record(Checkpoint(folder), data, ALL, batch_size=4)
    whole = record_model(model, data, ALL, batch_size=3)
    for block, other, want in zip(got, whole, by_hand(model, data), strict=True):
        check(block, want)
        check(other, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_at_a_time_gives_the_logits_of_the_whole_model(name: str, tmp_path: Path) -> None:
    saved(tiny(name).to(torch.bfloat16), tmp_path, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    blockwise = BlockwiseModel(Checkpoint(tmp_path))
    batches = list(token_batches(Blocks(), 3))
    states = blockwise.embed(batches)
    for index in range(len(blockwise.layers)):
        with blockwise.loaded(index):
            states = [blockwise.step(index, b, s) for b, s in zip(batches, states, strict=True)]
        assert all(p.is_meta for p in blockwise.layers[index].parameters())
    with blockwise.head(), torch.inference_mode():
        for batch, state in zip(batches, states, strict=True):
            valid_BT = batch.valid_N.view(batch.token_BT.shape)
            want = model(input_ids=batch.token_BT, attention_mask=batch.mask_BT).logits
            got = blockwise.logits(batch, state)
            # Both round every product to bfloat16; the sums may run in another order.
            torch.testing.assert_close(got[valid_BT], want[valid_BT], rtol=2e-2, atol=2e-2)


def test_padding_counts_for_nothing() -> None:
    """Other tokens under the padding change nothing."""
    model, data, other = tiny("qwen3_moe"), Blocks(), Blocks()
    other.tokens[other.masks == 0] = 7
    first, second = (record_model(model, d, ALL) for d in (data, other))
    for a, b in zip(first, second, strict=True):
        for key, value in a.tensors().items():
            torch.testing.assert_close(b.tensors()[key], value, rtol=1e-5, atol=1e-6)
    assert first[0].tokens == int(data.masks.sum())


def test_similarity_of_logits() -> None:
    model, data = tiny("olmoe"), Blocks()
    (block, *_), (want, *_) = record_model(model, data), by_hand(model, data)
    z_NE = torch.stack(want["logits"])
    for center in (False, True):
        shifted_NE = z_NE - z_NE.mean(-1, keepdim=True) if center else z_NE
        cosine = torch.nn.functional.cosine_similarity(
            shifted_NE.T[:, None], shifted_NE.T[None], dim=-1
        )
        torch.testing.assert_close(block.logit_similarity(center), cosine, rtol=1e-4, atol=1e-5)


class StoppedError(Exception):
    """An interruption."""


@pytest.mark.parametrize("name", ["deepseek_v3", *EXTRA])
def test_an_interrupted_recording_goes_on(name: str, tmp_path: Path) -> None:
    model = tiny(name) if name in CONFIGS else random_model(EXTRA[name]())
    checkpoint, data = Checkpoint(saved(model, tmp_path / "model")), Blocks()
    want = record(checkpoint, data, ALL, batch_size=2)
    seen: list[int] = []

    def stop_at(limit: int) -> Any:
        def tell(_: str, done: int, total: int | None) -> None:
            seen.append(done)
            assert total == 9
            if done == limit:
                raise StoppedError

        return tell

    for limit in (2, 5, 8):
        with pytest.raises(StoppedError):
            record(
                checkpoint, data, ALL, batch_size=2, work=tmp_path / "w", progress=stop_at(limit)
            )
    got = record(checkpoint, data, ALL, batch_size=2, work=tmp_path / "w", progress=stop_at(0))
    assert seen == [1, 2, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 7, 8, 9]
    for a, b in zip(got, want, strict=True):
        assert all(v.equal(b.tensors()[k]) for k, v in a.tensors().items())


def test_other_data_or_a_damaged_file_starts_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(saved(tiny("olmoe"), tmp_path / "model"))
    work = tmp_path / "w"
    record(checkpoint, Blocks(), work=work)
    first = list(work.iterdir())
    other = Blocks(seed=9)
    got = record(checkpoint, other, work=work)
    assert got[0].count_E.equal(record(checkpoint, other)[0].count_E)
    (folder,) = work.iterdir()
    assert [folder] != first
    path = folder / "recording.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert record(checkpoint, other, work=work)[0].count_E.equal(got[0].count_E)


def test_data_without_a_token_is_refused() -> None:
    data = Blocks(count=2)
    data.masks[:] = 0
    with pytest.raises(DataError, match="no token to calibrate with"):
        record_model(tiny("olmoe"), data)
    with pytest.raises(DataError, match="no token"):
        record_model(tiny("olmoe"), Blocks(count=0))


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """The peak above what the process held before is a fraction of the checkpoint."""
    config = MoEDecoderConfig(
        vocab_size=64,
        hidden_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        pad_token_id=0,
        layers=MoESpec(TopK(k=2), SwiGLU(count=8, hidden=1024)),
    )
    model = random_model(config)
    saved(model, tmp_path / "model", max_shard_size="30MB")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    block = size / 12
    del model
    facts = measured("recorder_memory.py", tmp_path / "model")
    assert facts["blocks"] == 12
    activations = facts["state_bytes"] * 3
    assert size > 5 * (2 * block)
    assert facts["peak"] - facts["before"] < 2 * block + activations, facts
    assert facts["peak"] - facts["before"] < size / 4, facts


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return saved(tiny("mixtral"), tmp_path / "m", max_shard_size="20KB")


def holder(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def resave(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = holder(sharded, EXPERT)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{path.name} is cut off: \S+ ends at"):
        Checkpoint(sharded)


def test_a_shard_cut_off_later_is_named(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    path = holder(sharded, EXPERT)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{path.name} is cut off within \S+"):
        record(checkpoint, Blocks())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = saved(tiny("mixtral"), tmp_path)
    resave(folder / "model.safetensors", lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=f"incomplete.*{EXPERT} of shape"):
        Checkpoint(folder)


def test_nan_weights_are_named(sharded: Path) -> None:
    path = holder(sharded, EXPERT)
    resave(path, lambda tensors: tensors[EXPERT][0].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{path.name}: {EXPERT} holds NaN"):
        record(Checkpoint(sharded), Blocks())


def test_a_config_that_contradicts_a_tensor_is_named(sharded: Path) -> None:
    path = sharded / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(CheckpointError, match=r"model-\S+: model\.\S+ has shape .* makes it"):
        Checkpoint(sharded)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 9}))
    with pytest.raises(CheckpointError, match=r"has shape|describes \S+experts\.8"):
        Checkpoint(sharded)


def test_quantised_weights_are_refused(sharded: Path) -> None:
    path = sharded / "config.json"
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(CheckpointError, match=r"config\.json says that the weights are quantised"):
        Checkpoint(sharded)


def test_a_packed_tensor_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("mixtral"), tmp_path)
    resave(
        folder / "model.safetensors",
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
    )
    with pytest.raises(CheckpointError, match=f"{EXPERT} is F8_E4M3, a packed type"):
        Checkpoint(folder)


def test_infinite_logits_are_refused() -> None:
    model = tiny("olmoe")
    with torch.no_grad():
        model.get_submodule("model.layers.1.post_attention_layernorm").weight.fill_(1e38)
    with pytest.raises(CheckpointError, match=r"router of model\.layers\.1\.mlp gives logits"):
        record_model(model, Blocks())


def test_a_missing_folder_and_a_foreign_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(SpecError, match="'gpt2' cannot be operated on; supported: mixtral"):
        Checkpoint(tmp_path)
