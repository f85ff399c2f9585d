"""The run that is interrupted, shared by the tests and the process that gets killed."""

from __future__ import annotations

from tiny_training import TinyData, tiny_model

from moekit import Constant, L1Balance, MoESpec, ReLURouting, SwiGLU, SwitchBalance, TopK
from moekit.experts import Bank
from moekit.models.language import MoEDecoderForCausalLM
from moekit.training import TrainingSpec

DATA = TinyData()

# Everything that a resume must restore: random numbers in the router, a bias and a λ that move
# without gradient, micro-batches, and several passes over the data.
LAYERS = [
    MoESpec(
        TopK(k=2, jitter=0.1, noise=True, bias_rate=0.01),
        Bank((SwiGLU(count=3, hidden=16), Constant())),
        losses=(SwitchBalance(),),
    ),
    MoESpec(ReLURouting(k=1), SwiGLU(count=4, hidden=16), losses=(L1Balance(k=1, initial=1e-3),)),
]
SPEC = TrainingSpec(
    steps=16, batch_size=8, gradient_accumulation=2, save_every=4, eval_every=6, log_every=3
)


def model() -> MoEDecoderForCausalLM:
    """The model at its start."""
    return tiny_model(LAYERS)
