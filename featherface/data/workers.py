"""Work ahead of the training loop, by threads or by processes; results come in the order of the calls."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherface.errors import DataError

AHEAD = 2
"""Calls that are under way or done for each worker."""
PATIENCE = 5.0
"""Seconds after which an idle process looks whether its parent is still there."""


def in_threads(run: Callable[..., Any], calls: Sequence[tuple], workers: int) -> Iterator[Any]:
    """``run(*call)`` for each call."""
    with ThreadPoolExecutor(workers, "featherface-loader") as pool:
        pending: deque[Future] = deque()
        try:
            for call in calls:
                pending.append(pool.submit(run, *call))
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Processes:
    """Forked processes that run a function which needs neither a GPU nor PyTorch's threads.

    They ignore SIGINT and SIGTERM, which end the loop that they work for in its own time, and end with their parent.

    Args:
        run: the function; its arguments and results are pickled.
        workers: how many processes.
    """

    def __init__(self, run: Callable[..., Any], workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(run, there, os.getpid()), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        self._unread: deque[Connection] = deque()
        self._end = weakref.finalize(self, _stop, self._processes, self._connections)

    def close(self) -> None:
        self._end()

    def map(self, calls: Sequence[tuple]) -> Iterator[Any]:
        """``run(*call)`` for each call.

        Raises:
            DataError: a process has died.
        """
        while self._unread:  # of an iteration that was left early
            self._receive()
        connections = itertools.cycle(self._connections)
        for call in calls:
            connection = next(connections)
            try:
                connection.send(call)
            except OSError as error:
                raise DataError(_DIED) from error
            self._unread.append(connection)
            if len(self._unread) > AHEAD * len(self._connections):
                yield self._result()
        while self._unread:
            yield self._result()

    def _result(self) -> Any:
        result, failure = self._receive()
        if failure:
            raise DataError(f"a process of the loader failed:\n{failure}")
        return _unpack(result)

    def _receive(self) -> tuple[Any, str]:
        try:
            return self._unread.popleft().recv()
        except (EOFError, OSError) as error:
            raise DataError(_DIED) from error


_DIED = "a process of the loader has died; look for messages of the system (out of memory?) or set batches.workers to 0"


def _stop(processes: list, connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # it ignores SIGTERM
        process.join()


def _serve(run: Callable[..., Any], connection: Connection, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        while not connection.poll(PATIENCE):
            if os.getppid() != parent:
                return
        try:
            call = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _pack(run(*call)), ""
        except Exception:
            answer = None, traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            return


class _Array:
    """A tensor under way as an array: a tensor would travel as a file."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Array(value.numpy())
    if isinstance(value, tuple):
        return _rebuilt(value, map(_pack, value))
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, _Array):
        return torch.from_numpy(value.array)
    if isinstance(value, tuple):
        return _rebuilt(value, map(_unpack, value))
    return value


def _rebuilt(value: tuple, items: Iterator[Any]) -> tuple:
    return value._make(items) if hasattr(value, "_make") else tuple(items)
