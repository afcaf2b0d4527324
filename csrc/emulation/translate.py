"""Turns CUDA source into C++ that g++ compiles against the headers beside this file.

Two constructs of CUDA are not C++; everything else is left to the headers. Line numbers stay what they were.

    kernel<T><<<grid, block, bytes, stream>>>(x, y);
    __shared__ float tile[8][33];
    extern __shared__ uint4 memory[];

become

    ::emulation::Launch("kernel<T>", grid, block, bytes, stream)(kernel<T>, x, y);
    auto &tile = ::emulation::shared<float[8][33]>("tile", [] {});
    auto *memory = static_cast<uint4 *>(::emulation::dynamic_shared_memory());
"""

from __future__ import annotations

import re

_SKIP = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_KERNEL_NAME = re.compile(r"[A-Za-z_][\w:]*$")
_SHARED = re.compile(r"(extern\s+)?__shared__\s+((?:alignas|__align__)\s*\([^)]*\)\s*)?([^;=]+);")
_DECLARATOR = re.compile(r"(?P<type>.+?)\s*\b(?P<name>[A-Za-z_]\w*)\s*(?P<dimensions>(?:\[.*\])?)\s*$", re.DOTALL)


class TranslationError(ValueError):
    """Source that the translation does not cover."""


def translate(source: str, name: str) -> str:
    """C++ of the CUDA ``source``; ``name`` is what compiler messages call the file."""
    blank = _SKIP.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    edits = [*_launches(source, blank, name), *_shared(source, blank, name)]
    for start, end, text in sorted(edits, reverse=True):
        lines = source.count("\n", start, end) - text.count("\n")
        source = source[:start] + text + "\n" * lines + source[end:]
    return f'#line 1 "{name}"\n{source}'


def _fail(source: str, at: int, name: str, what: str) -> TranslationError:
    return TranslationError(f"{name}:{source.count(chr(10), 0, at) + 1}: {what}")


def _launches(source: str, blank: str, name: str) -> list[tuple[int, int, str]]:
    edits = []
    for match in re.finditer("<<<", blank):
        close = blank.find(">>>", match.end())
        call = re.compile(r"\s*\(").match(blank, close + 3) if close >= 0 else None
        if call is None:
            raise _fail(source, match.start(), name, "a kernel launch needs '>>>' and arguments")
        begin = _kernel_start(blank, match.start())
        if begin is None:
            raise _fail(source, match.start(), name, "no kernel's name before '<<<'")
        kernel = " ".join(source[begin : match.start()].split())
        configuration = source[match.end() : close]
        comma = "" if blank[call.end() :].lstrip().startswith(")") else ", "
        edits.append((begin, call.end(), f'::emulation::Launch("{kernel}", {configuration})({kernel}{comma}'))
    return edits


def _kernel_start(blank: str, end: int) -> int | None:
    """Where the name, with its template arguments, that ends before ``end`` begins."""
    at = len(blank[:end].rstrip())
    if blank[at - 1] == ">":
        depth = 0
        while at > 0:
            at -= 1
            depth += {">": 1, "<": -1}.get(blank[at], 0)
            if depth == 0:
                break
        at = len(blank[:at].rstrip())
    match = _KERNEL_NAME.search(blank, 0, at)
    return match.start() if match else None


def _shared(source: str, blank: str, name: str) -> list[tuple[int, int, str]]:
    edits = []
    for match in _SHARED.finditer(blank):
        declaration = _DECLARATOR.fullmatch(match[3].strip())
        if declaration is None or "," in re.sub(r"<.*?>|\[.*?\]|\(.*?\)", "", match[3]):
            raise _fail(source, match.start(), name, "declare one __shared__ variable at a time, without initialiser")
        kind, variable, dimensions = declaration["type"], declaration["name"], declaration["dimensions"]
        if match[1]:
            text = f"auto *{variable} = static_cast<{kind} *>(::emulation::dynamic_shared_memory());"
        else:
            text = f'auto &{variable} = ::emulation::shared<{kind}{dimensions}>("{variable}", [] {{}});'
        edits.append((match.start(), match.end(), text))
    if len(edits) != len(re.findall(r"\b__shared__\b", blank)):
        raise _fail(
            source, blank.index("__shared__"), name, "a __shared__ declaration that the translation cannot read"
        )
    return edits
