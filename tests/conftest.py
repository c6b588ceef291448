import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real CIFAR-10 and the trained checkpoints; skips where it is not."""
    root = os.environ.get("INTRAFUSION_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("INTRAFUSION_DATA does not name a folder with cifar10-jpeg.tar.gz and checkpoints/")
    return Path(root)
