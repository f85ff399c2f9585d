"""Studies: resuming, claiming a folder, one data order, the report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import DESIGNS, Watched
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit import L1Balance, MoESpec, Pathway, ReLURouting, SwiGLU
from moekit.compare import Design, StudySpec, compare
from moekit.compare import run as running
from moekit.compare.report import write_report
from moekit.errors import CheckpointError, OutputError, SpecError
from moekit.measure.flops import flop_counter
from moekit.models.language import MoEDecoderForCausalLM

Make = Callable[..., StudySpec]
REMOE = Design(
    "relu",
    (MoESpec(ReLURouting(k=1), SwiGLU(count=4, hidden=16), losses=(L1Balance(k=1, alpha=5.0),)),),
)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of ``train`` that studies make: (description, model, batches)."""
    calls: list[Any] = []
    original = running.train

    def counted(model: Any, *args: Any, **options: Any) -> Any:
        batches: list[torch.Tensor] = []

        def keep(module: Any, _: Any, named: Any) -> None:
            if module.training:
                batches.append(named["input_ids"].clone())

        calls.append((options["description"], model, batches))
        handle = model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return original(model, *args, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(running, "train", counted)
    return calls


def test_a_study_and_its_second_call(study_spec: Make, tmp_path: Path, trained: list[Any]) -> None:
    spec, progress = study_spec(seeds=(3, 5)), Watched()
    study = compare(spec, tmp_path, progress=progress)
    wanted = [("dense", 3), ("topk", 3), ("dense", 5), ("topk", 5)]
    assert progress.ran == wanted
    assert [(r.design, r.seed) for r in study.records] == [
        ("dense", 3), ("dense", 5), ("topk", 3), ("topk", 5),
    ]  # fmt: skip
    assert len(trained) == 4
    assert progress.timed == 1
    again = Watched()
    assert compare(spec, tmp_path, progress=again) == study
    assert (again.ran, again.earlier, again.timed) == ([], wanted, 0)
    assert len(trained) == 4
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["dense-seed3", "dense-seed5", "topk-seed3", "topk-seed5"]
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_all_designs_see_the_same_batches(
    study_spec: Make, tmp_path: Path, trained: list[Any]
) -> None:
    compare(study_spec(seeds=(0, 1)), tmp_path, progress=Watched())
    batches = {name: torch.stack(seen) for name, _, seen in trained}
    assert batches["dense, seed 0"].shape == (6, 2, 16)
    assert batches["dense, seed 0"].equal(batches["topk, seed 0"])
    assert batches["dense, seed 1"].equal(batches["topk, seed 1"])
    assert not batches["dense, seed 0"].equal(batches["dense, seed 1"])


def test_an_interrupted_study_comes_to_the_same(study_spec: Make, tmp_path: Path) -> None:
    spec = study_spec()
    whole = compare(spec, tmp_path / "whole", progress=Watched())
    with pytest.raises(KeyboardInterrupt):
        compare(spec, tmp_path / "cut", progress=Watched(stop_at=(1, 5)))
    progress = Watched()
    resumed = compare(spec, tmp_path / "cut", progress=progress)
    assert (progress.earlier, progress.ran) == ([("dense", 0)], [("topk", 0)])
    for one, other in zip(whole.records, resumed.records, strict=True):
        assert one.validation_loss == other.validation_loss
        assert _losses(one.history) == _losses(other.history)


def _losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in history if "loss" in row]


def test_a_folder_holds_one_study(study_spec: Make, tmp_path: Path) -> None:
    compare(study_spec(designs=DESIGNS[:1]), tmp_path, progress=Watched())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(OutputError, match=r"study with other designs, seeds; choose another"):
        compare(study_spec(seeds=(7,)), tmp_path, progress=Watched())
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}


def test_a_folder_without_results_is_free_again(study_spec: Make, tmp_path: Path) -> None:
    spec = study_spec(designs=DESIGNS[:1])
    with pytest.raises(KeyboardInterrupt):
        compare(spec, tmp_path, progress=Watched(stop_at=(0, 1)))
    assert (tmp_path / "study.json").exists()
    other = spec.replace(training=spec.training.replace(learning_rate=1e-4))
    assert compare(other, tmp_path, progress=Watched()).spec == other


def test_a_folder_of_something_else_is_left_alone(study_spec: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("kept")
    with pytest.raises(OutputError, match="not empty and holds no study"):
        compare(study_spec(), tmp_path, progress=Watched())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("study.json", OutputError),
        ("expert_phase.json", OutputError),
        ("runs/dense-seed0/record.json", CheckpointError),
    ],
)
def test_damaged_results_are_named(
    study_spec: Make, tmp_path: Path, file: str, error: type[Exception]
) -> None:
    spec = study_spec(designs=DESIGNS[:1])
    compare(spec, tmp_path, progress=Watched())
    for damage in ("", "[1]", '{"x": 1}'):
        (tmp_path / file).write_text(damage)
        with pytest.raises(error, match=file.rpartition("/")[2]):
            compare(spec, tmp_path, progress=Watched())


