"""scikit-learn's 8x8 digits, and a small classifier of them made of MoE blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import MissingExtraError
from moekit.layer import MoE, MoEOutput, MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderModel

TRAINING_IMAGES = 1200


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
    """Patches of 2x2 pixels, blocks of attention and MoE, mean pooling, ten classes.

    The blocks are those of the language model, with attention in both directions.

    Args:
        layer: the MoE layer of every block.
        width: model width.
        depth: number of blocks.
    """

    def __init__(self, layer: MoESpec, width: int, depth: int) -> None:
        super().__init__()
        config = MoEDecoderConfig(
            vocab_size=1,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            max_position_embeddings=16,
            layers=layer,
        )
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = MoEDecoderModel(config)
        self.head = nn.Linear(width, 10)

    @property
    def layers(self) -> list[MoE]:
        """The MoE layer of each block, from the first to the last."""
        return [part for part in self.blocks.modules() if isinstance(part, MoE)]

    def forward(self, images_NHW: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 8, 8)."""
        return self.logits_and_records(images_NHW)[0]

    def logits_and_records(self, images_NHW: Tensor) -> tuple[Tensor, tuple[MoEOutput, ...]]:
        """The logits, and what the MoE layer of each block did with the 16 N patches."""
        patches_NTP = images_NHW.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
        embedded_NTD = self.patch(patches_NTP) + self.position
        everything = embedded_NTD.new_zeros(1, 1, 16, 16)
        output = self.blocks(
            inputs_embeds=embedded_NTD,
            attention_mask={"full_attention": everything, "valid": None},
            use_cache=False,
        )
        return self.head(output.last_hidden_state.mean(1)), output.moe
