"""Bytes of the standard library's manual, clean and with some of them replaced at test time."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moekit.data import PackedDataset, TextData, TextSpec
from moekit.training.evaluation import evaluate

TEXT = TextSpec(
    source=str(Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"),
    vocab_size=258,  # every byte, and two special tokens
    sequence_length=128,
)
SHARE = 0.025


def contaminated_loss(
    model: torch.nn.Module, data: TextData, seed: int, share: float = SHARE, batch_size: int = 8
) -> float:
    """Mean nats of the validation tokens that are left, with ``share`` of them replaced by others.

    A replaced token is context, and no target: how badly a model guesses noise is not the measure.
    The same seed replaces the same tokens whichever model reads them.
    """
    special = set(data.tokenizer.all_special_ids)
    ordinary = [i for i in range(len(data.tokenizer)) if i not in special]
    dataset = _Contaminated(data.validation, torch.tensor(ordinary), share, seed)
    return evaluate(model, dataset, batch_size)


class _Contaminated(Dataset[dict[str, Tensor]]):
    """Blocks with tokens replaced, drawn for each block by its number."""

    def __init__(self, blocks: PackedDataset, ordinary_V: Tensor, share: float, seed: int) -> None:
        self.blocks, self.ordinary_V, self.share, self.seed = blocks, ordinary_V, share, seed

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * len(self.blocks) + index)
        return contaminate(self.blocks[index]["input_ids"], self.ordinary_V, self.share, generator)


def contaminate(
    ids_T: Tensor, ordinary_V: Tensor, share: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """``input_ids`` with a ``share`` of tokens replaced, and ``labels`` without the replaced ones.

    Args:
        ids_T: token ids (T,).
        ordinary_V: ids that are replaced, and by which, in rising order. A token is never replaced
            by itself.
    """
    place_T = torch.searchsorted(ordinary_V, ids_T).clamp_max(len(ordinary_V) - 1)
    drawn_T = torch.rand(ids_T.shape, generator=generator) < share
    hit_T = drawn_T & (ordinary_V[place_T] == ids_T)
    shift_T = torch.randint(1, len(ordinary_V), ids_T.shape, generator=generator)
    other_T = ordinary_V[(place_T + shift_T) % len(ordinary_V)]
    return {
        "input_ids": torch.where(hit_T, other_T, ids_T),
        "labels": ids_T.masked_fill(hit_T, -100),
    }
