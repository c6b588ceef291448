"""One plain process for each of several jobs, at most so many at a time; none outlives the process that started it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_PATIENCE = 5.0


class WorkerError(RuntimeError):
    """A job was not done.

    Attributes:
        number: of the job, from 0.
        reason: what happened, without the number.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"job {number}: {reason}")
        self.number, self.reason = number, reason


@dataclass(frozen=True)
class _Running:
    number: int
    place: int
    process: Any
    answers: Connection


def in_processes(
    work: Callable[[Any], Any], jobs: Sequence[Any], *, workers: int, gpus: int = 0
) -> Generator[tuple[int, Any], None, None]:
    """``(number of a job, work(job))`` as soon as each is there; jobs are begun in their order.

    Closing the generator ends the jobs that are not done.

    Args:
        work: a function of a module, so that other processes find it; jobs and what it returns can be pickled.
        workers: how many processes there are at a time. Each does one job.
        gpus: how many GPUs they share; each process has one of them as its current device.

    Raises:
        WorkerError: a job raised, or its process was killed. The others are ended.
        ValueError: a job cannot be sent to another process.
    """
    level = max(logging.WARNING, logging.getLogger("intrafusion").getEffectiveLevel())
    contents = [_pickled(work, job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    waiting, free = deque(enumerate(contents)), deque(range(workers))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and free:
                (number, content), place = waiting.popleft(), free.popleft()
                answers, theirs = context.Pipe(duplex=False)
                gpu = place % gpus if gpus else None
                process = context.Process(target=_answer, args=(theirs, content, gpu, level))
                process.start()
                theirs.close()
                running.append(_Running(number, place, process, answers))
            wait([found for one in running for found in (one.answers, one.process.sentinel)])
            for one in [one for one in running if one.answers.poll() or not one.process.is_alive()]:
                value = _value(one)
                one.process.join()
                running.remove(one)
                free.append(one.place)
                yield one.number, value
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.join(_PATIENCE)
            if one.process.is_alive():
                one.process.kill()
                one.process.join()


def start_worker(level: int, gpu: int | None = None) -> None:
    """What a process that was started to work does first; from then on it ends with the one that started it."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    logging.getLogger("intrafusion").setLevel(level)
    warnings.simplefilter("ignore")  # what was only cut is in the report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A killed parent cannot end its workers."""
    parent.join()
    os._exit(1)


def _pickled(work: Callable[[Any], Any], job: Any) -> bytes:
    # Plain pickle copies tensors; that of multiprocessing would share them, and training would change the caller's.
    try:
        return pickle.dumps((work, job))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"this cannot be sent to another process ({error}): define functions and classes at the top of a module"
        ) from None


def _answer(answers: Connection, content: bytes, gpu: int | None, level: int) -> None:
    start_worker(level, gpu)
    try:
        work, job = pickle.loads(content)
        answers.send((True, work(job)))
    except Exception as error:
        answers.send((False, f"{type(error).__name__}: {error}"))


def _value(one: _Running) -> Any:
    try:
        # Where processes of its own outlive it, they hold the pipe open: there is nothing to read, and no end.
        done, value = one.answers.recv() if one.answers.poll() else (False, "")
    except EOFError:
        done, value = False, ""
    if not done and not value:
        one.process.join()
        code = one.process.exitcode
        if code < 0:
            hint = ", most likely for want of memory" if -code == signal.SIGKILL else ""
            raise WorkerError(
                one.number, f"its process was killed ({signal.Signals(-code).name}){hint}. What is finished is kept"
            )
        raise WorkerError(
            one.number,
            f"its process ended with exit code {code} before it was done. If this is a script, begin what it does "
            "with: if __name__ == '__main__'",
        )
    if not done:
        raise WorkerError(one.number, value)
    return value
