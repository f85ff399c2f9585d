"""Under which names a checkpoint stores the tensors of a layer.

transformers fuses the experts of a layer into one tensor when it loads them, and most checkpoints
store a matrix an expert, some under older names. Both forms are read; the older one is written, as
transformers does itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import CheckpointError

Reader = Callable[[str], Tensor]
"""Reads the stored tensor of a name."""


@dataclass(frozen=True)
class Part:
    """A stored tensor that is a part of a fused one.

    Attributes:
        name: its stored name.
        expert: of which expert it is.
        rows: which rows of that expert's matrix it holds; None for all.
    """

    name: str
    expert: int
    rows: slice | None = None

    def of(self, fused: Tensor) -> Tensor:
        """The part of ``fused``, sharing its memory."""
        return fused[self.expert] if self.rows is None else fused[self.expert, self.rows]


@dataclass(frozen=True)
class StoredNames:
    """The names of one architecture.

    Attributes:
        renamed: parts of a module's tensor name and what a checkpoint writes for them.
        gate, up, down: what a checkpoint writes for an expert's matrix in place of ``experts`` and
            the fused tensor's name, ``{}`` standing for the expert; empty where experts are stored
            fused.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    gate: str = ""
    up: str = ""
    down: str = ""

    def plain(self, name: str) -> str:
        """The stored name of a tensor that is stored whole."""
        for inside, stored in self.renamed:
            name = name.replace(inside, stored)
        return name

    def parts(self, name: str, shape: torch.Size) -> list[Part] | None:
        """The stored parts of the fused tensor ``name``; None for a tensor stored whole."""
        prefix, dot, kind = self.plain(name).rpartition("experts.")
        if not self.gate or not dot or kind not in ("gate_up_proj", "down_proj"):
            return None
        stored = f"{prefix}{dot}"
        if kind == "down_proj":
            return [Part(stored + self.down.format(e), e) for e in range(shape[0])]
        half = shape[1] // 2
        sides = ((self.gate, slice(None, half)), (self.up, slice(half, None)))
        return [
            Part(stored + pattern.format(e), e, rows)
            for e in range(shape[0])
            for pattern, rows in sides
        ]

    def used(
        self, name: str, shape: torch.Size, stored: Container[str]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """The stored tensors that make up ``name``, each with the shape it must have.

        Args:
            stored: a container of the names that the checkpoint has.
        """
        parts = self.parts(name, shape)
        if parts is None or name in stored:
            found = name if name in stored else self.plain(name)
            return [(found, tuple(shape))]
        fused = torch.empty(shape, device="meta")
        return [(part.name, tuple(part.of(fused).shape)) for part in parts]

    def read(self, name: str, shape: torch.Size, stored: Container[str], read: Reader) -> Tensor:
        """The tensor ``name`` of a module; a fused one is filled part by part."""
        parts = self.parts(name, shape)
        if parts is None or name in stored:
            return read(name if name in stored else self.plain(name))
        first = read(parts[0].name)
        fused = torch.empty(shape, dtype=first.dtype)
        for part in parts:
            tensor = read(part.name)
            if tensor.dtype != fused.dtype:
                raise CheckpointError(
                    f"{part.name} is {tensor.dtype} and {parts[0].name} is {fused.dtype}; "
                    "the experts of a layer must be of one type"
                )
            part.of(fused).copy_(tensor)
        return fused

    def split(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors to store for the tensor ``name`` of a module."""
        parts = self.parts(name, tensor.shape)
        if parts is None:
            yield self.plain(name), tensor
        else:
            yield from ((part.name, part.of(tensor)) for part in parts)


FUSED = StoredNames()
PER_EXPERT = StoredNames(
    gate="{}.gate_proj.weight", up="{}.up_proj.weight", down="{}.down_proj.weight"
)
MIXTRAL = StoredNames(
    renamed=((".mlp.", ".block_sparse_moe."),),
    gate="{}.w1.weight",
    up="{}.w3.weight",
    down="{}.w2.weight",
)
PHIMOE = StoredNames(
    renamed=((".router.weight", ".gate.weight"), (".mlp.", ".block_sparse_moe.")),
    gate=MIXTRAL.gate,
    up=MIXTRAL.up,
    down=MIXTRAL.down,
)
GRANITE = StoredNames(
    renamed=(
        (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
        (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
        (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    )
)
