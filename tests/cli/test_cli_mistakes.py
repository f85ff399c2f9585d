"""Every mistake of a user ends with one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Moekit
from safetensors.torch import load_file, save_file

from moekit.cli.checkpoint import load_model
from moekit.systems.planned import PLANNED


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of files that are of no use."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n ")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "short.txt").write_text("one two three")
    (folder / "latin.txt").write_bytes("à la carte ".encode("latin1") * 1000)
    (folder / "cut.json").write_text('{"kind": "MoESpec",')
    (folder / "rows.jsonl").write_text('{"message": "x"}\n' * 30)
    (folder / "none").mkdir()
    layer = {"kind": "MoESpec", "router": {"kind": "TopK", "k": 2}}
    bank = {"kind": "SwiGLU", "count": 4, "hidden": 8}
    bad = {
        "k": {**layer, "router": {"kind": "TopK", "k": 5}, "experts": bank},
        "capacity": {**layer, "experts": bank, "dispatch": {"kind": "Capacity", "factor": -1.0}},
        "router": {**layer, "router": {"kind": "TopQ"}, "experts": bank},
        "field": {**layer, "experts": {**bank, "hiden": 8}},
        "depth": {"kind": "Design", "name": "d", "layers": [bank | {"count": 1}] * 3},
    }
    for name, value in bad.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--designs=nothing", "'nothing' is no design"),
        ("--designs=remo", "did you mean remoe"),
        (f"--designs={PLANNED[0].name}", "not part of this version"),
        ("--designs=", "no design to compare"),
        ("--designs=topk,topk", "repeated: topk"),
        ("--designs=gone.json", "gone.json cannot be read"),
        ("--designs=broken/cut.json", "not a design in JSON"),
        ("--designs=broken/binary.txt.json", "cannot be read"),
        ("--designs=broken/k.json", "k is 5"),
        ("--designs=broken/capacity.json", "factor"),
        ("--designs=broken/router.json", "'TopQ' is not a RouterSpec"),
        ("--designs=broken/field.json", "did you mean hidden"),
        ("--designs=topk,broken/depth.json", "3 layer specs; the model has 2"),
        ("--k=5", "k is 5; wanted 1 to 4"),
        ("--k=-1", "k is -1"),
        ("--experts=0", "experts is 0"),
        ("--hidden=-8", "hidden is -8"),
        ("--width=0", "width is 0"),
        ("--heads=3", "no multiple of 3 heads"),
        ("--depth=-1", "depth is -1"),
        ("--steps=0", "steps is 0"),
        ("--batch-size=-2", "batch_size is -2"),
        ("--accumulate=3", "cannot be split into 3"),
        ("--seeds=0", "no seed"),
        ("--seed=-1", "seed is -1"),
        ("--match=luck", "match is 'luck'"),
        ("--precision=int4", "precision is 'int4'"),
        ("--learning-rate=-1", "learning_rate is -1"),
        ("--learning-rate=nan", "learning_rate is nan"),
        ("--vocab-size=5", "vocab_size"),
        ("--sequence-length=0", "sequence_length"),
        ("--sequence-length=100000", "sequence_length"),
        ("--device=gpu", "no device 'gpu'"),
        ("--device=meta", "no device 'meta'"),
        ("--device=cuda:99", "no device 'cuda:99'"),
        ("--report-to=paper", "report_to has 'paper'"),
        ("--report-to=mlflow", "report_to has mlflow, which is not installed"),
        ("--data=", "source is empty"),
        ("--tokenizer=./none", "tokenizer './none' does not exist"),
        ("--tokenizer=broken", "no tokenizer could be loaded"),
        ("--data=gone", "'gone' does not exist"),
        ("--data=broken/empty.txt", "is empty"),
        ("--data=broken/blank.txt", "is empty"),
        ("--data=broken/binary.txt", "binary"),
        ("--data=broken/latin.txt", "not UTF-8"),
        ("--data=broken/short.txt", "more text"),
        ("--data=broken/none", "no files"),
        ("--data=broken/*.nothing", "no files"),
        ("--data=broken/rows.jsonl", "has no column text"),
        ("--data=broken/rows.jsonl --text-column=mesage", "did you mean message"),
        ("--output=broken/empty.txt", "cannot write to broken/empty.txt"),
        ("--output=broken/empty.txt/x", "cannot write"),
        ("--output=broken", "not empty and holds no study"),
    ],
)
def test_compare(
    moekit: Moekit, tiny: list[str], broken: Path, tmp_path: Path, options: str, said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = moekit("compare", "--designs=topk", "--output=out", *tiny, *options.split(" "))
    assert said in ended.sentence
    assert ended.out == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert not (broken.parent / "out").exists()


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null", "/dev/null/x"])
def test_an_output_of_the_system(moekit: Moekit, tiny: list[str], folder: str) -> None:
    assert "cannot write to" in moekit("train", f"--output={folder}", *tiny).sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_without_permission(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in moekit("compare", "--output=out", *tiny).sentence
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--steps=many"],
        ["compare", "--hidden=4611686018427387904"],
        ["compare", "--vocab-size=10000000000000"],
        ["compare", "--no-such-option"],
        ["inspect"],
        ["reproduce"],
        ["nothing"],
    ],
)
def test_options_that_do_not_parse(moekit: Moekit, arguments: list[str]) -> None:
    ended = moekit(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Usage: moekit" in ended.err
    assert "Traceback" not in ended.err


def test_a_loss_that_is_no_number(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    wild = [*tiny, "--steps=30", "--learning-rate=1e9", "--output=out"]
    sentence = moekit("compare", "--designs=topk", *wild).sentence
    assert "stopped being finite at step " in sentence
    assert "the last finite loss was 5." in sentence
    assert "try a lower learning_rate than 1e+09" in sentence
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "out" / "report.html").exists()
    tamed = moekit("compare", "--designs=topk", *tiny, "--output=out")
    assert tamed.code == 0  # the folder held no results and is free again
    sentence = moekit("train", *wild[:-1], "--output=train").sentence
    assert "the last finite loss was" in sentence
    assert not (tmp_path / "train" / "model").exists()


def test_memory_that_is_not_there(moekit: Moekit, tiny: list[str]) -> None:
    ended = moekit("train", "--output=out", *tiny, "--width=1000000", "--hidden=1000000")
    assert "out of memory; use a smaller" in ended.sentence


def test_train_replaces_no_folder_of_others(
    moekit: Moekit, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("kept")
    assert "would be replaced" in moekit("train", "--output=out", *tiny).sentence
    assert (tmp_path / "out" / "model" / "thesis.txt").read_text() == "kept"


def test_another_study_or_run_in_the_folder(
    moekit: Moekit, tiny: list[str], study: Path, tmp_path: Path
) -> None:
    ended = moekit("compare", "--designs=moepp,topk", f"--output={study}", *tiny, "--steps=5")
    assert "study with other training" in ended.sentence
    assert moekit("train", "--output=out", *tiny).code == 0
    assert "another" in moekit("train", "--output=out", *tiny, "--width=32").sentence
    assert (tmp_path / "out" / "model").is_dir()


class _Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "router" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rename_tensor(folder: Path) -> None:
    """As many numbers as before, but one tensor under another name."""
    tensors = load_file(folder / "model.safetensors")
    tensors["something.else"] = tensors.pop(next(name for name in tensors if "router" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _strange_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nothing_known"}')


def _contradict_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layers"][0]["router"]["k"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(_Bomb(folder / "exploded"), folder / "pytorch_model.bin")


def _remote_code(folder: Path) -> None:
    (folder / "bomb.py").write_text(f"open({str(folder / 'exploded')!r}, 'w').close()\n")
    config = {
        "model_type": "bomb",
        "auto_map": {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate, _empty, _garbage, _drop_tensor, _drop_config, _break_config, _strange_config,
        _contradict_config, _drop_weights, _pickle, _remote_code,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_damaged_checkpoints(
    moekit: Moekit, checkpoint: Path, tmp_path: Path, damage: object
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    assert callable(damage)
    damage(folder)
    for command in (["inspect"], ["inspect", "--json"], ["generate", "--tokens=2"]):
        ended = moekit(command[0], folder, *command[1:])
        assert "damaged" in ended.sentence
        assert ended.out == ""
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_have_a_kernel_fetched(
    moekit: Moekit, checkpoint: Path, tmp_path: Path, key: str
) -> None:
    """transformers would download the kernel that a config names from the hub, and run it."""
    folder = tmp_path / "kernel"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, key: "kernels-community/flash-attn2"})
    )
    for command in (["inspect"], ["generate", "--tokens=2"]):
        ended = moekit(command[0], folder, *command[1:])
        assert ended.code == 0, ended.err
    assert load_model(str(folder)).config._attn_implementation == "sdpa"


def test_generate_with_a_tensor_of_another_name(
    moekit: Moekit, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    _rename_tensor(folder)
    assert "lacks model.layers" in moekit("generate", folder, "--tokens=2").sentence


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_checkpoints_that_are_none(
    moekit: Moekit, text: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "folder").mkdir()
    assert "no config.json" in moekit(command, "folder").sentence
    assert "not a folder" in moekit(command, text).sentence
    assert "not a folder" in moekit(command, "./gone").sentence
    assert "not a folder" in moekit(command, "a/b/c").sentence
    assert "hub" in moekit(command, "no-such-model").sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokens=0", "--tokens is 0"),
        ("--temperature=-1", "--temperature is -1"),
        ("--temperature=nan", "--temperature is nan"),
        ("--top-k=-1", "--top-k is -1"),
        ("--top-p=0", "--top-p is 0"),
        ("--repetition-penalty=0", "--repetition-penalty is 0"),
        ("--beams=0", "--beams"),
        ("--samples=2", "without sampling"),
        ("--device=gpu", "no device"),
        ("--prompt-file=gone", "gone cannot be read"),
        ("--prompt=x --prompt-file=gone", "not both"),
        ("--output=/dev/null/x", "cannot write"),
    ],
)
def test_generate(moekit: Moekit, checkpoint: Path, options: str, said: str) -> None:
    ended = moekit("generate", checkpoint, "--tokens=2", *options.split(" "))
    assert said in ended.sentence
    assert ended.out == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--batches=0", "--batches is 0"),
        ("--device=gpu", "no device"),
        ("--data=gone", "'gone' does not exist"),
        ("--sequence-length=1", "sequence_length"),
        ("--output=/dev/null/x", "cannot write"),
    ],
)
def test_inspect(
    moekit: Moekit, checkpoint: Path, text: Path, tmp_path: Path, options: str, said: str
) -> None:
    ended = moekit("inspect", checkpoint, f"--data={text}", *options.split(" "))
    assert said in ended.sentence
    assert list(tmp_path.iterdir()) == []


def test_inspect_of_a_model_without_routers(moekit: Moekit, tiny: list[str], text: Path) -> None:
    assert moekit("train", "--design=dense", "--output=out", *tiny).code == 0
    shown = moekit("inspect", "out/model")
    assert (shown.code, "No MoE layers." in shown.out) == (0, True)
    routed = ["--data", text, "--sequence-length=16"]
    assert "no MoE layers" in moekit("inspect", "out/model", *routed).sentence


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no design or system"),
        (PLANNED[0].name, "not part of"),
        ("dense", "has no experiment"),
    ],
)
def test_reproduce(moekit: Moekit, tmp_path: Path, name: str, said: str) -> None:
    assert said in moekit("reproduce", name).sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokens=0", "wanted numbers of at least 1"),
        ("--tokens=4,x", "--tokens has 'x'"),
        ("--tokens=4 --experts=2 --k=3", "--k is 3"),
        ("--tokens=4 --width=0", "--width is 0"),
        ("--width=256", "--width is for one layer"),
        ("--dtypes=float64", "known: float32, bfloat16, float16"),
        ("--dtypes=", "--dtypes is empty"),
        ("--mode=backward", "wanted one of forward, training, both"),
        ("--device=tpu", "there is no device 'tpu'"),
    ],
)
def test_bench(moekit: Moekit, tmp_path: Path, options: str, said: str) -> None:
    folder = tmp_path / "bench"
    ended = moekit("bench", "layer", "--output", str(folder), *options.split())
    assert said in ended.sentence
    assert not folder.exists()
