"""torch.compile: results stay the same, and graph breaks stay within the documented number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract_cases import EXPERTS, MIXED, PADDED, Case, Inputs
from contract_oracle import relative_error

from moekit.dispatch import Capacity, DispatchSpec, Dropless
from moekit.experts import ExpertsSpec, SwiGLU
from moekit.routing import ExpertChoice, Hash, Pathway, ReLURouting, RouterSpec, TopK

# Both come from Dynamo's own handling of user classes (torch 2.13), not from what it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

TABLE = Path(__file__).parents[2] / "docs" / "concepts" / "compile.md"

DISPATCHES: dict[str, DispatchSpec] = {
    "Dropless()": Dropless(),
    'Dropless(backend="loop")': Dropless(backend="loop"),
    "Capacity()": Capacity(),
    "Capacity(pad=True)": PADDED,
}
ROUTERS: dict[str, RouterSpec] = {
    "TopK": TopK(k=2),
    "Pathway": Pathway(k=2),
    "ReLURouting": ReLURouting(k=2),
    "ExpertChoice": ExpertChoice(capacity=2.0),
    "Hash": Hash(k=2),
}
BANKS: dict[str, ExpertsSpec] = {
    "feed-forward": SwiGLU(count=EXPERTS, hidden=8),
    "feed-forward and zero-computation": MIXED,
}


def documented() -> list[tuple[str, str, str, str, int]]:
    """The rows of the table in the documentation."""
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [(dispatch, router, bank, dtype, int(n)) for dispatch, router, bank, dtype, n in rows]


def build(dispatch: str, router: str, bank: str, dtype: str) -> tuple[torch.nn.Module, Inputs]:
    kind = getattr(torch, dtype)
    case = Case(ROUTERS[router], BANKS[bank], DISPATCHES[dispatch])
    return case.layer(kind), Inputs.make(12, kind)


def test_the_table_covers_every_dispatch() -> None:
    assert {row[0] for row in documented()} == set(DISPATCHES)
    assert {row[1] for row in documented()} == set(ROUTERS)
    assert {row[2] for row in documented()} == set(BANKS)


@pytest.mark.parametrize("row", documented(), ids=lambda row: "-".join(map(str, row)))
def test_graph_breaks_do_not_exceed_the_table(row: tuple[str, str, str, str, int]) -> None:
    *parts, allowed = row
    layer, inputs = build(*parts)
    torch._dynamo.reset()

    def forward(x_ND: torch.Tensor) -> torch.Tensor:
        return layer(x_ND, inputs.signals, inputs.carry).y

    assert torch._dynamo.explain(forward)(inputs.x_ND).graph_break_count <= allowed


@pytest.mark.parametrize(
    "row",
    [row for row in documented() if row[-1] == 0],
    ids=lambda row: "-".join(map(str, row)),
)
def test_a_layer_without_breaks_is_one_graph_forward_and_backward(row) -> None:
    layer, inputs = build(*row[:-1])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for run in (layer, compiled):
        x_ND = inputs.x_ND.clone().requires_grad_()
        y = run(x_ND, inputs.signals, inputs.carry).y
        grads = torch.autograd.grad(y.float().square().sum(), [x_ND, *layer.parameters()])
        found.append([y, *grads])
    for plain, traced in zip(*found, strict=True):
        # Compiled, a layer is plain operations; otherwise it is one operation that rounds at other
        # places. A small entry of a bfloat16 gradient is a difference of large ones, so errors are
        # taken over the largest, as where each is compared with the oracle.
        if row[3] == "bfloat16":
            assert relative_error(traced, plain) < 2e-2
        else:
            torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["TopK", "ReLURouting"])
def test_a_layer_with_breaks_gives_the_same_result(router: str) -> None:
    layer, inputs = build("Dropless()", router, "feed-forward", "float32")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    plain = layer(inputs.x_ND, inputs.signals, inputs.carry).y
    traced = compiled(inputs.x_ND, inputs.signals, inputs.carry).y
    torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # another number of rows an expert, the same compiled layer
        other = Inputs.make(20, seed=8)
        torch.testing.assert_close(
            compiled(other.x_ND, other.signals, other.carry).y,
            layer(other.x_ND, other.signals, other.carry).y,
            rtol=1e-5,
            atol=1e-6,
        )
