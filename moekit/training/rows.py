"""Log rows: flat for trackers, one a step for the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {"eval_loss": "validation_loss", "eval_runtime": "validation_seconds"}


def history_rows(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a step from a Trainer's ``log_history``."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            renamed = {_NAMES.get(name, name): value for name, value in entry.items()}
            rows.setdefault(entry["step"], {}).update(renamed)
    return [rows[step] for step in sorted(rows)]


def flat_row(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log row under flat names, as TensorBoard and W&B want them.

    ``routing/load_violation``, ``routing/SwitchBalance``, ``routing/L1Balance/coefficient``,
    ``layers/0/entropy``, ``layers/0/load/3`` and so on; what is None is left out.
    """
    flat = {name: value for name, value in row.items() if name != "routing"}
    routing = dict(row.get("routing", {}))
    layers = routing.pop("layers", [])
    for name, value in routing.pop("losses", {}).items():
        flat[f"routing/{name}"] = value
    for name, value in routing.pop("coefficients", {}).items():
        flat[f"routing/{name}/coefficient"] = value
    flat.update({f"routing/{name}": value for name, value in routing.items()})
    for index, layer in enumerate(layers):
        flat.update(_flat_layer(f"layers/{index}", layer))
    return {name: value for name, value in flat.items() if value is not None}


def _flat_layer(prefix: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in layer.items():
        if isinstance(value, list):
            flat.update({f"{prefix}/{name}/{i}": entry for i, entry in enumerate(value)})
        else:
            flat[f"{prefix}/{name}"] = value
    return flat
