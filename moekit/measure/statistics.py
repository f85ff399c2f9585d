"""Counts of what each MoE layer routed, kept on the device until they are asked for.

Statistics add up, over batches with ``+`` and over ranks with ``all_reduce``, and every figure
that is not a count is derived from the sums. Padding is left out throughout.

Example:
    >>> from moekit import MoESpec, SwiGLU, TopK
    >>> layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16)).build(width=8)
    >>> statistics = LayerStatistics.of(layer(torch.randn(10, 8)), layer.experts.kinds)
    >>> statistics.summary()["experts_per_token"]
    2.0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.layer import MoEOutput
from moekit.routing.router import ranges_of
from moekit.routing.routing import Load, Routing


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer routed. Every tensor is a sum over tokens and carries no gradient.

    Attributes:
        kinds: one entry an expert, as in :class:`~moekit.experts.Experts`.
        tokens: tokens routed ().
        load_E: assignments each expert received, before any capacity limit.
        rows: rows that reached a matrix product (), after any capacity limit; places that a
            padded dispatch fills with zeros count, since they are computed. Shared experts, which
            every token passes, are not in it.
        dropped: assignments that a capacity limit dropped ().
        histogram_C: tokens by their number of feed-forward experts, before any capacity limit;
            entry c counts the tokens that chose c of them.
        entropy: sum over tokens of the entropy of the scores divided by their sum, in nats ();
            None for routers without scores. A token whose scores are all 0 has entropy 0.
    """

    kinds: tuple[str, ...]
    tokens: Tensor
    load_E: Tensor
    rows: Tensor
    dropped: Tensor
    histogram_C: Tensor
    entropy: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, output: MoEOutput, kinds: tuple[str, ...] | None = None) -> LayerStatistics:
        """The statistics of one call of a layer.

        Args:
            output: what the layer returned.
            kinds: the bank's ``kinds``; None when every expert is a feed-forward one.
        """
        counted = cls.of_routing(output.routing, kinds)
        return dataclasses.replace(counted, rows=output.rows_E.sum(), dropped=output.dropped)

    @classmethod
    @torch.no_grad()
    def of_routing(cls, routing: Routing, kinds: tuple[str, ...] | None = None) -> LayerStatistics:
        """The statistics of a routing that is run as it is, without a capacity limit."""
        kinds = ("feed_forward",) * routing.experts if kinds is None else kinds
        histogram_C = _histogram(routing, kinds)
        number_C = torch.arange(len(histogram_C), device=histogram_C.device)
        return cls(
            kinds=kinds,
            tokens=routing.valid_tokens(),
            load_E=_counts(routing.expert_NK.flatten() + 1, routing.experts + 1)[1:],
            rows=(histogram_C * number_C).sum(),
            dropped=histogram_C.new_zeros(()),
            histogram_C=histogram_C,
            entropy=_entropy(routing),
        )

    @property
    def load(self) -> Load:
        """The part that routers and losses learn from once an optimiser step."""
        return Load(self.load_E, self.tokens)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        if self.kinds != other.kinds:
            raise ValueError("statistics of layers with different banks cannot be added")
        entropy = None
        if self.entropy is not None and other.entropy is not None:
            entropy = self.entropy + other.entropy
        return LayerStatistics(
            kinds=self.kinds,
            tokens=self.tokens + other.tokens,
            load_E=self.load_E + other.load_E,
            rows=self.rows + other.rows,
            dropped=self.dropped + other.dropped,
            histogram_C=_add_padded(self.histogram_C, other.histogram_C),
            entropy=entropy,
        )

    def all_reduce(self) -> LayerStatistics:
        """The sum over all ranks; the statistics themselves where there is one rank."""
        return ModelStatistics((self,)).all_reduce()[0]

    def summary(self) -> dict[str, Any]:
        """Plain numbers, read from the device at once.

        Returns:
            ``tokens``, ``load`` (assignments of each expert), ``rows``, ``dropped`` and
            ``histogram``, as above, and

            - ``experts_per_token``: assignments a token, zero-computation experts included;
            - ``feed_forward_experts_per_token``: the same without them;
            - ``rows_per_token``: rows that reached a matrix product a token;
            - ``dropped_share``: share of assignments dropped;
            - ``load_violation``: largest over mean load of the feed-forward experts, 1 when even
              (MaxVio of Wang et al. 2024 plus 1); 0 when none was used;
            - ``unused_experts``: feed-forward experts without a single assignment;
            - ``sparsity``: share of (token, expert) pairs that are not assigned (ReMoE sec. 3.2);
            - ``entropy``: mean entropy of a token's scores in nats, or None.
        """
        return ModelStatistics((self,)).summary()["layers"][0]

    def _integers(self) -> list[Tensor]:
        scalars = torch.stack([self.tokens, self.rows, self.dropped])
        return [scalars, self.load_E, self.histogram_C]

    def _with(self, integers: Sequence[Tensor], entropy: Tensor | None) -> LayerStatistics:
        (tokens, rows, dropped), load_E, histogram_C = integers
        return LayerStatistics(self.kinds, tokens, load_E, rows, dropped, histogram_C, entropy)