def test_a_model_that_was_removed_is_named(study_spec: Make, tmp_path: Path) -> None:
    spec = study_spec(designs=DESIGNS[:1])
    compare(spec, tmp_path, progress=Watched())
    (tmp_path / "expert_phase.json").unlink()
    (tmp_path / "runs/dense-seed0/model/model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"dense-seed0.* to run it again"):
        compare(spec, tmp_path, progress=Watched())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"designs": ()}, "no design"),
        ({"designs": DESIGNS[:1] * 2}, "repeated: dense"),
        ({"designs": (DESIGNS[0], DESIGNS[0].replace(name="dense!"))}, "punctuation"),
        ({"seeds": ()}, "no seed"),
        ({"seeds": (1, 1)}, "twice"),
        ({"seeds": (-1,)}, "negative"),
        ({"match": "luck"}, "match"),
    ],
)
def test_bad_studies(study_spec: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        study_spec(**changes)


def test_a_design_of_another_depth_is_refused_before_anything(
    study_spec: Make, tmp_path: Path
) -> None:
    deep = Design("deep", (SwiGLU(count=1, hidden=8),) * 3)
    for match in ("active", "steps"):
        with pytest.raises(SpecError, match="3 layer specs"):
            compare(study_spec(designs=(*DESIGNS, deep), match=match), tmp_path, progress=Watched())
        assert not list(tmp_path.iterdir())


def test_a_study_spec_survives_json(study_spec: Make) -> None:
    spec = study_spec(seeds=(1, 2))
    assert StudySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_saved_model_is_what_was_measured(study_spec: Make, tmp_path: Path) -> None:
    compare(study_spec(designs=DESIGNS[1:]), tmp_path, progress=Watched())
    folder = tmp_path / "runs/topk-seed0/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    weights, config = folder / "model.safetensors", folder / "config.json"
    assert weights.stat().st_mode == config.stat().st_mode


def test_tensorboard_files_outlive_the_run(study_spec: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    spec = study_spec(designs=DESIGNS[:1])
    compare(spec, tmp_path, progress=Watched(), report_to=["tensorboard"])
    assert list((tmp_path / "runs/dense-seed0/logs").rglob("events.out.tfevents.*"))


def test_training_operations_follow_the_rows_of_each_step(
    study_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's counter around every training forward, where rows fall during training."""
    counted = 0
    forward = MoEDecoderForCausalLM.forward

    def counting(model: MoEDecoderForCausalLM, *inputs: Any, **named: Any) -> Any:
        nonlocal counted
        if not model.training:
            return forward(model, *inputs, **named)
        with flop_counter() as counter:
            output = forward(model, *inputs, **named)
        counted += counter.get_total_flops()
        return output

    monkeypatch.setattr(MoEDecoderForCausalLM, "forward", counting)
    spec = study_spec(designs=(REMOE,))
    training = spec.training.replace(steps=30, log_every=4, save_every=None)
    study = compare(spec.replace(training=training), tmp_path, progress=Watched())
    (found,) = study.records
    uncorrected = 3 * found.flops_per_token * found.tokens
    assert uncorrected < 0.95 * 3 * counted  # rows did fall
    # Operations a token are counted on one batch of the split, rows on all of it.
    assert found.training_flops == pytest.approx(3 * counted, rel=0.02)


class _Page(HTMLParser):
    """What a browser would see: visible text, tags, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.loads: list[str] = []
        self.rows: list[int] = []
        self._body = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tbody":
            self.rows.append(0)
            self._body = True
        if tag == "tr" and self._body:
            self.rows[-1] += 1
        self.loads += [v or "" for n, v in attrs if n in ("src", "srcset", "data", "action")]
        self.loads += [v or "" for n, v in attrs if n == "href" and tag in ("link", "image")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._body = self._body and tag != "tbody"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report(study_spec: Make, tmp_path: Path, words: Path) -> None:
    evil = Design("</td><script>alert(1)</script>", DESIGNS[1].layers)
    gates = MoESpec(Pathway(k=2), SwiGLU(count=4, hidden=16))
    spec = study_spec(designs=(DESIGNS[0], evil, REMOE, Design("pathway", (gates,))), seeds=(0, 1))
    study = compare(spec, tmp_path, progress=Watched())
    written = write_report(study, tmp_path)
    html = written.report.read_text(encoding="utf-8")
    page = _Page(html)
    assert "<script>alert" not in html
    assert "<img" not in html  # which the text is full of
    assert page.tags.count("script") == 1
    assert page.loads == []
    assert evil.name in page.text
    assert str(words) in page.text
    sections = ["Verdict", "Results", "Training", "Quality and cost", "Sparsity control", "Setting"]
    places = [page.text.index(name) for name in sections]
    assert places == sorted(places)
    assert page.text.index(written.verdict[0][:60]) < page.text.index("validation loss")
    assert page.tags.count("svg") >= 5
    assert page.rows[:2] == [4, 4]
    for summary in written.summaries:
        assert f"{summary.loss.mean:.4f}" in page.text
    _check_raw(written.json, written.csv, study)


def _check_raw(json_file: Path, csv_file: Path, study: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert [run["validation_loss"] for run in raw["runs"]] == [
        record.validation_loss for record in study.records
    ]
    assert StudySpec.from_dict(raw["study"]) == study.spec
    with csv_file.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["design"] for row in rows] == [design.name for design in study.spec.designs]
    for name, value in raw["summary"][1].items():
        shown = rows[1][name]
        assert shown == ("" if value is None else str(value))
    assert re.fullmatch(r"[\d.]+(e-\d+)?", rows[1]["expert_phase_seconds_per_token"])
