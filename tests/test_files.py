import contextlib
import hashlib
import os

import pytest

from featherface.errors import CheckpointError, DataError, FeatherFaceError, ImageError
from featherface.files import atomic_write, is_stream, sha256


def test_atomic_write_creates_and_replaces(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file.txt"]


def test_atomic_write_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_write_keeps_modes(tmp_path):
    path = tmp_path / "file.txt"
    mask = os.umask(0o022)
    try:
        with atomic_write(path):
            pass
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o600)
        with atomic_write(path):
            pass
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(mask)


def test_atomic_write_refuses_a_directory(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory"), atomic_write(tmp_path):
        pass


def test_atomic_write_follows_links(tmp_path):
    target, link = tmp_path / "there" / "file.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(target.parent) == ["file.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_atomic_write_writes_to_pipes_and_leaves_them(tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    for text in ("whole", None):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with contextlib.suppress(RuntimeError), atomic_write(pipe) as temporary:
                assert temporary.suffix == ".txt"
                temporary.write_text(text or "half")
                if text is None:
                    raise RuntimeError
            assert os.read(reader, 100).decode() == (text or "")
        finally:
            os.close(reader)
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe.txt"]


def test_devices_and_open_files_are_streams(tmp_path):
    (tmp_path / "file").touch()
    for path, expected in ((os.devnull, True), (tmp_path / "file", False), (tmp_path / "absent", False)):
        assert is_stream(path) == expected
    if os.path.exists("/proc/self/fd"):
        with open(tmp_path / "file") as file:
            assert is_stream(f"/proc/self/fd/{file.fileno()}")


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_errors_share_a_base():
    assert all(issubclass(error, FeatherFaceError) for error in (CheckpointError, ImageError, DataError))