@dataclass(frozen=True)
class ModelStatistics(Sequence[LayerStatistics]):
    """The statistics of every MoE layer of a model, in order."""

    layers: tuple[LayerStatistics, ...]

    @classmethod
    def of(
        cls, outputs: Sequence[MoEOutput], kinds: Sequence[tuple[str, ...]] | None = None
    ) -> ModelStatistics:
        """The statistics of one forward pass.

        Args:
            outputs: what each MoE layer returned.
            kinds: each layer's ``experts.kinds``; None when all experts are feed-forward ones.
        """
        each = [None] * len(outputs) if kinds is None else kinds
        return cls(tuple(LayerStatistics.of(o, k) for o, k in zip(outputs, each, strict=True)))

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[LayerStatistics]:
        return iter(self.layers)

    def __add__(self, other: ModelStatistics) -> ModelStatistics:
        return ModelStatistics(tuple(a + b for a, b in zip(self, other, strict=True)))

    @property
    def loads(self) -> list[Load]:
        """Each layer's load, as ``update_routing`` wants it."""
        return [layer.load for layer in self.layers]

    def all_reduce(self) -> ModelStatistics:
        """The sum over all ranks, by two collectives; unchanged where there is one rank."""
        if not (dist.is_available() and dist.is_initialized()) or not self.layers:
            return self
        integers, entropies = self._flat()
        dist.all_reduce(integers)
        dist.all_reduce(entropies)
        return self._unflat(integers, entropies)

    def summary(self) -> dict[str, Any]:
        """Plain numbers, read from the device at once.

        Returns:
            ``layers``, the :meth:`LayerStatistics.summary` of each, and over the layers: the mean
            of ``experts_per_token``, ``feed_forward_experts_per_token``, ``rows_per_token``,
            ``dropped_share``, ``load_violation``, ``sparsity`` and ``entropy`` (None without
            scores), the sum of ``unused_experts``, and ``tokens`` of one layer.
        """
        if not self.layers:
            return {"tokens": 0, "layers": []}
        integers, entropies = self._flat()
        host = self._unflat(integers.cpu(), entropies.cpu())
        layers = [_layer_summary(layer) for layer in host]
        means = {name: _mean([layer[name] for layer in layers]) for name in _AVERAGED}
        unused = sum(layer["unused_experts"] for layer in layers)
        return {
            "tokens": layers[0]["tokens"],
            **means,
            "unused_experts": unused,
            "layers": layers,
        }

    def _flat(self) -> tuple[Tensor, Tensor]:
        integers = torch.cat([part for layer in self.layers for part in layer._integers()])
        none = torch.zeros((), device=integers.device)
        entropies = [none if layer.entropy is None else layer.entropy for layer in self.layers]
        return integers, torch.stack(entropies)

    def _unflat(self, integers: Tensor, entropies: Tensor) -> ModelStatistics:
        sizes = [part.numel() for layer in self.layers for part in layer._integers()]
        parts = integers.split(sizes)
        layers = []
        for index, layer in enumerate(self.layers):
            entropy = None if layer.entropy is None else entropies[index]
            layers.append(layer._with(parts[3 * index : 3 * index + 3], entropy))
        return ModelStatistics(tuple(layers))


_AVERAGED = (
    "experts_per_token",
    "feed_forward_experts_per_token",
    "rows_per_token",
    "dropped_share",
    "load_violation",
    "sparsity",
    "entropy",
)


def _layer_summary(layer: LayerStatistics) -> dict[str, Any]:
    load: list[int] = layer.load_E.tolist()
    tokens, rows, dropped = int(layer.tokens), int(layer.rows), int(layer.dropped)
    dense = [n for n, kind in zip(load, layer.kinds, strict=True) if kind == "feed_forward"]
    per_token = sum(load) / max(tokens, 1)
    return {
        "tokens": tokens,
        "load": load,
        "rows": rows,
        "dropped": dropped,
        "histogram": layer.histogram_C.tolist(),
        "experts_per_token": per_token,
        "feed_forward_experts_per_token": sum(dense) / max(tokens, 1),
        "rows_per_token": rows / max(tokens, 1),
        "dropped_share": dropped / max(sum(load), 1),
        "load_violation": max(dense, default=0) * len(dense) / max(sum(dense), 1),
        "unused_experts": dense.count(0),
        "sparsity": 1 - per_token / len(load),
        "entropy": None if layer.entropy is None else float(layer.entropy) / max(tokens, 1),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _counts(index_N: Tensor, size: int, weight_N: Tensor | None = None) -> Tensor:
    """How often each of ``size`` values occurs; unlike bincount without a device sync."""
    weight_N = torch.ones_like(index_N) if weight_N is None else weight_N.to(index_N.dtype)
    return index_N.new_zeros(size).scatter_add_(0, index_N, weight_N)


def _histogram(routing: Routing, kinds: tuple[str, ...]) -> Tensor:
    expert_NK = routing.expert_NK
    counted_NK = torch.zeros_like(routing.used_NK)
    for start, stop in ranges_of(kinds, "feed_forward"):
        counted_NK |= (expert_NK >= start) & (expert_NK < stop)
    return _counts(counted_NK.sum(1), expert_NK.shape[1] + 1, routing.valid_N)


def _entropy(routing: Routing) -> Tensor | None:
    if routing.scores_NE is None:
        return None
    score_NE = routing.scores_NE.float()
    total_N1 = score_NE.sum(-1, keepdim=True)
    share_NE = score_NE / torch.where(total_N1 > 0, total_N1, 1.0)
    entropy_N = torch.special.entr(share_NE).sum(-1)
    if routing.valid_N is not None:
        entropy_N = entropy_N.masked_fill(~routing.valid_N, 0.0)
    return entropy_N.sum()


def _add_padded(a: Tensor, b: Tensor) -> Tensor:
    size = max(len(a), len(b))
    pad = torch.nn.functional.pad
    return pad(a, (0, size - len(a))) + pad(b, (0, size - len(b)))
