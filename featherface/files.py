"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; it becomes ``path`` when the block succeeds.

    Missing parent folders are created. When the block raises, the temporary file is removed and an older ``path``
    is left as it was. The temporary name keeps the suffix, because many writers choose their format by it.

    A symbolic link stays one: the file that it names is replaced. Devices and pipes (``/dev/null``, ``/dev/stdout``, a
    process substitution) cannot be replaced; they receive the content when the block succeeds.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file", str(path))
    if is_stream(path):
        with tempfile.TemporaryDirectory(prefix="featherface.") as folder:
            temporary = Path(folder, path.name)
            temporary.touch()
            yield temporary
            # Behind what is there: truncating /dev/stdout would empty the file that it was directed to.
            with open(temporary, "rb") as file, open(path, "ab") as stream:
                shutil.copyfileobj(file, stream)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may be as long as the file system allows; that of the temporary file must not become longer.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:32]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a file that replaces another keeps its mode, otherwise the umask decides.
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a device, a pipe or the like, which takes bytes and has no place of its own in a folder."""
    path = Path(path)
    opened = str(path.absolute()).startswith(("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/"))
    return path.exists() and (opened or not path.is_file())


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
