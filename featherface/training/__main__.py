"""``python -m featherface.training``, for torchrun: the same as ``featherface train``."""

from __future__ import annotations

import sys

from featherface.cli import main as command_line


def main() -> int:
    return command_line(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
