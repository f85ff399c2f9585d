"""Small MoE checkpoints of transformers' own classes, trained on many domains of text.

An OLMoE and a DeepSeek-V3 with a shared expert learn, from scratch, documents of known domains, for
the studies of compression and unlearning. Documents are held out in every domain. That experts
specialise is measured: the information between a token's domain and its expert, against that of the
same model before training.

    python benchmarks/domain_models.py ../shared/data/text/domains.parquet --output runs/domains
    python benchmarks/domain_models.py ... --models olmoe --experts 8    # a natively small one

writes the texts with their splits (texts.jsonl), and of each model a checkpoint that
``from_pretrained`` and ``moekit prune`` load, with its measures (specialisation.json).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.compare.machine import machine
from moekit.compare.record import write_json
from moekit.data import Document, PackedDataset, TextData, TextSpec, prepare, read_documents
from moekit.measure import group_information, token_routing
from moekit.systems.domain_models import FAMILIES, Schedule, Size, fit

SHARE = 0.07  # of a domain's documents, for each of test and validation
BLOCKS = 12  # of every domain, to measure specialisation on


def split_by_domain(documents: list[Document]) -> Iterator[Document]:
    """The documents with splits, so that every domain has some in test, and in training.

    The order of a hash of the text decides, so that a document keeps its split. A domain of three
    documents or more has some in validation too.
    """
    domains: dict[str, list[Document]] = {}
    for document in documents:
        domains.setdefault(document.group or "", []).append(document)
    for own in domains.values():
        own.sort(key=lambda d: hashlib.sha256(d.text.encode()).digest())
        held = max(1, round(SHARE * len(own)))
        ends = (held, held + (held if len(own) >= 3 else 0))
        for place, document in enumerate(own):
            split = "test" if place < ends[0] else "validation" if place < ends[1] else "train"
            yield replace(document, split=split)


def write_texts(source: str, path: Path) -> None:
    """The documents of ``source`` with their domain and split, as JSON lines."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for document in split_by_domain(list(read_documents(source))):
            row = {"domain": document.group, "split": document.split, "text": document.text}
            file.write(json.dumps(row) + "\n")
    partial.rename(path)


class SomeOfEach:
    """The first blocks of every domain of a data set, equally many where there are enough."""

    def __init__(self, data: PackedDataset) -> None:
        self.data = data
        chosen = [(data.groups == g).nonzero().flatten()[:BLOCKS] for g in data.groups.unique()]
        self.indices = torch.cat(chosen).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[self.indices[index]]

    def token_groups(self, index: int) -> Tensor:
        """The domain of each token."""
        return self.data.token_groups(self.indices[index])


def specialisation(model: PreTrainedModel, data: TextData) -> dict[str, Any]:
    """How much a token's expert tells of its domain, on held-out text of equal parts.

    ``information`` is I(domain; expert) of each layer in nats, and ``share_of_domain_entropy`` that
    over the entropy of the domains; ``load_share`` is the smallest and largest share of all
    assignments that an expert has.
    """
    blocks = SomeOfEach(data.test)
    found = group_information(
        token_routing(model, blocks, data.tokenizer, data.groups, batch_size=16)
    )
    layers = [
        {
            "information": layer.information,
            "share_of_domain_entropy": layer.information / layer.entropy,
            "load_share": [min(layer.load_share), max(layer.load_share)],
        }
        for layer in found
    ]
    return {"domain_entropy": found[0].entropy, "layers": layers}


def make(name: str, size: Size, schedule: Schedule, data: TextData, folder: Path) -> None:
    """Train one model, save it, and measure how its experts specialise."""
    end = data.tokenizer.eos_token_id
    model = FAMILIES[name](size, len(data.tokenizer), end, schedule.seed)
    before = specialisation(model, data)
    began, losses = time.perf_counter(), list[float]()

    def told(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 50 == 0 or step == schedule.steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            seconds = time.perf_counter() - began
            print(f"{folder.name} step {step} loss {recent:.3f} {seconds:.0f} s", flush=True)

    fit(model, data.train, schedule, told)
    seconds = time.perf_counter() - began
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(str(folder))
    after = specialisation(model, data)
    write_json(
        folder / "specialisation.json",
        {
            "machine": machine("cpu"),
            "size": size.to_dict(),
            "schedule": schedule.to_dict(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": schedule.steps * schedule.batch_size * data.train.sequence_length,
            "seconds": seconds,
            "losses": [sum(losses[i : i + 50]) / 50 for i in range(0, len(losses) - 49, 50)],
            "untrained": before,
            "trained": after,
        },
    )
    for layer, (old, new) in enumerate(zip(before["layers"], after["layers"], strict=True)):
        print(f"MoE layer {layer}: {old['information']:.4f} -> {new['information']:.4f} nats")


def main() -> None:
    """Prepare the text, and train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="documents with domains, see moekit.data.sources")
    parser.add_argument("--output", type=Path, default=Path("runs/domains"))
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--experts", type=int, default=Size().experts)
    parser.add_argument("--steps", type=int, default=Schedule().steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = options.output / "texts.jsonl"
    write_texts(options.source, texts)
    data = prepare(TextSpec(source=str(texts), vocab_size=2048, sequence_length=256))
    for name in options.models:
        usual = options.experts == Size().experts and options.seed == 0
        ending = "" if usual else f"-{options.experts}-seed{options.seed}"
        folder = options.output / f"{name}{ending}"
        if (folder / "specialisation.json").exists():
            print(f"{folder} is there already")
            continue
        schedule = Schedule(steps=options.steps, seed=options.seed)
        make(name, Size(experts=options.experts), schedule, data, folder)


if __name__ == "__main__":
    main()
