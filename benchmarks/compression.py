"""Fewer experts by every method of ``moekit prune``, compared on the models of domain_models.py.

Each model is calibrated once a seed on other training text and compressed to 75%, 50% and 25% of
its experts by each method. Held-out documents of every domain give the loss, and multiple-choice
items (a stretch of a document; its continuation among those of others) the accuracy. Then UNCURL is
given the text of a task, and compared with the natively small models that domain_models.py trained.

    python benchmarks/domain_models.py ../shared/data/text/domains.parquet --output runs/domains
    for n in 8 4; do
      python benchmarks/domain_models.py ../shared/data/text/domains.parquet \\
          --output runs/domains --models olmoe --experts $n
    done
    python benchmarks/compression.py runs/domains --output benchmarks/results/compression

writes JSON, Markdown and an HTML page. Each measurement is kept in the folder of ``--work`` on its
own, and one that is there is not made again. ``--quick`` is a smoke run whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.data import Document, TextSpec, prepare, read_documents
from moekit.data.tokenizer import encode
from moekit.measure.continuations import continuation_items
from moekit.measure.multiple_choice import ChoiceItem, score_choices
from moekit.surgery import BlockStatistics, Budget, prune
from moekit.surgery.methods import (
    DERN,
    REAP,
    Frequency,
    HCSMoE,
    Method,
    MSMoE,
    Random,
    RouterWeight,
    Uncurl,
)
from moekit.systems.compression import Blocks, calibrated, compressed, drawn, loss_of
from moekit.systems.compression_report import markdown, page
from moekit.systems.domain_models import FAMILIES, Schedule, fit

KEEP = (0.75, 0.5, 0.25)
SEEDS = (0, 1, 2)
LENGTH = 256
TASKS = {
    "bible": ("bible_kjv", "genesis_"),
    "film": ("movie_reviews", "web_grail", "web_pirates"),
}


def methods(seed: int) -> dict[str, Method]:
    """Every method with its defaults, and the routers that its paper leaves open or offers."""
    return {
        "random": Random(seed=seed),
        "frequency": Frequency(),
        "router-weight": RouterWeight(),
        "reap": REAP(),
        "m-smoe": MSMoE(),
        "hc-smoe": HCSMoE(),
        "dern": DERN(),
        "uncurl": Uncurl(),
        "dern, router=probability": DERN(router="probability"),
        "dern, router=none": DERN(router="none"),
        "uncurl, router=alias": Uncurl(router="alias"),
        "hc-smoe, router=average": HCSMoE(router="average"),
    }


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    calibration: int = 128  # blocks
    blocks: int = 6  # of each domain
    items: int = 16  # of each domain
    tuning: int = 60  # steps
    task_blocks: int = 48
    seeds: tuple[int, ...] = SEEDS
    keep: tuple[float, ...] = KEEP


QUICK = Extent(calibration=4, blocks=1, items=1, tuning=2, task_blocks=2, seeds=(0,), keep=(0.5,))


class Cells:
    """Measurements on disk, each in a file of its own."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    def measured(
        self, name: str, run: Callable[[], dict[str, Any]], method: Method | None = None
    ) -> dict[str, Any]:
        """What ``run`` measures, or did before with the same settings, and method if any."""
        settings = self.settings | {"method": None if method is None else _plain(method)}
        path = self.folder / f"{name.replace(' ', '').replace(',', '-')}.json"
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] == settings:
                return dict(stored["measured"])
        began = time.perf_counter()
        found = run() | {"seconds": round(time.perf_counter() - began, 1)}
        write_json(path, {"settings": settings, "measured": found})
        print(name, {k: v for k, v in found.items() if isinstance(v, float | int)}, flush=True)
        return found


def _plain(method: Method) -> Any:
    return json.loads(json.dumps(method.to_dict()))


