"""Residual rules on images: scikit-learn's 8x8 digits, clean and with noise added at test time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.compare.record import write_json
from moekit.errors import MissingExtraError
from moekit.experts import ReLU
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderModel
from moekit.residual import ResidualSpec
from moekit.routing import TopK
from moekit.training import ProgressReporter

NOISE = (0.2, 0.3, 0.4)
TRAINING_IMAGES = 1200
BATCH = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Digits:
    """The images (N, 8, 8), from 0 to 1, and their digits (N,), in two parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """1200 images to train on and 597 to test on, drawn with ``seed``.

    Raises:
        MissingExtraError: scikit-learn, which holds the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise MissingExtraError(
            "the digits come with scikit-learn, which is not installed; "
            'run pip install "moekit[experiments]"'
        ) from None
    found = load()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(found.images).float()[order] / 16
    labels = torch.from_numpy(found.target).long()[order]
    cut = TRAINING_IMAGES
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


class DigitsClassifier(nn.Module):
    """Patches of 2x2 pixels, six blocks of attention and MoE, mean pooling, ten classes.

    The blocks are those of the language model, with attention in both directions; experts are
    linear, ReLU, linear with biases as in the paper's code, which also trains without a balance
    loss.
    """

    def __init__(self, rule: ResidualSpec, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        experts = ReLU(count=8, hidden=width, bias=True)
        config = MoEDecoderConfig(
            vocab_size=1,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            max_position_embeddings=16,
            layers=MoESpec(TopK(k=2), experts, residual=rule),
        )
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = MoEDecoderModel(config)
        self.head = nn.Linear(width, 10)

    def forward(self, images_NHW: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 8, 8)."""
        patches_NTP = images_NHW.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
        embedded_NTD = self.patch(patches_NTP) + self.position
        everything = embedded_NTD.new_zeros(1, 1, 16, 16)
        output = self.blocks(
            inputs_embeds=embedded_NTD,
            attention_mask={"full_attention": everything, "valid": None},
            use_cache=False,
        )
        return self.head(output.last_hidden_state.mean(1))


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
    model = DigitsClassifier(rule).to(device)
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
