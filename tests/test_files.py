import hashlib
import os

import pytest

from featherface.errors import CheckpointError, DataError, FeatherFaceError, ImageError
from featherface.files import atomic_write, sha256


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


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_errors_share_a_base():
    assert all(issubclass(error, FeatherFaceError) for error in (CheckpointError, ImageError, DataError))
