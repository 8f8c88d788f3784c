"""LoRAX's own routes, over real sockets: shapes against LoRAX's published schema, and what the adapters of the demo answer."""

import json
from pathlib import Path

import httpx
import jsonschema
import pytest

from wire import sse_lines

DOCUMENT = json.loads((Path(__file__).parent / "schemas/lorax.json").read_text())


def _plain(schema):
    """OpenAPI 3.0 as JSON Schema: `nullable` is another type there, and an exclusive bound a number."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain(value) for key, value in schema.items() if key not in ("nullable", "exclusiveMinimum", "example", "default", "format")}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") else plain


SCHEMAS = _plain(DOCUMENT["components"]["schemas"])


def check(name: str, value):
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    errors = list(jsonschema.Draft4Validator(root).iter_errors(value))
    assert not errors, f"{name}: {'; '.join(f'{list(e.path)}: {e.message}' for e in errors[:5])}\n{json.dumps(value)[:1500]}"
    return value


def generate(http, inputs: str, path: str = "/generate", **parameters) -> dict:
    answer = http.post(path, json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return check("GenerateResponse", answer.json())


def stream(http, inputs: str, **parameters) -> list[dict]:
    with http.stream("POST", "/generate_stream", json={"inputs": inputs, "parameters": parameters}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in sse_lines(answer) if line and not line.startswith(":")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]  # no [DONE] among them
    return [check("StreamResponse", event) for event in events]


def text_of(tokens: list[dict]) -> str:
    return "".join(token["text"] for token in tokens if not token["special"])


@pytest.mark.parametrize("adapter", [None, "pirate", "sql", "haiku"])
def test_whole_and_streamed_replies_are_the_openai_routes_text(demo, adapter):
    named = {"adapter_id": adapter} if adapter else {}
    prompt = "Tell me about the sea."
    whole = generate(demo.http, prompt, max_new_tokens=12, details=True, decoder_input_details=True, return_k_alternatives=2, **named)
    events = stream(demo.http, prompt, max_new_tokens=12, **named)
    told = demo.http.post("/v1/completions", json={"model": adapter or "demo", "prompt": prompt, "max_tokens": 12, "temperature": 0}).json()
    details = whole["details"]
    assert whole["generated_text"] == told["choices"][0]["text"] == events[-1]["generated_text"]
    assert text_of(details["tokens"]) == whole["generated_text"] == text_of([event["token"] for event in events])
    assert [t["id"] for t in details["tokens"]] == [event["token"]["id"] for event in events]
    assert details["prompt_tokens"] == len(details["prefill"]) == told["usage"]["prompt_tokens"]
    assert details["prefill"][0]["logprob"] is None and all(t["logprob"] < 0 for t in details["prefill"][1:])
    for token in details["tokens"]:
        best = token["alternative_tokens"][0]
        assert best["id"] == token["id"] and best["logprob"] == token["logprob"], "greedy takes the likeliest"
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["details"]["generated_tokens"] == details["generated_tokens"] == len(events)


def test_adapters_differ_and_headers_name_them(demo):
    prompt = {"inputs": "Tell me about the sea.", "parameters": {"max_new_tokens": 16, "apply_chat_template": True}}
    texts = set()
    for adapter in (None, "pirate", "shout"):
        body = {**prompt, "parameters": {**prompt["parameters"], **({"adapter_id": adapter} if adapter else {})}}
        answer = demo.http.post("/generate", json=body)
        assert answer.headers.get("x-adapter-id") == adapter
        assert int(answer.headers["x-total-tokens"]) == int(answer.headers["x-prompt-tokens"]) + int(answer.headers["x-generated-tokens"])
        assert int(answer.headers["x-compute-characters"]) == len(prompt["inputs"])
        assert int(answer.headers["x-total-time"]) >= int(answer.headers["x-inference-time"])
        texts.add(answer.json()["generated_text"])
    assert len(texts) == 3


def test_seeds_and_best_of(demo):
    one = generate(demo.http, "Once", do_sample=True, seed=7, max_new_tokens=8, details=True)
    assert one["details"]["seed"] == 7
    assert generate(demo.http, "Once", do_sample=True, seed=7, max_new_tokens=8)["generated_text"] == one["generated_text"]
    best = generate(demo.http, "Once", do_sample=True, best_of=4, max_new_tokens=8, details=True)
    sequences = [best["details"], *best["details"]["best_of_sequences"]]
    means = [sum(t["logprob"] for t in s["tokens"]) / len(s["tokens"]) for s in sequences]
    assert len(means) == 4 and means[0] == max(means)
    again = generate(demo.http, "Once", do_sample=True, seed=sequences[2]["seed"], max_new_tokens=8)
    assert again["generated_text"] == sequences[2]["generated_text"], "its seed repeats a sequence alone"


def test_stop_sequences_and_full_text(demo):
    whole = generate(demo.http, "Tell me about the sea.", max_new_tokens=24)["generated_text"]
    stop = whole[3:6]
    cut = generate(demo.http, "Tell me about the sea.", max_new_tokens=24, stop=[stop], details=True)
    assert cut["generated_text"] == whole[: whole.index(stop) + len(stop)]
    assert cut["details"]["finish_reason"] == "stop_sequence"
    full = generate(demo.http, "Tell me about the sea.", max_new_tokens=24, return_full_text=True)
    assert full["generated_text"] == "Tell me about the sea." + whole
    assert stream(demo.http, "Tell me about the sea.", max_new_tokens=24, stop=[stop])[-1]["generated_text"] == cut["generated_text"]


def test_compatible_routes_and_info(demo):
    answer = demo.http.post("/", json={"inputs": "Hi", "parameters": {"max_new_tokens": 2}})
    assert answer.status_code == 200 and len(answer.json()) == 1
    check("GenerateResponse", answer.json()[0])
    assert demo.http.post("/invocations", json={"inputs": "Hi", "parameters": {"max_new_tokens": 2}}).json() == answer.json()
    assert demo.http.post("/invocations", json={"prompt": "Hi", "max_tokens": 2}).json()["object"] == "text_completion"
    check("Info", demo.http.get("/info").json())
    assert demo.http.get("/").status_code == 200


@pytest.mark.parametrize(
    "body, status, kind",
    [
        ({}, 422, "validation"),
        ({"inputs": "a", "parameters": {"temperature": -1}}, 422, "validation"),
        ({"inputs": "a", "parameters": {"typical_p": 0.5}}, 422, "validation"),
        ({"inputs": "a", "parameters": {"watermark": True}}, 422, "validation"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 10**6}}, 422, "validation"),
        ({"inputs": "a", "parameters": {"adapter_id": "nobody"}}, 424, "generation"),
        ({"inputs": "a", "parameters": {"merged_adapters": {"ids": ["pirate", "nobody here"], "weights": [1, 1]}}}, 422, "validation"),
    ],
)
def test_errors_are_loraxs(demo, body, status, kind):
    for path in ("/generate", "/generate_stream", "/"):
        answer = demo.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert check("ErrorResponse", answer.json())["error_type"] == kind
        assert isinstance(answer.json()["code"], str)


def test_malformed_json_and_a_missing_key(demo, start_server):
    answer = demo.http.post("/generate", content=b"{")
    assert answer.status_code == 422 and check("ErrorResponse", answer.json())["code"] == "invalid_json"
    keyed = start_server(api_key="the-key")
    for path in ("/", "/generate", "/generate_stream", "/invocations"):
        answer = httpx.post(f"{keyed.base}{path}", json={"inputs": "a"}, trust_env=False)
        assert answer.status_code == 401 and check("ErrorResponse", answer.json())["error_type"] == "authentication"
    assert generate(keyed.http, "Hi", max_new_tokens=1)


def test_a_merge_answers_and_is_repeatable(demo):
    merged = {"ids": ["pirate", "shout"], "weights": [0.6, 0.4], "merge_strategy": "dare_ties", "density": 0.7}
    texts = {generate(demo.http, "Tell me about the sea.", max_new_tokens=12, merged_adapters=merged)["generated_text"] for _ in range(2)}
    assert len(texts) == 1
    alone = {"ids": ["pirate"], "weights": [1.0], "merge_strategy": "linear"}
    prompt = "Tell me about the sea."
    assert (
        generate(demo.http, prompt, max_new_tokens=12, merged_adapters=alone)["generated_text"]
        == generate(demo.http, prompt, max_new_tokens=12, adapter_id="pirate")["generated_text"]
    )
