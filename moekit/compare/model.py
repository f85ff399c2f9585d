"""What all designs of a study have in common."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.spec import Spec


@dataclass(frozen=True)
class ModelSpec(Spec):
    """The decoder around the feed-forward parts: everything that all designs have in common.

    Attributes:
        width: model width D.
        depth: number of layers.
        heads, kv_heads: attention heads, and heads of keys and values.
        tie_embeddings: whether the output projection is the embedding.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    tie_embeddings: bool = True

    def check(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted at least 1")
        self.require(
            self.width % self.heads == 0, f"width {self.width} is no multiple of {self.heads} heads"
        )
        self.require(
            self.heads % self.kv_heads == 0,
            f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly",
        )
