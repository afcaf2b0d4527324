"""Threads and processes that work ahead of the training loop."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from test_data_loader import SMALL, folder  # noqa: F401

from featherface.data import Loader, Source, load_data
from featherface.data.workers import Processes, in_threads
from featherface.errors import DataError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, with a GPU, on Linux")


def numbered(number, pause=0.0):
    time.sleep(pause)
    if number < 0:
        raise ValueError(f"no {number}")
    return number, os.getpid(), torch.full((2,), number), np.arange(number)


@pytest.fixture
def processes():
    pool = Processes(numbered, 3)
    yield pool
    pool.close()


def test_results_come_in_the_order_of_the_calls(processes):
    calls = [(number, 0.02 * (number % 3 == 0)) for number in range(20)]
    results = list(processes.map(calls))
    assert [r[0] for r in results] == [r[0] for r in in_threads(numbered, calls, 3)] == list(range(20))
    assert all(torch.equal(r[2], torch.full((2,), r[0])) and len(r[3]) == r[0] for r in results)
    assert len({r[1] for r in results} - {os.getpid()}) == 3


def test_an_iteration_that_is_left_leaves_nothing_behind(processes):
    first = processes.map([(number,) for number in range(20)])
    assert [next(first)[0] for _ in range(3)] == [0, 1, 2]
    first.close()
    assert [r[0] for r in processes.map([(number,) for number in range(5, 8)])] == [5, 6, 7]


def test_failures_come_back_with_their_place(processes):
    with pytest.raises(DataError, match=r"in numbered\n(.|\n)*ValueError: no -1"):
        list(processes.map([(1,), (-1,), (2,)]))
    assert [r[0] for r in processes.map([(4,)])] == [4]


def test_a_dead_process_is_an_error_and_signals_are_not_for_it(processes):
    _, pid, *_ = next(processes.map([(0,)]))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert [r[1] for r in processes.map([(0,)])] == [pid]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match="has died"):
        list(processes.map([(number, 0.1) for number in range(12)]))


def test_processes_end_with_their_pool():
    pool = Processes(numbered, 1)
    _, pid, *_ = next(pool.map([(0,)]))
    del pool
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_processes_draw_what_the_loader_does(folder):  # noqa: F811
    loader = Loader(load_data([Source("set")], folder.parent), SMALL, 4, seed=1)
    calls = [(loader.data.train[:4], 64, epoch) for epoch in range(3)]
    pool = Processes(loader.draw, 2)
    try:
        for mine, theirs in zip(pool.map(calls), [loader.draw(*call) for call in calls]):
            assert torch.equal(mine.table, theirs.table) and (mine.indices == theirs.indices).all()
            assert all(map(torch.equal, mine.targets, theirs.targets))
            assert all(map(torch.equal, mine.look[:3], theirs.look[:3])) and mine.look[3:] == theirs.look[3:]
    finally:
        pool.close()
