"""README agrees with the program."""

import re
import subprocess
import sys
from pathlib import Path

from ffkernels.info import support_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_table_of_ops_is_the_registry():
    table = README.split("<!-- ops -->")[1].split("<!-- /ops -->")[0].strip()
    assert table == support_table(), "paste the output of: python -m ffkernels.info --ops"


def test_linked_files_exist():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    links += re.findall(r"`((?:docs|benchmarks)/[^` ]*|[A-Z]+\.md)`", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []


def test_commands_exist():
    used = set(re.findall(r"featherface (\w+)", README)) - {"import"}
    result = subprocess.run([sys.executable, "-m", "featherface", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [name for name in used if not re.search(rf"\b{name}\b", result.stdout)] == []
