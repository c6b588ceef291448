"""One thread in every process, and as many processes as there are processors; no number depends on either."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For numpy, scikit-learn and the processes that tests start, all of which read it when they start.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("untimed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What ``-n auto`` is: no workers where only files or single tests are named, so that they start at once."""
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    if all(path.is_file() for path in named):
        return 0
    processors = os.cpu_count() or 1
    return min(processors, 8) if processors > 1 else 0


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing is slow, training leaves checkpoints out: no test may depend on how busy the disk is."""
    monkeypatch.setattr("intrafusion.training.state._SLOW", math.inf)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real CIFAR-10 and the trained checkpoints; skips where it is not."""
    root = os.environ.get("INTRAFUSION_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("INTRAFUSION_DATA does not name a folder with cifar10-jpeg.tar.gz and checkpoints/")
    return Path(root)


@pytest.fixture(scope="session")
def cifar10_archive(shared_data: Path) -> Path:
    """The images among what else that folder may hold."""
    return shared_data / "cifar10-jpeg.tar.gz"


def shorten_timings(patch: pytest.MonkeyPatch) -> None:
    """Latencies are measured as ever, but on a few passes."""
    from intrafusion.lab import measure

    def short_timer(given: Callable[[], Any] = measure._timer_class) -> Any:
        timer = given()
        return type("ShortTimer", (timer,), {"_estimate_block_size": lambda self, min_run_time: 1})

    patch.setattr(measure, "_LONGEST_TIMING", 0.02)
    patch.setattr(measure, "_timer_class", short_timer)


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_timings(monkeypatch)


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CIFAR-10 is unpacked, once: the user's cache if one is set, else a folder of all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    processes = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Path(os.environ.get("INTRAFUSION_CACHE") or processes / "image-cache")
