"""Where the cells of a sweep are computed: processes of this machine, or the workers of a Ray cluster."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from intrafusion import FusionError
from intrafusion.lab.bench import Bench
from intrafusion.lab.errors import LabError
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.results import Cell, Result
from intrafusion.training.workers import start_worker

ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True)
class Task:
    """One cell of one recipe, or the training of its dense network.

    Attributes:
        folder: where the dense network is kept if the recipe trains it; every worker must see this folder.
        cell: ``None`` to train that network and nothing else.
        timed: whether to measure the latency, which is of no use while other workers compute.
    """

    recipe: Recipe
    folder: Path
    cell: Cell | None
    timed: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a task has no result."""

    message: str


Outcome = Result | Failure | None


class Executor(Protocol):
    """Computes tasks in any order; ``alone`` if one at a time, so that a task's latency can be trusted."""

    @property
    def alone(self) -> bool: ...

    def compute(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """Every task's number with what came of it, as soon as it is there; one that fails stops no other."""
        ...


def make_executor(name: ExecutorName, recipes: Sequence[Recipe], workers: int | None = None) -> Executor:
    """An executor by name; without ``workers`` as many as there are GPUs, or processors for the recipes' threads.

    Raises:
        LabError: ``ray`` is not installed.
    """
    threads = max(threads_of(recipe) for recipe in recipes)
    gpus = gpus_of(recipes)
    if name == "ray":
        return Ray(threads, gpus=min(gpus, 1), workers=workers)
    return Local(workers or gpus or max(1, (os.cpu_count() or 1) // threads), gpus)


def gpus_of(recipes: Sequence[Recipe]) -> int:
    """How many GPUs there are for the recipes."""
    wanted = torch.cuda.is_available() and any(recipe.device != "cpu" for recipe in recipes)
    return torch.cuda.device_count() if wanted else 0


def threads_of(recipe: Recipe) -> int:
    """Threads that a cell of a sweep is computed with: its numbers must not depend on how many workers there are."""
    return recipe.threads or 1


def work(task: Task) -> Outcome:
    """Compute one task in this process, which keeps the images and networks for the next one."""
    torch.set_num_threads(threads_of(task.recipe))
    try:
        bench = Bench(task.recipe, task.folder, progress=False, shared=_shared)
        if task.cell is None:
            bench.prepare()
            return None
        return bench.measure(task.cell, timed=task.timed)
    except (LabError, FusionError, OSError) as error:
        return Failure(str(error))
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


_shared: dict[str, Any] = {}
"""Of a worker process: what its benches have in common."""


class Local:
    """Processes of this machine, each with its own copy of the images; with several GPUs, each on one of them.

    work: what they do with a task; a function of a module, so that other processes find it.
    """

    def __init__(self, workers: int, gpus: int = 0, work: Callable[[Any], Any] = work) -> None:
        self.workers, self.gpus, self.work = workers, gpus, work

    @property
    def alone(self) -> bool:
        """With a single worker."""
        return self.workers == 1

    def compute(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See :class:`Executor`.

        Raises:
            LabError: a worker was killed.
        """
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        started = context.Value("i", 0)
        workers = min(self.workers, len(tasks)) or 1
        pool = ProcessPoolExecutor(workers, context, _start_worker, (started, self.gpus, _messages_level()))
        try:
            futures = {pool.submit(self.work, task): number for number, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
            pool.shutdown()
        except BrokenProcessPool:
            raise LabError(
                "a worker process was killed, most likely for want of memory; every worker holds the images and the "
                "network: take fewer with --workers. What is finished is kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


def _start_worker(started: Any, gpus: int, level: int) -> None:
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    start_worker(level, number % gpus if gpus else None)


def _messages_level() -> int:
    return max(logging.WARNING, logging.getLogger("intrafusion").getEffectiveLevel())


class Ray:
    """The workers of a Ray cluster: the one of ``RAY_ADDRESS`` or of this machine, else one started for this sweep.

    The recipe's files, the output folder and this package must be there for every worker under the same names.
    """

    def __init__(self, threads: int, gpus: int = 0, workers: int | None = None) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise LabError("the executor 'ray' needs the package ray: pip install 'intrafusion[ray]'") from None
        self.threads, self.gpus, self.workers = threads, gpus, workers
        self.alone = False

    def compute(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        """See :class:`Executor`."""
        ray = self._ray
        ours = not ray.is_initialized()
        if ours:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        try:
            remote = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=3)(work)
            waiting, running = list(reversed(range(len(tasks)))), {}
            while waiting or running:
                while waiting and len(running) < (self.workers or len(tasks)):
                    number = waiting.pop()
                    running[remote.remote(tasks[number])] = number
                ready, _ = ray.wait(list(running), num_returns=1)
                for reference in ready:
                    yield running.pop(reference), self._outcome(reference)
        finally:
            if ours:
                ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Failure(f"Ray lost the task: {str(error).splitlines()[0]}")
