"""Every command, when all is well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Moekit
from rich.console import Console
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import moekit as package
from moekit.cli import compare as compare_module
from moekit.cli.main import build
from moekit.cli.systems import _measures
from moekit.systems import baselines, systems

COMMANDS = (
    "compare",
    "train",
    "inspect",
    "generate",
    "systems",
    "reproduce",
    "bench layer",
)


def strict(text: str) -> Any:
    """JSON without NaN and infinity, which are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_on_lines_of_their_own(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(build(), [*command.split(), "--help"])
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.output.splitlines()]
    examples = lines[lines.index("Examples:") + 1 :]
    found = [line for line in examples if line]
    assert len(found) >= 2
    assert all(line.startswith(("moekit ", "torchrun ")) for line in found)  # none is wrapped
    assert any(line.startswith(f"moekit {command}") for line in found)
    assert "--json" in shown.output


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option in an example is one that the command has."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(build(), [*command.split(), "--help"]).output
    options, _, examples = shown.partition("Examples:")
    for word in examples.split():
        if word.startswith("--") and word != "--nproc-per-node":
            assert f"{word} " in options


def test_common_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command in COMMANDS:
        shown = CliRunner().invoke(build(), [*command.split(), "--help"]).output
        wanted = (
            ["--json"] if command == "systems" else ["--json", "--seed", "--device", "--output"]
        )
        for option in wanted:
            assert f"{option} " in shown, command


def test_version_and_no_command(moekit: Moekit) -> None:
    assert moekit("--version").out == f"moekit {package.__version__}\n"
    assert "compare" in moekit().out


