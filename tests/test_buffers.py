"""The kept buffers of large tensors (csrc/buffers.h)."""

import threading

import pytest
import torch
from kernel_checks import needs_cpu_kernels

from ffkernels.cpu import release_buffers
from ffkernels.cpu.conv import LARGE, empty_nhwc, workspace
from ffkernels.native import module

pytestmark = needs_cpu_kernels

LIKE = torch.empty(0)
SHAPE = (2, 16, 64, 64)


@pytest.fixture(autouse=True)
def native():
    native, _ = module()
    release_buffers()
    yield native
    release_buffers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, (1, LARGE, 1, 1), (3, 7, 211, 9), (1, 1, 1, 4 * LARGE), (0, 8, 512, 512)])
def test_tensor(shape, dtype):
    x = empty_nhwc(shape, LIKE.to(dtype))
    assert x.shape == shape and x.dtype == dtype
    assert x.stride() == torch.empty(shape, memory_format=torch.channels_last).stride()
    assert torch.equal(x.fill_(3), torch.full(shape, 3.0, dtype=dtype))


def test_memory_is_used_again(native):
    x = empty_nhwc(SHAPE, LIKE)
    place, (used, _) = x.data_ptr(), native.buffer_bytes()
    assert used >= x.nbytes
    other = empty_nhwc(SHAPE, LIKE)
    assert abs(other.data_ptr() - place) >= x.nbytes
    view = x[:, 3:5].detach()
    del x
    assert empty_nhwc(SHAPE, LIKE).data_ptr() != place, "a view still holds the buffer"
    del view
    assert empty_nhwc(SHAPE, LIKE).data_ptr() == place
    assert native.buffer_bytes()[0] == used


def test_what_is_kept_is_bounded(native):
    used, _ = native.buffer_bytes()
    for size in (256, 300, 500, 700, 900, 333, 1000):
        tensor = empty_nhwc((1, 16, size, size), LIKE)
        largest = native.buffer_bytes()[0] - used
        del tensor
    assert native.buffer_bytes()[0] == used and 0 < native.buffer_bytes()[1] <= 1.5 * (used + largest)
    release_buffers()
    assert native.buffer_bytes() == (used, 0)


def test_workspace():
    def work():
        memory.append(workspace(100))

    memory = [workspace(8 * LARGE + 1)]
    assert memory[0].nbytes > 8 * LARGE and workspace(100) is memory[0]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert memory[1] is not memory[0]


def test_a_capsule_nobody_took(native):
    used = native.buffer_bytes()[0]
    native.buffer_nhwc(*SHAPE, 4)
    assert native.buffer_bytes()[0] == used


def test_threads(native):
    def work(number):
        for i in range(200):
            tensors = [empty_nhwc((1, 8, 64 + 8 * k, 128), LIKE).fill_(number + k) for k in range(4)]
            failed.extend(i for k, tensor in enumerate(tensors) if not torch.all(tensor == number + k))

    failed: list[int] = []
    used = native.buffer_bytes()[0]
    threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and native.buffer_bytes()[0] == used


def test_what_there_is_not_does_not_count(native):
    """A call that finds no memory leaves the limit of what is kept where it was."""
    with pytest.raises(MemoryError):
        native.buffer_nhwc(1 << 45, 1, 1, 1, 4)
    largest = 0
    for n in range(1, 40):
        x = empty_nhwc((n, 16, 64, 64), LIKE)
        largest = max(largest, x.nbytes)
        del x
    used, kept = native.buffer_bytes()
    assert used == 0 and kept <= 2 * largest
