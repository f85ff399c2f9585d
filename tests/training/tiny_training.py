"""A model and a data set small enough to train in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moekit import MoESpec, SwiGLU, SwitchBalance, TopK
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

VOCABULARY = 32
DEFAULT_LAYER = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16), losses=(SwitchBalance(),))


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from a random id in steps of 1 to 3, so that there is
    something to learn."""

    def __init__(self, count: int, length: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        step = torch.randint(1, 4, (count, 1), generator=generator)
        self.ids = (start + step * torch.arange(length)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


class PaddedSequences(Sequences):
    """The same sequences cut to lengths from 2 to all, padded on the right or the left."""

    def __init__(self, count: int, length: int = 16, seed: int = 0, side: str = "right") -> None:
        super().__init__(count, length, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        kept = torch.randint(2, length + 1, (count, 1), generator=generator)
        place = torch.arange(length)
        self.mask = place < kept if side == "right" else place >= length - kept

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], self.mask[index]
        labels = ids.masked_fill(~mask, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


@dataclass
class TinyData:
    """In the place of ``moekit.data.TextData``."""

    train: Any = field(default_factory=lambda: Sequences(40))
    validation: Any = field(default_factory=lambda: Sequences(12, seed=1))
    tokenizer: Any = None


def tiny_model(layer: Any = DEFAULT_LAYER, seed: int = 0, **config: Any) -> MoEDecoderForCausalLM:
    """A decoder of two blocks."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "layers": layer,
        **config,
    }
    return MoEDecoderForCausalLM(MoEDecoderConfig(**settings))
