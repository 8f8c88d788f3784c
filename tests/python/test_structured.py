"""Replies held to a rule: every spelling, every kind of schema, beside requests without one; and rules that mean harm."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest

from loramux_server import Server, children
from structured_corpus import HOSTILE, SCHEMAS
from wire import chat, check_error, complete, post, post_stream

PROMPT = "Write it down.\n"
SEEDS = [1, 2, 3]
# A machine that is busy with other tests is slower than the second that a rule may take.
HOSTILE_S = 6.0
# What all hostile rules together may add to the server's memory, with the rules it keeps.
HOSTILE_MIB = 300
ANSWER = {"type": "object", "properties": {"answer": {"enum": ["yes", "no", "maybe"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["answer", "n"], "additionalProperties": False}
ANSWER_RE = re.compile(r'\{"answer": "(yes|no|maybe)", "n": \d\d?\}')


def validator(schema):
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def complete_all(http, requests: list[dict]) -> list[dict]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda body: complete(http, **body), requests))


def check_valid(names: list[str], replies: list[dict], stopped_share: float):
    """What ended by itself is valid; enough did."""
    stopped = 0
    for name, reply in zip(names, replies, strict=True):
        choice = reply["choices"][0]
        if choice["finish_reason"] == "stop":
            stopped += 1
            errors = list(validator(SCHEMAS[name]).iter_errors(json.loads(choice["text"])))
            assert not errors, (name, choice["text"], errors[0].message)
    print(f"{stopped} of {len(names)} ended by themselves")
    assert stopped >= stopped_share * len(names), stopped


@pytest.mark.timeout(900)
def test_all_kinds_of_schemas_give_valid_json(demo):
    names = [name for name in SCHEMAS for _ in SEEDS]
    bodies = [{"prompt": PROMPT, "temperature": 1, "seed": seed, "max_tokens": 400, "structured_outputs": {"json": SCHEMAS[name]}}
              for name in SCHEMAS for seed in SEEDS]
    check_valid(names, complete_all(demo.http, bodies), 0.9)


REAL_MODEL = os.environ.get("LORAMUX_REAL_MODEL_DIR")


@pytest.mark.skipif(not REAL_MODEL, reason="not set: LORAMUX_REAL_MODEL_DIR")
@pytest.mark.timeout(1800)
def test_a_real_model_gives_valid_json_too(data_dir):
    names = list(SCHEMAS)[::5]
    adapters = os.environ.get("LORAMUX_REAL_ADAPTERS_DIR")
    flags = ["--adapter", f"json={Path(adapters) / 'json'}"] if adapters else []
    with Server("--model-id", REAL_MODEL, "--served-model-name", "base", *flags, data_dir=data_dir) as server:
        bodies = [{"model": "json" if adapters and i % 2 else "base", "prompt": PROMPT, "temperature": 1, "seed": i, "max_tokens": 160,
                   "structured_outputs": {"json": SCHEMAS[name]}} for i, name in enumerate(names)]
        check_valid(names, complete_all(server.http, bodies), 0.7)


SPELLINGS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER, "strict": True}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "description": "b", "schema": ANSWER, "strict": False}}},
    {"response_format": {"type": "json_object", "schema": ANSWER}},
    {"structured_outputs": {"json": ANSWER}, "response_format": {"type": "text"}},
    {"structured_outputs": {"json": json.dumps(ANSWER), "regex": None, "disable_any_whitespace": True}},
    {"guided_json": ANSWER},
    {"guided_json": json.dumps(ANSWER)},
    {"structured_outputs": {"grammar": "start: %json " + json.dumps(ANSWER)}},
]


@pytest.mark.parametrize("model", ["demo", "pirate"])
def test_every_spelling_means_the_same(demo, model):
    settings = {"model": model, "temperature": 1, "seed": 5, "max_tokens": 60}
    texts = {complete(demo.http, prompt=PROMPT, **settings, **spelling)["choices"][0]["text"] for spelling in SPELLINGS}
    assert len(texts) == 1 and ANSWER_RE.fullmatch(texts.pop())
    replies = [chat(demo.http, "Well?", **settings, **spelling)["choices"][0] for spelling in SPELLINGS]
    texts = {reply["message"]["content"] for reply in replies}
    assert len(texts) == 1 and ANSWER_RE.fullmatch(texts.pop())
    assert {reply["finish_reason"] for reply in replies} == {"stop"}


def test_regular_expressions_choices_and_grammars_are_followed(demo):
    cases = [
        ({"regex": r"[A-C]{2}-\d{3}"}, r"[A-C]{2}-[0-9]{3}"),
        ({"regex": r"^(yes|no)$"}, "yes|no"),
        ({"choice": ["red", "green", "blue, or so"]}, "red|green|blue, or so"),
        ({"grammar": "start: greeting \" \" NAME\ngreeting: \"hi\" | \"hello\"\nNAME: /[A-Z][a-z]{2,5}/"}, "(hi|hello) [A-Z][a-z]{2,5}"),
        ({"grammar": "root ::= item (\",\" item){1,2}\nitem ::= [0-9] [0-9]?  # one or two"}, r"\d\d?(,\d\d?){1,2}"),
    ]
    for rule, pattern in cases:
        for seed in SEEDS:
            reply = complete(demo.http, prompt=PROMPT, temperature=1, seed=seed, max_tokens=40, structured_outputs=rule)["choices"][0]
            assert re.fullmatch(pattern, reply["text"]) and reply["finish_reason"] == "stop", (rule, reply)
        older = {f"guided_{name}": value for name, value in rule.items()}
        again = complete(demo.http, prompt=PROMPT, temperature=1, seed=SEEDS[-1], max_tokens=40, **older)["choices"][0]
        assert again["text"] == reply["text"]


def test_a_json_object_is_an_object_without_padding(demo):
    for seed in SEEDS:
        reply = chat(demo.http, "JSON!", temperature=1, seed=seed, max_tokens=300, response_format={"type": "json_object"})["choices"][0]
        text = reply["message"]["content"]
        assert text.startswith("{") and "\n" not in text.split('"')[0]
        if reply["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
    free = {"structured_outputs": {"json": ANSWER, "whitespace_pattern": r"[ \n]{0,2}"}}
    texts = [complete(demo.http, prompt=PROMPT, temperature=1.5, seed=seed, max_tokens=80, **free)["choices"][0] for seed in range(8)]
    assert all(json.loads(reply["text"]) for reply in texts if reply["finish_reason"] == "stop")
    assert any(not ANSWER_RE.fullmatch(reply["text"]) for reply in texts), "the space is free"


def test_a_stream_says_what_the_reply_says(demo):
    body = {"prompt": PROMPT, "temperature": 1, "seed": 9, "max_tokens": 60, "n": 3, "logprobs": 2, "structured_outputs": {"json": ANSWER}}
    whole = complete(demo.http, **body)
    stream = post_stream(demo.http, "/v1/completions", **body)
    for choice in whole["choices"]:
        index = choice["index"]
        pieces = [part["text"] for chunk in stream.chunks for part in chunk["choices"] if part["index"] == index]
        assert "".join(pieces) == choice["text"] and ANSWER_RE.fullmatch(choice["text"])
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["tokens"])
    assert len({choice["text"] for choice in whole["choices"]}) > 1, "each sequence has a state of its own"


def test_rows_without_a_rule_do_not_change_beside_rows_with_one(demo):
    plain = [{"model": model, "prompt": f"Tell me {i}.\n", "temperature": 0.8, "seed": i, "max_tokens": 40}
             for i, model in enumerate(["demo", "pirate", "haiku", "sql"] * 3)]
    held = [{**body, "structured_outputs": {"json": ANSWER}} for body in plain]
    alone = [complete(demo.http, **body)["choices"][0]["text"] for body in plain + held]
    mixed = complete_all(demo.http, [body for pair in zip(plain, held) for body in pair])
    together = [reply["choices"][0]["text"] for reply in mixed]
    assert together[0::2] + together[1::2] == alone
    assert all(ANSWER_RE.fullmatch(text) for text in together[1::2])


def test_native_routes_take_schemas_and_regular_expressions(demo):
    closed = {"type": "json_object", "schema": ANSWER}
    cases = [
        ({"response_format": closed}, ANSWER_RE),
        ({"response_format": {"type": "json_object", "schema": json.dumps(ANSWER)}}, ANSWER_RE),
        ({"schema": json.dumps(ANSWER)}, ANSWER_RE),
        ({"grammar": {"type": "json", "value": ANSWER}}, ANSWER_RE),
        ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": ANSWER}}}, ANSWER_RE),
        ({"grammar": {"type": "regex", "value": "[0-9]{3}"}}, re.compile("[0-9]{3}")),
    ]
    for parameters, pattern in cases:
        body = {"inputs": PROMPT, "parameters": {**parameters, "max_new_tokens": 60, "do_sample": True, "seed": 4, "adapter_id": "pirate"}}
        answer = demo.http.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        assert pattern.fullmatch(answer.json()["generated_text"]), (parameters, answer.text)
    for parameters in [{"grammar": {"type": "json"}}, {"grammar": {"type": "bnf", "value": "x"}}, {"response_format": closed, "schema": "{}"},
                       {"grammar": {"type": "json", "value": {"not": {}}}}]:
        answer = demo.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
        assert answer.status_code == 422 and answer.json()["error_type"] == "validation", answer.text


REFUSED = [
    ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"json": ANSWER, "regex": "a"}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"json": {}}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": 5}}, "invalid_value", "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "invalid_schema", "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "invalid_value", "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "["}}, "invalid_schema", "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a" * 17000}}, "invalid_schema", "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "invalid_value", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [str(i) for i in range(1025)]}}, "invalid_schema", "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": " "}}, "invalid_value", "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "start: missing"}}, "invalid_schema", "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"type": "string", "description": "x" * 70000}}}, "invalid_schema", "structured_outputs.json"),
    ({"structured_outputs": {"json": {"uniqueItems": True}}}, "invalid_schema", "structured_outputs.json"),
    ({"structured_outputs": {"json": {"format": "no-such"}}}, "invalid_schema", "structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "x"}}, "unsupported_parameter", "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": ANSWER}, "response_format": {"type": "json_object"}}, "invalid_value", "structured_outputs"),
    ({"guided_json": ANSWER, "guided_regex": "a"}, "invalid_value", "guided_regex"),
    ({"guided_choice": "a"}, "invalid_value", "guided_choice"),
    ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "missing_field", "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "invalid_schema",
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {}}, "missing_field", "response_format.type"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_cannot_be_held_is_refused_by_name(demo, path):
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    for fields, code, param in REFUSED:
        answer = demo.http.post(path, json={**base, "max_tokens": 3, **fields})
        assert answer.status_code == 400, (fields, answer.text[:300])
        error = check_error(answer.json())
        assert error["code"] == code and error["param"].startswith(param), (str(fields)[:200], error)


REASONS = [
    ({"structured_outputs": {"json": {"properties": {"a": {"type": "int"}}}}}, "`/properties/a/type`: `int` is no type"),
    ({"structured_outputs": {"json": {"properties": {"a": {"pattern": "(?!x)a"}}}}}, "`/properties/a/pattern`: look-around"),
    ({"structured_outputs": {"json": {"type": "string", "allOf": [{"pattern": f"a{i}"} for i in range(9)]}}}, "more than 8 patterns"),
    ({"structured_outputs": {"regex": "[a"}}, "this regular expression cannot be used: unclosed character class"),
    ({"structured_outputs": {"grammar": "root := \"a\""}}, "(read as Lark"),
]


def test_a_refusal_says_where_and_why(demo):
    for fields, reason in REASONS:
        answer = demo.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, **fields})
        assert answer.status_code == 400 and reason in check_error(answer.json())["message"], answer.text
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": kind}}}}}
             for name, kind in [("f", "string"), ("g", "int")]]
    for choice in ["required", {"type": "function", "function": {"name": "g"}}]:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "tools": tools, "tool_choice": choice}
        error = check_error(demo.http.post("/v1/chat/completions", json=body).json())
        assert (error["code"], error["param"]) == ("invalid_schema", "tools[1].function.parameters")
        assert error["message"].startswith("`/properties/x/type`: `int`")


def resident_mib(server) -> int:
    """Of the server and the shard it started."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in [server.pid, *children(server.pid)]]
    return sum(int(found[1]) for status in statuses if (found := re.search(r"VmRSS:\s+(\d+)", status))) // 1024


