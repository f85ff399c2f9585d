"""Residual rules on images: scikit-learn's 8x8 digits, clean and with noise added at test time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.compare.record import write_json
from moekit.experts import ReLU
from moekit.layer import MoESpec
from moekit.residual import ResidualSpec
from moekit.routing import TopK
from moekit.systems.digits import Digits, DigitsClassifier, load_digits
from moekit.training import ProgressReporter

NOISE = (0.2, 0.3, 0.4)
BATCH = 64
LEARNING_RATE = 2e-3


def classifier(rule: ResidualSpec, width: int = 32, depth: int = 6) -> DigitsClassifier:
    """Experts are linear, ReLU, linear with biases as in the paper's code.

    It too trains without a balance loss.
    """
    experts = ReLU(count=8, hidden=width, bias=True)
    return DigitsClassifier(MoESpec(TopK(k=2), experts, residual=rule), width, depth)


def digits_accuracies(
    rule: ResidualSpec,
    seed: int,
    epochs: int,
    device: str,
    kept: Path,
    reporter: ProgressReporter,
    description: str,
) -> dict[str, float]:
    """Test accuracies of one rule: ``clean``, and ``noise 0.2`` for noise of that deviation.

    Rules with the same seed see the same images in the same order, and the same noise.

    Args:
        kept: file of the result; a finished run is not run again.
    """
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    digits = load_digits(seed)
    torch.manual_seed(seed)
    model = classifier(rule).to(device)
    try:
        _train(model, digits, seed, epochs, reporter, description)
    finally:
        reporter.finish()
    found = _tested(model, digits, seed)
    write_json(kept, found)
    return found


def _train(
    model: DigitsClassifier,
    digits: Digits,
    seed: int,
    epochs: int,
    reporter: ProgressReporter,
    description: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    device = model.position.device
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    reporter.start(epochs, description)
    for epoch in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for rows in order.split(BATCH):
            logits = model(digits.train_images[rows].to(device))
            loss = F.cross_entropy(logits, digits.train_labels[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reporter.update(epoch + 1, float(loss.detach()), None)


@torch.no_grad()
def _tested(model: DigitsClassifier, digits: Digits, seed: int) -> dict[str, float]:
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(digits.test_images.shape, generator=generator)
    device = model.position.device

    def accuracy(images: Tensor) -> float:
        found: Any = model(images.to(device)).argmax(-1).cpu()
        return float((found == digits.test_labels).float().mean())

    noisy = {f"noise {s}": accuracy(digits.test_images + s * noise) for s in NOISE}
    return {"clean": accuracy(digits.test_images), **noisy}
