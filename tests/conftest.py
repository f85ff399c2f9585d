"""What every test shares: no network, no state of the user, few threads, known seeds."""

from __future__ import annotations

import os

# The Hugging Face libraries read this once, when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

# Triton reads this when a kernel is defined: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent

# The tensors of the tests are too small to be worth sharing among cores.
torch.set_num_threads(1)

# No deadline: the first example of a test pays for lazy imports and for the allocator.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
# The same examples in every run, so that a failure there is the change's own.
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def _searched_once() -> None:
    """Leave out of every later search for garbage what is there by now.

    That is torch, transformers, all tests, and what earlier tests made torch and sympy import and
    keep: up to seconds of objects, and each training and each measurement of memory searches
    several times.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches out of the user's folders and trackers off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEKIT_CACHE", str(tmp_path_factory.mktemp("moekit-cache")))
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    # `torch.manual_seed` takes 4 ms to note its caller down for GPUs that are not there.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def aligned() -> Callable[[nn.Module], Any]:
    """A function that moves a loaded model's weights to where torch would have allocated them.

    ``from_pretrained`` leaves tensors where they lie in the file, and some CPUs add up small
    products in an order that depends on the alignment of their operands: the last bit changes.
    """

    def moved(model: nn.Module) -> nn.Module:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model

    return moved


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files that lies beside the repository; skips where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the repository")
    return folder
