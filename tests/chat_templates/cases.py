"""What Jinja in Python makes of the templates here, in the environment that Hugging Face's `apply_chat_template` uses.

`python tests/chat_templates/cases.py` writes `expected.json`; `router/src/text/template_tests.rs` renders the same cases, and
`tests/python/test_chat_templates.py` checks that the file is what Python gives. Long texts are kept as the first 16 hex digits of
their SHA-256; `python tests/chat_templates/cases.py "llama_3 / one / 0"` prints one.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Current weather; à propos <b>units</b>",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": " The city "},
        "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": ["number", "null"]}}, "required": ["lat"]}},
        "required": ["city"]}}}
PLAIN = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø", "days": [1, 2.5], "x": None, "y": True}}}
SECOND = {"id": "abc123XY2", "type": "function", "function": {"name": "now", "arguments": {}}}
USER = {"role": "user", "content": "  What is 2 < 3 && \"é\"?\n"}
SYSTEM = {"role": "system", "content": "Be brief. /no_think"}
ANSWER = {"role": "assistant", "content": " Yes.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm, 2 < 3\n</think>\n\nYes."}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abc123XYZ", "content": "{\"t\": -3}"}

CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "Why?"}],
    "ends with an answer": [USER, ANSWER],
    "thought": [USER, THOUGHT, {"role": "user", "content": "Sure?"}],
    "reasoning": [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "\nhm\n"}],
    "two users": [USER, USER],
    "developer": [{"role": "developer", "content": "Short."}, USER],
    "called": [SYSTEM, USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
    "called twice": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, SECOND]}, RESULT, {**RESULT, "tool_call_id": "abc123XY2"}, ANSWER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}],
}
VARIABLES = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "tools": [TOOL, PLAIN], "enable_thinking": False, "date_string": "1 Jan 2025"},
    {"add_generation_prompt": True, "tools": [TOOL], "tools_in_user_message": False, "reasoning_effort": "high"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, and prints it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller):
        return caller()


class Raised(Exception):
    """`raise_exception`."""


def environment() -> jinja2.Environment:
    def raise_exception(message):
        raise Raised(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made


def render(source: str, chat: list, variables: dict) -> dict:
    source = re.sub(r"strftime_now(\(.*?\))", r"\1", source)  # the format in the place of the date
    if "developer" not in source:  # loramux calls the role by its older name then
        chat = [{**message, "role": "system"} if message["role"] == "developer" else message for message in chat]
    try:
        return {"text": environment().from_string(source).render(messages=chat, **{"tools": None, "documents": None, **TOKENS, **variables})}
    except Raised as refused:
        return {"raised": str(refused)}
    except Exception:
        return {"failed": True}


def rendered() -> dict[str, dict]:
    found = {}
    for path in sorted(HERE.glob("*.jinja")):
        source = path.read_text()
        for name, chat in CHATS.items():
            for i, variables in enumerate(VARIABLES):
                found[f"{path.stem} / {name} / {i}"] = render(source, chat, variables)
    return found


def short(result: dict) -> str:
    """`failed`, `raised: ..`, or the digest of a text."""
    if "text" in result:
        return hashlib.sha256(result["text"].encode()).hexdigest()[:16]
    return f"raised: {result['raised']}" if "raised" in result else "failed"


def expected() -> dict:
    found = {name: short(result) for name, result in rendered().items()}
    return {"tokens": TOKENS, "chats": CHATS, "variables": VARIABLES, "expected": found}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(rendered()[sys.argv[1]], ensure_ascii=False))
    else:
        (HERE / "expected.json").write_text(json.dumps(expected(), ensure_ascii=False, indent=1) + "\n")
