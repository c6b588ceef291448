"""A forward pass that can be stopped at a layer and resumed: the program is paused where it stands.

Each pass runs in a thread of its own, one at a time, and its frame holds what the rest of the pass will read and
nothing else. The thread only decides what is called; the calls themselves are run by whoever resumes it, so that there
is one pool of processor threads, one current device and one autocast state, whatever the number of passes. The states
of the random generators are a pass's own: it draws the numbers that it would draw if it ran alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from intrafusion.correct.parking import Live
from intrafusion.correct.tape import Layers, Tape, Visit
from intrafusion.running import RandomState


class _Closed(BaseException):
    """Unwinds a pass that nobody needs any more."""


class Pass:
    """One forward pass of a network, stopped wherever a visit of one of `layers` is over.

    forward: runs the network. The network must be in eval mode; gradients are off. live: is told of every tensor that
    the pass makes.

    >>> one = Pass(lambda: network(batch), layers)
    >>> while (visit := one.advance()) is not None: ...
    """

    def __init__(self, forward: Callable[[], Any], layers: Layers, live: Live | None = None) -> None:
        self._forward, self._live = forward, Live() if live is None else live
        self._tape = Tape(layers, self._execute, read=self._stop)
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._message: Any = None
        self._reply: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, daemon=True, name="intrafusion pass")
        self._started = self._closing = False
        self._random: RandomState | None = None
        self.output: Any = None

    def advance(self) -> Visit | None:
        """Go on to the next visit that is over, before its output is read; None at the end of the pass.

        Raises whatever the network raises.
        """
        if self._thread is None:
            return None
        with self._own_random_numbers():
            return self._advance(self._thread)

    def _advance(self, thread: threading.Thread) -> Visit | None:
        if not self._started:
            self._started = True
            thread.start()
        self._resumed.release()
        while True:
            self._paused.acquire()
            message, self._message = self._message, None
            if isinstance(message, Visit):
                return message
            if message is None:
                thread.join()
                self._thread = None
                if self._error is not None:
                    raise self._error
                return None
            self._reply = _answer(*message)
            self._live.add(self._reply[0])
            self._resumed.release()

    def close(self) -> None:
        """End the pass where it is. What it holds is free afterwards."""
        thread, self._thread = self._thread, None
        if thread is None or not self._started:
            return
        self._closing = True
        with self._own_random_numbers():
            self._resumed.release()
            while thread.is_alive():  # a network that catches everything may still ask for calls
                if self._paused.acquire(timeout=0.05):
                    self._resumed.release()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """The generators stand where this pass left them; afterwards they stand where they stood."""
        before = RandomState.now()
        if self._random is not None:
            self._random.restore()
        try:
            yield
        finally:
            self._random = RandomState.now()
            before.restore()

    def _run(self) -> None:
        try:
            self._resumed.acquire()
            if not self._closing:
                with torch.no_grad(), self._tape:
                    self.output = self._forward()
                self._tape.finish()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._message = None
            del self._forward, self._tape
            self._paused.release()

    def _ask(self, message: Any) -> Any:
        self._message = message
        self._paused.release()
        self._resumed.acquire()
        if self._closing:
            raise _Closed
        reply, self._reply = self._reply, None
        return reply

    def _stop(self, visit: Visit) -> None:
        self._ask(visit)

    def _execute(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        out, error = self._ask((func, args, kwargs, _state()))
        if error is not None:
            raise error
        return out


_CONTEXT = tuple[bool, bool, tuple[tuple[str, torch.dtype], ...]]


def _state() -> _CONTEXT:
    """What of the thread's own state the result of a call depends on."""
    cast = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(cast)


_PLAIN: _CONTEXT = (False, False, ())


def _answer(func: Callable, args: Sequence, kwargs: dict, state: _CONTEXT) -> tuple[Any, BaseException | None]:
    """(result, error) of a call that a pass asks for."""
    try:
        with torch.no_grad(), _as_in(state):
            return func(*args, **kwargs), None
    except BaseException as error:
        return None, error


@contextmanager
def _as_in(state: _CONTEXT) -> Iterator[None]:
    """The contexts that the network itself has entered around a call."""
    if state == _PLAIN:
        yield
        return
    gradients, inference, cast = state
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        if inference:
            stack.enter_context(torch.inference_mode())
        for kind, dtype in cast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield
