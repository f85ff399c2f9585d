"""The structure of checkpoints against their stored tensors, and every way a file can be bad."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny_model

from moekit import Bank, Copy, MoESpec, SwiGLU, TopK, Zero
from moekit.errors import CheckpointError
from moekit.measure import CheckpointStructure, inspect_checkpoint, parameter_counts
from moekit.measure.structure import PARTS
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

EXPERTS = re.compile(r"\.experts\.|(?<!shared_mlp)\.(input|output)_linear\.")
ROUTER = re.compile(r"\.(gate|router)\.(weight|bias|layer\.weight)$")
SHARED = re.compile(r"shared")
MOE_LAYERS = {"qwen2_moe": 1, "deepseek_v2": 1, "deepseek_v3": 1}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("mixtral").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_what_is_stored(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    size = {key: t.numel() for key, t in stored.items() if "correction_bias" not in key}
    got = inspect_checkpoint(tmp_path)

    def total(pattern: re.Pattern[str]) -> int:
        return sum(n for key, n in size.items() if pattern.search(key))

    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    routed = total(EXPERTS)
    assert tuple(got.parameters) == PARTS
    assert got.total == sum(size.values()) == sum(got.parameters.values())
    assert got.parameters["experts"] == routed
    assert got.parameters["router"] == total(ROUTER)
    assert got.parameters["shared experts"] == total(SHARED)
    assert got.parameters["embedding"] == size["model.embed_tokens.weight"]
    assert got.parameters["head"] == size.get("lm_head.weight", 0)
    assert got.parameters["norm"] == total(re.compile("norm"))
    assert got.parameters["attention"] == total(re.compile(r"attn\.(?!.*norm)"))
    assert got.parameters["other"] == 0
    assert got.active == got.total - routed + routed * config.num_experts_per_tok // experts
    assert len(got.moe_layers) == MOE_LAYERS.get(name, 2)
    for layer in got.moe_layers:
        assert (layer.experts, layer.top_k) == (experts, config.num_experts_per_tok)
        assert layer.expert_parameters * experts * len(got.moe_layers) == routed
    assert got.architecture == type(model).__name__
    assert (got.hidden_size, got.layers, got.vocabulary) == (16, 2, 48)
    assert got.stored_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert got.stored_dtypes == {"F32": sum(t.numel() for t in stored.values())}


def test_a_checkpoint_of_ours_with_a_mixed_bank(tmp_path: Path) -> None:
    bank = Bank((SwiGLU(count=3, hidden=8), Copy(1), Zero(1)))
    config = MoEDecoderConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        layers=[
            SwiGLU(count=1, hidden=20),
            MoESpec(TopK(k=2), bank),
            MoESpec(TopK(k=1), SwiGLU(count=4, hidden=8), shared=SwiGLU(count=1, hidden=4)),
        ],
    )
    model = MoEDecoderForCausalLM(config)
    model.save_pretrained(tmp_path)
    got, counts = inspect_checkpoint(tmp_path), parameter_counts(model)
    assert (got.total, got.active) == (counts.total, counts.active)
    assert [layer.experts for layer in got.moe_layers] == [5, 4]
    assert [layer.top_k for layer in got.moe_layers] == pytest.approx([2 * 3 / 5, 1])
    assert [layer.expert_parameters for layer in got.moe_layers] == [384, 384]
    assert [layer.shared_parameters for layer in got.moe_layers] == [0, 192]
    assert got.parameters["experts"] == counts.experts == 7 * 384
    assert got.parameters["router"] == counts.router
    assert got.parameters["dense feed-forward"] == 3 * 16 * 20
    assert got.parameters["shared experts"] == 192


def test_shards_give_what_one_file_gives(mixtral: Path, sharded: Path) -> None:
    one, many = inspect_checkpoint(mixtral), inspect_checkpoint(str(sharded))
    assert one.parameters == many.parameters
    assert one.stored_bytes == many.stored_bytes


def test_a_half_precision_checkpoint_says_so(tmp_path: Path) -> None:
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(tmp_path)
    got = inspect_checkpoint(tmp_path)
    assert got.stored_dtypes == {"BF16": got.total}
    assert got.stored_bytes == 2 * got.total


def test_a_quantised_checkpoint_is_not_called_incomplete(mixtral: Path) -> None:
    path = mixtral / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))
    _resave(mixtral, lambda tensors: {k: t.to(torch.uint8)[..., ::2] for k, t in tensors.items()})
    assert inspect_checkpoint(mixtral).stored_dtypes.keys() == {"U8"}


def _resave(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def fails(folder: Path | str, *wanted: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for text in wanted:
        assert text in message


def test_a_missing_folder(tmp_path: Path) -> None:
    fails(tmp_path / "nothing", "nothing is not a folder")
    fails("./nothing", "not a folder")


def test_a_file_in_place_of_a_folder(mixtral: Path) -> None:
    fails(mixtral / "config.json", "config.json is not a folder")


def test_a_hub_name_without_network() -> None:
    fails("nobody/no-such-model", "nobody/no-such-model", "hub within reach")


def test_no_config(mixtral: Path) -> None:
    (mixtral / "config.json").unlink()
    fails(mixtral, "no config.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "no-such-type"}', '{"model_type": 3}', "{}"]
)
def test_a_damaged_config(mixtral: Path, text: str) -> None:
    (mixtral / "config.json").write_text(text)
    fails(mixtral, "config.json")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_local_experts": -1}, {"num_attention_heads": 0}]
)
def test_a_config_that_makes_no_model(mixtral: Path, change: dict[str, object]) -> None:
    path = mixtral / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(mixtral, "config.json")


def test_code_beside_a_checkpoint_is_not_run(mixtral: Path, tmp_path: Path) -> None:
    (mixtral / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')")
    path = mixtral / "config.json"
    extra = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    fails(mixtral, "config.json")
    assert not (tmp_path / "ran").exists()


def test_no_weights_and_pickled_weights(mixtral: Path) -> None:
    (mixtral / "model.safetensors").unlink()
    fails(mixtral, "holds no weights")
    (mixtral / "pytorch_model.bin").write_bytes(b"x")
    fails(mixtral, "pickled weights only")


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_a_truncated_header(mixtral: Path, keep: int) -> None:
    path = mixtral / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(mixtral, "model.safetensors is cut off")


def test_truncated_data_names_the_tensor(mixtral: Path) -> None:
    path = mixtral / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    fails(mixtral, "model.safetensors is cut off", last)


def _with_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"w": {"dtype": "F32"}}', "entry for w is malformed"),
        (b'{"w": 3}', "entry for w is malformed"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "w is F32 of shape [2]"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "damaged: w"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}', "cut off: w ends"),
    ],
)
def test_a_damaged_header(mixtral: Path, header: bytes, text: str) -> None:
    _with_header(mixtral / "model.safetensors", header, b"\0" * 4)
    fails(mixtral, "model.safetensors", text)


def test_a_lacking_tensor_makes_a_checkpoint_incomplete(mixtral: Path) -> None:
    _resave(mixtral, lambda tensors: {k: t for k, t in tensors.items() if "lm_head" not in k})
    fails(mixtral, "incomplete", "13,008 parameters")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    fails(sharded, f"{shard.name} is missing")


def test_a_shard_that_lacks_a_tensor(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != name}, shard)
    fails(sharded, shard.name, f"lacks {name}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    fails(sharded, "index.json is damaged")


def test_an_index_cannot_point_out_of_the_folder(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    fails(sharded, "not a file beside it")


def test_no_weight_is_read(mixtral: Path) -> None:
    """Data full of other numbers gives the same structure."""
    before: CheckpointStructure = inspect_checkpoint(mixtral)
    path = mixtral / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert inspect_checkpoint(mixtral) == before
