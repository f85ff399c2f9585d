"""Fixtures of the contract suite."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from moekit.dispatch import choice, few_rows, streamed
from moekit.dispatch.native_library import KernelCall
from moekit.experts.groups import GroupedMM, PaddedGroups, RowGroups


class ProductCounter:
    """Rows of each grouped product, seen from outside the layer's own count."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.inside = False


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> ProductCounter:
    """Counts the rows that enter every kind of grouped product."""
    counter = ProductCounter()

    def watch(kind: type[RowGroups]) -> None:
        original = kind.product

        def product(self: RowGroups, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if counter.inside:  # grouped_mm falling back on the loop
                return original(self, rows, weight)
            counter.rows.append(rows.shape[0])
            counter.inside = True
            try:
                return original(self, rows, weight)
            finally:
                counter.inside = False

        monkeypatch.setattr(kind, "product", product)

    for kind in (RowGroups, GroupedMM, PaddedGroups):
        watch(kind)

    one_expert = few_rows.product

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        counter.rows.append(rows.shape[0])
        return one_expert(rows, weight)

    for module in (few_rows, streamed):
        monkeypatch.setattr(module, "product", product)
    run = KernelCall.run

    def run_native(self: KernelCall, name: str) -> None:
        kernels = {"forward": 2, "product": 1}  # that multiply, and how often
        counter.rows += [self.fields["rows"]] * kernels[name] if name in kernels else []
        run(self, name)

    monkeypatch.setattr(KernelCall, "run", run_native)
    decoded = choice.decoded

    def decode(*given: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = decoded(*given)
        counter.rows += [] if found is None else [int(found[1].sum())] * 2
        return found

    monkeypatch.setattr(choice, "decoded", decode)
    if find_spec("triton") is not None:
        _watch_launches(counter, monkeypatch)
    return counter


def _watch_launches(counter: ProductCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the rows of the launches that multiply."""
    from moekit.dispatch.triton_backend import Launches

    def watch(name: str) -> None:
        original = getattr(Launches, name)

        def launch(self: Launches, *given: Any, **named: Any) -> Any:
            counter.rows.append(self.rows)
            return original(self, *given, **named)

        monkeypatch.setattr(Launches, name, launch)

    watch("product")
    watch("gated")
