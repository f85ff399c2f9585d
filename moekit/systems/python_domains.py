"""Four domains of text that ship with Python, under the same bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from moekit.data import TextData, TextSpec, prepare
from moekit.systems.compression import Blocks, drawn
from moekit.systems.experiment import Laboratory

VOCABULARY = 258  # every byte, and two special tokens
END = 0
_SOURCES = {
    "manual": "pydoc_data/topics.py",
    "source": "*.py",
    "tables": "encodings/*.py",
    "entities": "html/entities.py",
}


@dataclass(frozen=True)
class PythonDomains:
    """The text of each domain, in blocks.

    Attributes:
        texts: by domain.
    """

    texts: dict[str, TextData]

    def mixture(self, each: int) -> Blocks:
        """So many training blocks of every domain, fewer of one that has no more."""
        return [block for data in self.texts.values() for block in drawn(data.train, each, seed=0)]

    def train(self, domain: str, count: int, seed: int = 0) -> Blocks:
        """Some training blocks of a domain."""
        return drawn(self.texts[domain].train, count, seed)

    def held_out(self, domain: str, count: int) -> Blocks:
        """Some test blocks of a domain, the same in every call."""
        return drawn(self.texts[domain].test, count, seed=0)


def python_domains(
    lab: Laboratory, length: int, domains: tuple[str, ...] = tuple(_SOURCES)
) -> PythonDomains:
    """The domains in blocks of ``length`` bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    preparing = lab.progress.preparing()
    texts = {}
    for name in domains:
        spec = TextSpec(
            source=str(library / _SOURCES[name]),
            vocab_size=VOCABULARY,
            sequence_length=length,
            test_share=0.1,
            limit_bytes=600_000,
        )
        texts[name] = prepare(spec, progress=preparing)
    return PythonDomains(texts)
