"""What README.md and docs/ show is run, and prints what they say."""

import re
import subprocess
import sys

import pytest

from loramux_server import REPOSITORY, clean_environment
from readme import blocks, json_matches, output_matches

DOCUMENTS = [path for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))] if path.is_file()]
SHOWN = [(path.name, block) for path in DOCUMENTS for block in blocks(path.read_text())]


@pytest.mark.parametrize("document, block", SHOWN, ids=[f"{document}-{block.name}" for document, block in SHOWN])
def test_what_is_shown_is_what_happens(demo, document, block, tmp_path):
    code = re.sub(r"(localhost|127\.0\.0\.1):8000", demo.address, block.code)
    script = tmp_path / f"block.{block.language}"
    script.write_text(code if block.language == "python" else f"set -euo pipefail\n{code}")
    program = sys.executable if block.language == "python" else "bash"
    ended = subprocess.run([program, str(script)], capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
                           env={**clean_environment(), "NO_PROXY": "*", "OPENAI_API_KEY": "EMPTY"}, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0, f"{document}, {block.name}: {ended.stderr}\n{ended.stdout}"
    if block.output is not None:
        assert output_matches(block.output, ended.stdout), (
            f"{document}, {block.name}: shown\n{block.output}\nprinted\n{ended.stdout}")


def test_the_readme_shows_something():
    readme = REPOSITORY / "README.md"
    assert not readme.exists() or any(document == "README.md" for document, _ in SHOWN), "README.md has no `<!-- test: .. -->` block"


SAMPLE = """
Text.

<!-- test: hello -->
```sh
echo '{"id": "x1", "a": [1, 2], "more": true}'
```
It prints:

<!-- output: hello -->
```json
{"id": "cmpl-..", "a": [1, 2]}
```

```sh
not run
```

<!-- test: say.py -->

```python
print("one")
```
"""


def test_blocks_are_found_with_their_outputs():
    hello, say = blocks(SAMPLE)
    assert (hello.name, hello.language, hello.output) == ("hello", "sh", '{"id": "cmpl-..", "a": [1, 2]}\n')
    assert (say.name, say.language, say.code, say.output) == ("say.py", "python", 'print("one")\n', None)
    assert blocks("no marks\n```sh\nls\n```\n") == []


@pytest.mark.parametrize("wrong", ["<!-- test: a -->\nno block", "<!-- output: a -->\n```\nx\n```\n",
                                   "<!-- test: a -->\n```sh\n```\n<!-- test: a -->\n```sh\n```\n", "<!-- test: a -->\n```ruby\n```\n",
                                   "<!-- test: a -->\nText between.\n```sh\nx\n```\n"])
def test_a_mark_that_marks_nothing_is_an_error(wrong):
    with pytest.raises(ValueError):
        blocks(wrong)


@pytest.mark.parametrize("expected, actual, same", [
    ("a\nb", "a\nb\n", True), ("a\nb", "a\nc", False), ("a\n...\nd", "a\nb\nc\nd", True), ("a\n...\nd", "a\nd", True),
    ("a\n...", "a", True), ("x ... z", "x y z", True), ("x ... z", "x y w", False), ("...", "", True), ("a", "a\nb", False),
    ('{"a": 1}', '{"a": 1, "b": 2}', True), ('{"a": 1}', '{"a": 2}', False), ('{"id": "x", "a": 1}', '{"id": "y", "a": 1}', True),
    ('{"id": "x"}', '{"b": 1}', False), ('{"a": [1]}', '{"a": [1, 2]}', False), ('{"a": "hel..."}', '{"a": "hello"}', True),
    ('{"a": true}', '{"a": 1}', False), ('{"a": -0.5}', '{"a": -0.5004}', True), ('{"a": -0.5}', '{"a": -0.6}', False),
    ('data: {"id": "1", "t": "x"}\n\n...\ndata: [DONE]', 'data: {"id": "2", "t": "x", "u": 1}\n\ndata: {}\n\ndata: [DONE]\n', True),
    ('data: {"t": "x"}', 'data: {"t": "y"}', False)])
def test_outputs_are_compared_by_the_rule(expected, actual, same):
    assert output_matches(expected, actual) is same


def test_json_matches_compares_by_type():
    assert json_matches({"a": {"b": None}}, {"a": {"b": None, "c": 1}})
    assert not json_matches({"a": None}, {"a": 0})
    assert not json_matches([], {})
