"""Runs what a document shows: fenced blocks marked by an HTML comment, and what they print.

    <!-- test: NAME -->        directly above a fenced sh, bash or python block: it is run
    <!-- output: NAME -->      directly above a fenced block: what `NAME` prints

In an output, a line `...` stands for any lines and `...` within a line for any text. JSON (a whole output, or what follows `data: `) is
compared as a subset: members that it does not show are free, and so are the values of `id`, `created` and `system_fingerprint`.
"""

import json
import re
from dataclasses import dataclass

_BLOCK = re.compile(r"<!-- (test|output): ([\w.-]+) -->[ \t]*\n\s*?\n?```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.M | re.S)
_MARK = re.compile(r"<!-- (test|output): .*?-->")
_FREE_MEMBERS = {"id", "created", "system_fingerprint"}


@dataclass(frozen=True)
class Block:
    name: str
    language: str
    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """The runnable blocks of a document, with their outputs. A mark that marks nothing, or twice, is an error."""
    found = _BLOCK.findall(text)
    if len(found) != len(_MARK.findall(text)):
        raise ValueError("a `<!-- test: .. -->` or `<!-- output: .. -->` has no fenced block directly below it")
    outputs = {name: body for kind, name, _, body in found if kind == "output"}
    tests = [(name, language, body) for kind, name, language, body in found if kind == "test"]
    names = [name for name, _, _ in tests]
    if len(set(names)) != len(names) or len(outputs) != sum(kind == "output" for kind, *_ in found):
        raise ValueError("a name is used twice")
    if set(outputs) - set(names):
        raise ValueError(f"outputs of no test: {sorted(set(outputs) - set(names))}")
    for name, language, _ in tests:
        if language not in ("sh", "bash", "python"):
            raise ValueError(f"`{name}` is `{language}`, which cannot be run; sh, bash or python can")
    return [Block(name, language, body, outputs.get(name)) for name, language, body in tests]


def _text_matches(expected: str, actual: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, expected.split("..."))), actual) is not None


def json_matches(expected, actual) -> bool:
    """Whether `actual` has everything that `expected` shows."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            key in actual and (key in _FREE_MEMBERS or json_matches(value, actual[key])) for key, value in expected.items())
    if isinstance(expected, list):
        return isinstance(actual, list) and len(expected) == len(actual) and all(map(json_matches, expected, actual))
    if isinstance(expected, str) and isinstance(actual, str):
        return re.fullmatch(".*".join(map(re.escape, expected.split("..."))), actual, re.S) is not None
    if isinstance(expected, float) and isinstance(actual, (int, float)):
        return abs(expected - actual) <= 1e-3
    return type(expected) is type(actual) and expected == actual


def _parsed(text: str):
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, (dict, list)) else None


def _line_matches(expected: str, actual: str) -> bool:
    for prefix in ("data: ", ""):
        if expected.startswith(prefix) and actual.startswith(prefix):
            left, right = _parsed(expected.removeprefix(prefix)), _parsed(actual.removeprefix(prefix))
            if left is not None and right is not None:
                return json_matches(left, right)
    return _text_matches(expected, actual)


def _lines_match(expected: list[str], actual: list[str]) -> bool:
    if not expected:
        return not actual
    if expected[0].strip() == "...":
        return any(_lines_match(expected[1:], actual[skipped:]) for skipped in range(len(actual) + 1))
    return bool(actual) and _line_matches(expected[0], actual[0]) and _lines_match(expected[1:], actual[1:])


def output_matches(expected: str, actual: str) -> bool:
    left, right = _parsed(expected), _parsed(actual)
    if left is not None and right is not None:
        return json_matches(left, right)
    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.strip().splitlines()]
    return _lines_match(lines(expected), lines(actual))
