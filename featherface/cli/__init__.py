"""The command line: ``featherface`` and ``python -m featherface``. One file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: all went well. 1: some of the inputs failed, or a fault of the program. 2: wrong use or unusable input, explained
    in one sentence on stderr. 130: interrupted. ``--debug``, anywhere, shows the traceback instead.
    """
    from .app import run

    return run(sys.argv[1:] if arguments is None else list(arguments))