def test_compare(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    ended = moekit("compare", "--designs=dense,topk", "--output=out", *tiny)
    assert ended.code == 0
    assert ended.out.count("dense") >= 2
    assert "…" not in ended.out  # nothing is cut off at 80 columns
    assert "lowest validation loss" in ended.out
    assert "Report: out/report.html" in ended.out
    assert "Raw results: out/results.json, out/results.csv" in ended.out
    assert files(tmp_path)[:1] == ["out/expert_phase.json"]
    assert {Path(name).parts[0] for name in files(tmp_path)} == {"out"}
    lines = ended.err.splitlines()
    assert len(lines) == len(set(lines))
    assert len([line for line in lines if not line.endswith(" left")]) <= 6
    assert [line for line in lines if "step 4/4" in line and line.endswith("done")]
    again = moekit("compare", "--designs=dense,topk", "--output=out", *tiny)
    assert again.out == ended.out
    assert again.err.splitlines() == [
        "dense, seed 0: finished earlier",
        "topk, seed 0: finished earlier",
    ]


def test_compare_with_json_and_quiet(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    ended = moekit("compare", "--designs=dense,remoe", "--json", "--quiet", "--output=o", *tiny)
    assert ended.err == ""
    found = strict(ended.out)
    assert found == strict((tmp_path / "o" / "results.json").read_text(encoding="utf-8"))
    assert [row["design"] for row in found["summary"]] == ["dense", "remoe"]


def test_design_names_with_markup(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    layer = {"kind": "SwiGLU", "count": 1, "hidden": 16}
    name = "[/red] [bold]<script> ../../x"
    design = tmp_path / "my.json"
    design.write_text(json.dumps({"kind": "Design", "name": name, "layers": [layer]}))
    ended = moekit("compare", "--designs", design, "--output=deep/er", *tiny)
    assert ended.code == 0
    assert "[/red] [bold]<script>" in ended.out
    assert name in ended.err
    assert {Path(file).parts[0] for file in files(tmp_path)} == {"deep", "my.json"}
    assert len(list((tmp_path / "deep/er/runs").iterdir())) == 1
    assert "<script> .." not in (tmp_path / "deep/er/report.html").read_text(encoding="utf-8")


def test_train(moekit: Moekit, tiny: list[str], tmp_path: Path) -> None:
    ended = moekit("train", "--design=moepp", "--output=out", *tiny)
    assert ended.code == 0
    assert "validation loss" in ended.out
    assert "Model: out/model" in ended.out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").moe_layers
    again = moekit("train", "--design=moepp", "--output=out", "--json", "--quiet", *tiny)
    assert again.err == ""
    found = strict(again.out)
    assert f"{found['validation_loss']:.4f}" in ended.out
    assert found["model"] == "out/model"


def test_seeds_change_the_result(moekit: Moekit, tiny: list[str]) -> None:
    losses = [
        strict(moekit("train", "--json", f"--seed={seed}", f"--output={name}", *tiny).out)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert losses[0]["validation_loss"] == losses[1]["validation_loss"]
    assert losses[0]["validation_loss"] != losses[2]["validation_loss"]


def test_generate(moekit: Moekit, checkpoint: Path, tmp_path: Path) -> None:
    plain = moekit("generate", checkpoint, "--prompt=alpha", "--tokens=5")
    assert (plain.code, plain.err) == (0, "")
    assert plain.out.startswith("alpha")
    sampled = ["generate", checkpoint, "--tokens=5", "--temperature=0.9", "--top-k=9", "--json"]
    first = moekit(*sampled, "--samples=2", "--seed=1")
    assert first == moekit(*sampled, "--samples=2", "--seed=1")
    assert first.out != moekit(*sampled, "--samples=2", "--seed=2").out
    assert len(strict(first.out)["continuations"]) == 2
    beams = moekit("generate", checkpoint, "--tokens=3", "--beams=2", "--output=a/b.txt", "--json")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == beams.out
    assert strict(beams.out)["prompt"] == ""
    (tmp_path / "prompt.txt").write_text("beta 12")
    told = moekit("generate", checkpoint, "--prompt-file=prompt.txt", "--output=c.txt")
    assert told.out == "Written to c.txt\n"
    assert (tmp_path / "c.txt").read_text(encoding="utf-8").startswith("beta 12")


def test_inspect(moekit: Moekit, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    shown = moekit("inspect", checkpoint)
    assert (shown.code, shown.err) == (0, "")
    assert "MoEDecoderForCausalLM" in shown.out
    assert "model.layers.1.mlp" in shown.out
    assert files(tmp_path) == []
    structure = strict(moekit("inspect", checkpoint, "--json").out)["structure"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert structure["total"] == sum(p.numel() for p in model.parameters())
    routed = moekit(
        "inspect", checkpoint, f"--data={text}", "--sequence-length=16", "--batches=3", "--output=r"
    )
    assert routed.code == 0
    assert "Report: r/report.html" in routed.out
    assert files(tmp_path) == ["r/inspection.json", "r/report.html"]
    found = strict((tmp_path / "r" / "inspection.json").read_text(encoding="utf-8"))
    assert [sum(layer["histogram"]) for layer in found["routing"]["layers"]] == [3 * 8 * 16] * 2


def test_inspect_against_earlier_checkpoints(
    moekit: Moekit, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(0)
    for layer in model.moe_layers:
        layer.router.weight.data.normal_()
    model.save_pretrained(earlier)
    options = (f"--data={text}", "--sequence-length=16", "--batches=2", "--output=r")
    against = (f"--against={earlier}", f"--against={checkpoint}")
    shown = moekit("inspect", checkpoint, *options, *against)
    assert shown.code == 0
    assert "Routing that changed" in shown.out
    assert "0.00%" in shown.out
    found = strict((tmp_path / "r" / "inspection.json").read_text(encoding="utf-8"))["fluctuation"]
    assert [(pair["before"], pair["after"]) for pair in found] == [
        (str(earlier), str(checkpoint)), (str(checkpoint), str(checkpoint)),
    ]  # fmt: skip
    assert [layer["tokens"] for pair in found for layer in pair["layers"]] == [2 * 8 * 16] * 4
    assert all(layer["changed_tokens"] > 0.1 for layer in found[0]["layers"])
    assert all(layer["changed_slots"] == 0 for layer in found[1]["layers"])
    assert "Routing fluctuation" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    refused = moekit("inspect", checkpoint, *against)
    assert "give it with --data" in refused.sentence


@pytest.fixture
def mixtral(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of transformers' own, with our tokenizer beside it."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=280, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    folder = tmp_path / "mixtral"
    MixtralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def test_models_of_transformers(moekit: Moekit, mixtral: Path, text: Path) -> None:
    ended = moekit(
        "inspect", mixtral, f"--data={text}", "--sequence-length=16", "--batches=2", "--json",
        "--quiet",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    found = strict(ended.out)
    assert [layer["experts"] for layer in found["structure"]["moe_layers"]] == [4, 4]
    tokens, k = 2 * 8 * 16, 2
    assert [sum(layer["load"]) for layer in found["routing"]["layers"]] == [tokens * k] * 2
    written = moekit("generate", mixtral, "--prompt=alpha", "--tokens=3")
    assert (written.code, written.err) == (0, "")


def test_systems(moekit: Moekit) -> None:
    everything = strict(moekit("systems", "--json").out)
    assert [row["name"] for row in everything] == [s.name for s in (*baselines(), *systems())]
    available = strict(moekit("systems", "--available", "--json").out)
    assert available == [row for row in everything if row["available"]]
    shown = moekit("systems").out
    assert all(f" {row['name']} " in shown for row in everything)
    assert "…" not in shown


def test_reproduce(moekit: Moekit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moekit.compare import ModelSpec, budgets
    from moekit.systems import moepp

    def small(designs: Any, **options: Any) -> Any:
        spec = budgets.small_model_study(designs, **options)
        text = spec.text.replace(limit_bytes=60_000, sequence_length=16, vocab_size=280)
        training = spec.training.replace(steps=4, batch_size=2, log_every=2)
        model = ModelSpec(width=16, depth=2, heads=2, kv_heads=1)
        return spec.replace(text=text, training=training, model=model)

    monkeypatch.setattr(moepp, "small_model_study", small)
    ended = moekit("reproduce", "moepp", "--quick")
    assert ended.code == 0
    for word in ("claim  ", "measured  ", "verdict   inconclusive", "arXiv 2410.07348"):
        assert word in ended.out
    assert "…" not in ended.out
    assert "Results: moekit-reproduce/moepp-quick/reproduction.json" in ended.out
    again = moekit("reproduce", "moepp", "--quick", "--json", "--quiet")
    assert again.err == ""
    path = tmp_path / "moekit-reproduce" / "moepp-quick" / "reproduction.json"
    assert strict(again.out) == strict(path.read_text(encoding="utf-8"))
    refused = moekit("reproduce", "moepp", "--output=moekit-reproduce/moepp-quick")
    assert "another experiment" in refused.sentence


@pytest.mark.parametrize("designs", [2, 5])
def test_the_longer_list_of_a_result_runs_downwards(designs: int) -> None:
    rows = [{"design": f"d{i}", "loss": i / 4, "mean_active_experts": i} for i in range(designs)]
    rows[-1] = {"design": f"d{designs - 1}", "loss": None}
    console = Console(width=60)
    with console.capture() as capture:
        console.print(_measures(rows))
    lines = [line.split() for line in capture.get().splitlines() if line.strip(" ─")]
    if designs == 5:
        assert lines[0] == ["loss", "mean", "active", "experts"]
        assert lines[2:] == [["d1", "0.25", "1"], ["d2", "0.5", "2"], ["d3", "0.75", "3"], ["d4"]]
    else:
        assert lines == [["d0", "d1"], ["loss", "0"], ["mean", "active", "experts", "0"]]


def test_control_c(moekit: Moekit, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "compare", interrupted)
    ended = moekit("compare", "--output=out", *tiny)
    assert ended.code == 130
    assert ended.err == "moekit: stopped; run the same command again to go on\n"


def _environment() -> dict[str, str]:
    root = str(Path(package.__file__).parent.parent)
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_a_process_that_is_interrupted_and_run_again(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moekit", "compare", "--designs=topk", "--output=out"]
    options = {"cwd": tmp_path, "env": _environment(), "text": True}
    long = [*command, *tiny, "--steps=5000"]
    process = subprocess.Popen(long, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
    assert process.stderr is not None
    while "run 1 of 1" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith("moekit: stopped; run the same command again to go on\n")
    assert "Traceback" not in rest
    short = subprocess.run(
        [*command, *tiny],
        capture_output=True,
        check=True,
        timeout=600,  # two processes that import torch, on a machine that may be busy
        **options,  # type: ignore[call-overload]
    )
    assert "Report: out/report.html" in short.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_process_with_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moekit", "compare", "--designs=topkk"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("moekit: 'topkk' is no design")
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whole", [False, True])
def test_bench_layer(moekit: Moekit, tmp_path: Path, whole: bool) -> None:
    sizes = "--tokens 3,9 --experts 4 --k 2 --width 16 --hidden 8 --dtypes float32 --repeats 1"
    folder = tmp_path / "bench"
    asked = (*sizes.split(), *(["--whole"] if whole else []))
    ended = moekit("bench", "layer", "--json", "--output", str(folder), *asked)
    assert ended.code == 0, ended.err
    found = strict(ended.out)
    shapes = [timing["shape"] for timing in found["timings"]]
    assert [(shape["tokens"], shape["experts"]) for shape in shapes] == [(3, 4)] * 2 + [(9, 4)] * 2
    assert {timing["whole"] for timing in found["timings"]} == {whole}
    assert found["machine"]["torch"] == torch.__version__
    assert files(folder) == ["layer.json", "report.html"]
    assert strict((folder / "layer.json").read_text("utf-8")) == found