class Subject:
    """One trained model, its held-out text and its items."""

    def __init__(self, folder: Path, documents: list[Document], extent: Extent) -> None:
        self.name = folder.name
        self.folder = folder
        self.extent = extent
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
        spec = TextSpec(
            source=str(folder.parent / "texts.jsonl"),
            tokenizer=str(folder),
            sequence_length=LENGTH,
        )
        self.train = prepare(spec).train
        self.documents = [d for d in documents if d.split == "test"]
        self.held_out = self.blocks(self.documents, extent.blocks)
        found = continuation_items(self.documents, self.tokenizer, extent.items)
        self.items: list[ChoiceItem] = [item for own in found.values() for item in own]

    def blocks(self, documents: list[Document], most: int | None) -> dict[str, Blocks]:
        """The first blocks of each domain's documents, which follow each other."""
        tokens: dict[str, list[int]] = {}
        end = int(self.tokenizer.eos_token_id)
        ids = encode(self.tokenizer, [d.text for d in documents])
        for document, own in zip(documents, ids, strict=True):
            tokens.setdefault(document.group or "", []).extend([*own, end])
        return {
            domain: [
                {"input_ids": torch.tensor(own[start : start + LENGTH])}
                for start in range(0, len(own) - LENGTH + 1, LENGTH)
            ][:most]
            for domain, own in sorted(tokens.items())
        }

    def copy(self) -> PreTrainedModel:
        """The model anew, to be changed."""
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def losses(self, model: PreTrainedModel) -> dict[str, Any]:
        """Loss of every domain."""
        return {
            "loss": {domain: loss_of(model, own) for domain, own in self.held_out.items()},
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def choices(self, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracy of the items."""
        scores = score_choices(model, self.tokenizer, self.items)
        return {
            "accuracy": scores.accuracy,
            "accuracy_normalized": scores.accuracy_normalized,
        }


def general(subject: Subject, cells: Cells) -> Iterator[dict[str, Any]]:
    """The model itself, and compressed by every method to every size with every seed."""
    whole = partial(Measured, subject, subject.model, {})
    yield {"model": subject.name, "method": "whole", "keep": 1.0, "seed": 0} | both(
        cells, f"{subject.name}-whole", None, whole
    )
    for seed in subject.extent.seeds:
        known = methods(seed)
        blocks = drawn(subject.train, subject.extent.calibration, seed)
        statistics = calibrated(subject.model, blocks, known.values(), seed)
        for keep in subject.extent.keep:
            for label, method in known.items():
                place = {"model": subject.name, "method": label, "keep": keep, "seed": seed}
                make = partial(cut, subject, method, keep, statistics)
                name = f"{subject.name}-{label}-{keep}-seed{seed}"
                yield place | both(cells, name, method, make)


@dataclass(frozen=True)
class Measured:
    """A model to measure, and what is known of it."""

    subject: Subject
    model: PreTrainedModel
    about: dict[str, Any]

    def losses(self) -> dict[str, Any]:
        """Losses, and what is known."""
        return self.about | self.subject.losses(self.model)

    def choices(self) -> dict[str, Any]:
        """Accuracies."""
        return self.subject.choices(self.model)


def both(
    cells: Cells, name: str, method: Method | None, make: Callable[[], Measured]
) -> dict[str, Any]:
    """Losses and accuracies, each a file of its own; the model is made where one is missing."""
    losses = cells.measured(name, lambda: make().losses(), method)
    choices = cells.measured(f"{name}-choices", lambda: make().choices(), method)
    return choices | losses


def cut(
    subject: Subject, method: Method, keep: float, statistics: Sequence[BlockStatistics]
) -> Measured:
    """The model with fewer experts."""
    made = compressed(subject.model, method, keep, statistics)
    about = {"experts": list(made.experts), "passed_on": made.passed_on}
    return Measured(subject, made.model, about)


def as_written(subject: Subject, folder: Path) -> dict[str, Any]:
    """Largest difference of logits between a model compressed in memory and as it is written."""
    method = DERN(alpha=0.2)
    blocks = drawn(subject.train, 16, 0)
    made = compressed(subject.model, method, 0.5, calibrated(subject.model, blocks, [method]))
    shutil.rmtree(folder, ignore_errors=True)
    prune(subject.folder, folder, method, Budget(ratio=0.5), blocks, batch_size=16)
    written = AutoModelForCausalLM.from_pretrained(folder).eval()
    token_BT = torch.stack([block["input_ids"] for block in blocks[:4]])
    with torch.inference_mode():
        gap = made.model(input_ids=token_BT).logits - written(input_ids=token_BT).logits
    return {"gap": float(gap.abs().max())}


@dataclass(frozen=True)
class Task:
    """Some domains, which a model is cut and tuned for.

    Attributes:
        train, test: their blocks.
        steps: of tuning.
    """

    train: Blocks
    test: Blocks
    steps: int

    @classmethod
    def of(cls, subject: Subject, documents: list[Document], name: str) -> Task:
        """The task of this name."""
        own = [d for d in documents if (d.group or "").startswith(TASKS[name])]
        train, test = (
            [block for some in subject.blocks(of_split, None).values() for block in some]
            for of_split in ([d for d in own if d.split == split] for split in ("train", "test"))
        )
        return cls(train, drawn(test, subject.extent.task_blocks, 0), subject.extent.tuning)

    def tuned(self, make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """Loss of a new model, and after tuning."""
        model = make()
        before = loss_of(model, self.test)
        fit(model, self.train, Schedule(steps=self.steps, learning_rate=5e-4))
        return {"loss_before": before, "loss": loss_of(model, self.test)}


def tasks(
    subject: Subject, natives: dict[int, Subject], documents: list[Document], cells: Cells
) -> Iterator[dict[str, Any]]:
    """Fewer experts for one task, before and after tuning, beside natively small models."""
    for name in TASKS:
        task = Task.of(subject, documents, name)
        for method, left, make in contenders(subject, natives, task):
            cell = cells.measured(f"task-{name}-{method}-{left}", partial(task.tuned, make))
            yield {"task": name, "method": method, "experts": left} | cell


def contenders(
    subject: Subject, natives: dict[int, Subject], task: Task
) -> Iterator[tuple[str, int, Callable[[], PreTrainedModel]]]:
    """Name, number of experts, and how to make a fresh model."""
    experts = int(subject.model.config.num_experts)
    yield "native", experts, subject.copy
    for left, native in natives.items():
        yield "native", left, native.copy
    known = {"uncurl": Uncurl(), "frequency": Frequency()}
    for where, source in (("the task", task.train), ("all domains", subject.train)):
        blocks = drawn(source, subject.extent.calibration, 0)
        statistics = calibrated(subject.model, blocks, known.values())
        for left in natives:
            for label, method in known.items():
                make = partial(reduced, subject, method, left / experts, statistics)
                yield f"{label} on {where}", left, make


def reduced(
    subject: Subject, method: Method, keep: float, statistics: Sequence[BlockStatistics]
) -> PreTrainedModel:
    """The model with fewer experts."""
    return compressed(subject.model, method, keep, statistics).model


def main() -> None:
    """Measure what is not there yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder that domain_models.py wrote")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compression"))
    parser.add_argument("--work", type=Path, default=Path("runs/compression"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute")
    options = parser.parse_args()
    extent = QUICK if options.quick else Extent()
    documents = list(read_documents(str(options.models / "texts.jsonl")))
    rows: list[dict[str, Any]] = []
    task_rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"machine": machine("cpu"), "extent": asdict(extent), "models": {}}
    for name in FAMILIES:
        if not (options.models / name / "specialisation.json").exists():
            continue
        subject = Subject(options.models / name, documents, extent)
        made = json.loads((subject.folder / "specialisation.json").read_text())
        cells = Cells(options.work, {"extent": asdict(extent), "model": made["trained"]})
        gap = cells.measured(
            f"{name}-written", partial(as_written, subject, options.work / "written")
        )
        about["models"][name] = made | {"items": len(subject.items), "written": gap["gap"]}
        rows += general(subject, cells)
        if name == "olmoe":
            natives = {
                left: Subject(options.models / f"olmoe-{left}-seed0", documents, extent)
                for left in (8, 4)
                if (options.models / f"olmoe-{left}-seed0" / "specialisation.json").exists()
            }
            task_rows += tasks(subject, natives, documents, cells)
    write_json(options.output.with_suffix(".json"), {**about, "cells": rows, "tasks": task_rows})
    write_text(options.output.with_suffix(".md"), markdown(about, rows, task_rows))
    page(about, rows, task_rows).write(options.output.with_suffix(".html"))


if __name__ == "__main__":
    main()