def ask_hostile(http, kind: str, rule) -> tuple[int, float]:
    started = time.monotonic()
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, "structured_outputs": {kind: rule}}, timeout=120)
    if answer.status_code != 200:
        check_error(answer.json())
    return answer.status_code, time.monotonic() - started


@pytest.mark.timeout(600)
def test_hostile_rules_end_soon_and_disturb_nobody(start_server):
    server = start_server()
    expected = complete(server.http, prompt=PROMPT, temperature=0, max_tokens=8)["choices"][0]["text"]
    complete(server.http, prompt="a", max_tokens=1, structured_outputs={"regex": "a"})
    before = resident_mib(server)
    for name, kind, rule in HOSTILE:
        status, seconds = ask_hostile(server.http, kind, rule)
        assert status in (200, 400) and seconds < HOSTILE_S, (name, status, seconds)
        assert resident_mib(server) < before + HOSTILE_MIB, name
    assert complete(server.http, prompt=PROMPT, temperature=0, max_tokens=8)["choices"][0]["text"] == expected
    # All at once, changed a little so that no answer is known yet; others go on meanwhile.
    fresh = [(kind, json.loads(json.dumps(rule)) | {"title": "again", "minProperties": 0} if kind == "json" else rule + ("|~" if kind == "regex" else "\n# again"))
             for _, kind, rule in HOSTILE]
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(ask_hostile, server.http, kind, rule) for kind, rule in fresh]
        beside = 0
        while not all(answer.done() for answer in answers):
            started = time.monotonic()
            assert complete(server.http, prompt=PROMPT, temperature=0, max_tokens=8)["choices"][0]["text"] == expected
            assert time.monotonic() - started < HOSTILE_S
            beside += 1
        assert {answer.result()[0] for answer in answers} <= {200, 400, 429}
    assert beside > 0
    held = post(server.http, "/v1/completions", prompt=PROMPT, max_tokens=60, structured_outputs={"json": ANSWER})
    assert ANSWER_RE.fullmatch(held["choices"][0]["text"])
