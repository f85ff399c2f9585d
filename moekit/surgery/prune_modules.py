"""Removing the modules that a task does not use (ModuleFormer, arXiv 2306.04640)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.experts import Bank, ExpertsSpec
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing import ModuleRouter, ModuleRouting, ReLURouting, RouterSpec, TopK
from moekit.routing.module_routing import REMOVED
from moekit.surgery.rebuild import Mixture, Part, mixtures, rebuilt
from moekit.surgery.usage import ModuleUsage

Mode = Literal["slice", "mask"]
Origins = dict[str, tuple[str, list[int]]]
"""By the start of a tensor's name, the start of the old name and the rows that are kept."""

ROWS = ("weight", "bias", "noise_weight", "correction_bias_E")
"""Tensors with one row an expert, of routers whose every such tensor is one of these."""


def prune_modules(
    model: MoEDecoderForCausalLM,
    usage: ModuleUsage,
    *,
    threshold: float | None = None,
    share: float | None = None,
    mode: Mode = "slice",
    parts: tuple[Part, ...] = ("attention", "feed_forward"),
) -> MoEDecoderForCausalLM:
    """A smaller copy of ``model`` without its least used modules.

    Removing a module that no token uses is not without effect where weights are probabilities over
    all modules: ``slice`` also removes its row of the router, so that the others' weights become
    ``p / (1 - p_removed)``; ``mask`` keeps the row in the softmax alone, so that tokens whose
    modules are all kept are computed exactly as before.

    Args:
        model: a decoder whose mixtures to be pruned are routed by
            :class:`~moekit.routing.ModuleRouting`, :class:`~moekit.TopK` or
            :class:`~moekit.ReLURouting`.
        usage: see :func:`moekit.surgery.module_usage`.
        threshold: remove modules that a smaller share of tokens uses.
        share: or remove this share of each mixture's modules, the least used first.
        mode: what becomes of the removed modules' rows of the router; ``mask`` is for
            ``ModuleRouting``.
        parts: which mixtures to prune.

    Raises:
        SpecError: neither or both of ``threshold`` and ``share`` are given; fewer modules than the
            router's k would be left in a mixture; ``usage`` is of another model; or a mixture has
            a router that cannot be cut.
    """
    _check(threshold, share)
    usage.check(model)
    specs: dict[str, MoESpec] = {}
    weights: dict[str, Tensor] = {}
    for mixture in (m for m in mixtures(model) if m.part in parts):
        kept = _kept(mixture, usage.frequency[mixture.name], threshold, share)
        if len(kept) < len(mixture.layer.experts.kinds):
            spec, cut = _pruned(mixture, kept, mode)
            specs[mixture.name] = spec
            weights |= {f"{mixture.name}.{name}": value for name, value in cut.items()}
    return rebuilt(model, specs, weights)


def _check(threshold: float | None, share: float | None) -> None:
    if (threshold is None) == (share is None):
        raise SpecError("give either a threshold of use or the share of modules to remove")
    for name, value in (("threshold", threshold), ("share", share)):
        if value is not None and not 0 <= value <= 1:
            raise SpecError(f"{name} is {value}; wanted a share from 0 to 1")


def _kept(
    mixture: Mixture, frequency: Sequence[float], threshold: float | None, share: float | None
) -> list[int]:
    """Ids of the modules that stay, in order."""
    ids = range(len(frequency))
    if share is not None:
        gone = sorted(ids, key=lambda m: frequency[m])[: int(share * len(frequency) + 1e-9)]
        kept = [m for m in ids if m not in gone]
    else:
        assert threshold is not None
        kept = [m for m in ids if frequency[m] >= threshold]
    least = getattr(mixture.spec.router, "k", 1)
    if len(kept) < least:
        raise SpecError(
            f"{mixture.name} would be left with {len(kept)} modules and its router takes {least} a "
            "token; remove fewer"
        )
    return kept


@torch.no_grad()
def _pruned(mixture: Mixture, kept: list[int], mode: Mode) -> tuple[MoESpec, dict[str, Tensor]]:
    bank, origins = _cut(mixture.spec.experts, kept)
    weights = {}
    for name, value in mixture.layer.experts.state_dict().items():
        for new, (old, ids) in origins.items():
            if name.startswith(old):
                weights[f"experts.{new}{name.removeprefix(old)}"] = value[ids]
    router, rows = _cut_router(mixture, kept, mode)
    weights |= {f"router.{name}": value for name, value in rows.items()}
    return mixture.spec.replace(router=router, experts=bank), weights


def _cut(bank: ExpertsSpec, kept: Sequence[int]) -> tuple[ExpertsSpec, Origins]:
    """The bank of the experts ``kept``, whose tensors all have one row an expert."""
    if not isinstance(bank, Bank):
        return bank.replace(count=len(kept)), {"": ("", list(kept))}
    parts: list[ExpertsSpec] = []
    origins: Origins = {}
    start = 0
    for index, part in enumerate(bank.parts):
        size = len(part.expert_kinds())
        own = [m - start for m in kept if start <= m < start + size]
        start += size
        if own:
            spec, inner = _cut(part, own)
            for new, (old, ids) in inner.items():
                origins[f"parts.{len(parts)}.{new}"] = (f"parts.{index}.{old}", ids)
            parts.append(spec)
    return Bank(tuple(parts)), origins


def _cut_router(
    mixture: Mixture, kept: list[int], mode: Mode
) -> tuple[RouterSpec, dict[str, Tensor]]:
    spec, router = mixture.spec.router, mixture.layer.router
    if isinstance(spec, ModuleRouting):
        assert isinstance(router, ModuleRouter)
        return _cut_module_router(spec, router, kept, mode)
    if type(spec) not in (TopK, ReLURouting):
        raise SpecError(
            f"{mixture.name} is routed by {type(spec).__name__}, which cannot be cut; prunable are "
            "ModuleRouting, TopK and ReLURouting"
        )
    if mode == "mask":
        raise SpecError(
            f"{mixture.name} is routed by {type(spec).__name__}, which keeps no rows of removed "
            "modules; use mode slice"
        )
    return spec, {name: v[kept] for name, v in router.state_dict().items() if name in ROWS}


def _cut_module_router(
    spec: ModuleRouting, router: ModuleRouter, kept: list[int], mode: Mode
) -> tuple[RouterSpec, dict[str, Tensor]]:
    blocks = [(w, w.new_zeros(len(w)) if b is None else b) for w, b in router.blocks]
    rows: dict[str, Tensor] = {}
    sizes, start = [], 0
    for index, (weight, bias) in enumerate(blocks):
        own = [m - start for m in kept if start <= m < start + len(weight)]
        start += len(weight)
        sizes.append(len(own))
        prefix = f"added_{index - 1}_" if index else ""
        rows[f"{prefix}weight"] = weight[own]
        if index:
            rows[f"{prefix}bias"] = bias[own]
    removed = spec.removed
    if mode == "mask":
        gone = [m for m in range(start) if m not in kept]
        removed += len(gone)
        for place, name in enumerate(("weight", "bias")):
            every = torch.cat([block[place] for block in blocks])[gone]
            before = router.state_dict().get(f"{REMOVED}{name}", every[:0])
            rows[f"{REMOVED}{name}"] = torch.cat([before, every])
    return spec.replace(added=tuple(sizes[1:]), removed=removed), rows
