"""`/v1/messages` over a socket: what it says is what chat completions say, in Anthropic's Messages. Anthropic's own client:
`clients/calls_anthropic.py`."""

import json

import pytest

from conftest import MODELS
from dialects import check_anthropic_error, check_message, check_message_stream, named_events
from loramux_server import wait_until
from wire import chat

SEA = "Tell me about the sea."
REASONS = {"stop": "end_turn", "length": "max_tokens"}


def body(**more) -> dict:
    return {"model": "demo", "max_tokens": 20, "messages": [{"role": "user", "content": SEA}], **more}


def ask(http, **more) -> dict:
    answer = http.post("/v1/messages", json=body(**more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return check_message(answer.json())


def ask_stream(http, **more) -> dict:
    answer = http.post("/v1/messages", json=body(**more, stream=True))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-accel-buffering"] == "no"
    return check_message_stream(named_events(answer.text))


def text_of(message: dict) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("limit", [5, 80])
def test_it_says_what_a_chat_says(demo, model, limit):
    given = dict(model=model, temperature=0.7, seed=3, max_tokens=limit)
    of_chat = chat(demo.http, SEA, **given)
    choice = of_chat["choices"][0]
    for message in (ask(demo.http, **given), ask_stream(demo.http, **given)):
        assert text_of(message) == choice["message"]["content"]
        assert message["stop_reason"] == REASONS[choice["finish_reason"]] and message["model"] == model
        usage = message["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == of_chat["usage"]["prompt_tokens"]
        assert usage["output_tokens"] == of_chat["usage"]["completion_tokens"]


def test_the_headers_name_the_adapter(demo):
    for stream in (False, True):
        answer = demo.http.post("/v1/messages", json=body(model="pirate", stream=stream))
        assert answer.headers["x-adapter-id"] == "pirate" and answer.headers["x-model-id"] == "demo"


def test_a_begun_answer_goes_on_where_it_stopped(demo):
    whole = text_of(ask(demo.http, temperature=0, max_tokens=30))
    head = " ".join(whole.split()[:4])
    assert whole.startswith(head)
    rest = ask(demo.http, temperature=0, max_tokens=30, messages=[{"role": "user", "content": SEA}, {"role": "assistant", "content": head}])
    of_chat = demo.http.post("/v1/chat/completions", json={
        "model": "demo", "temperature": 0, "max_tokens": 30, "continue_final_message": True, "add_generation_prompt": False,
        "messages": [{"role": "user", "content": SEA}, {"role": "assistant", "content": head}]}).json()
    assert text_of(rest) == of_chat["choices"][0]["message"]["content"]


def test_every_error_has_anthropics_body(start_server):
    server = start_server("--max-body-bytes", "2000", api_key="secret")
    key = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
    server.http.headers.pop("authorization")
    for method, path, headers, sent, status in [
        ("POST", "/v1/messages", {}, body(), 401),
        ("POST", "/v1/messages", {"x-api-key": "guess"}, body(), 401),
        ("POST", "/v1/messages", key, body(), 200),
        ("POST", "/v1/messages/count_tokens", key, body(), 200),
        ("GET", "/v1/messages", key, None, 405),
        ("POST", "/v1/messages/batches", key, {}, 404),
        ("POST", "/v1/messages", key, body(model="nobody"), 404),
        ("POST", "/v1/messages", key, body(system="x" * 3000), 413),
        ("POST", "/v1/messages", key, body(max_tokens=0), 400),
        ("POST", "/v1/messages", key, body(max_tokens=10**9), 400),
    ]:
        answer = server.http.request(method, path, headers=headers, json=sent)
        assert answer.status_code == status, (path, answer.text)
        if status != 200:
            check_anthropic_error(status, answer.json())
            assert answer.headers["request-id"] == answer.json()["request_id"]
    other = server.http.post("/v1/completions", headers=key, json={"prompt": "a"})
    assert other.status_code == 401, "on other routes the header opens nothing"


def test_a_client_that_leaves_ends_the_request(start_server, slow_flags):
    server = start_server(*slow_flags)
    sent = body(stream=True, ignore_eos=True, max_tokens=200)
    with server.http.stream("POST", "/v1/messages", json=sent) as answer:
        pieces = answer.iter_bytes()  # kept: an iterator that is dropped closes the connection
        next(pieces)
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, "the request runs")
    server.wait_idle()


TOOLS = [{"name": "get_weather", "description": "The weather of a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}, "required": ["city"],
    "additionalProperties": False}}]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
@pytest.mark.parametrize("get", [ask, ask_stream])
def test_a_tool_that_must_be_called_is_called(demo, choice, get):
    message = get(demo.http, temperature=1, seed=4, max_tokens=100, tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True})
    [call] = [block for block in message["content"] if block["type"] == "tool_use"]
    assert call["name"] == "get_weather" and call["input"]["city"] in ("Oslo", "Paris") and set(call["input"]) == {"city"}
    assert message["stop_reason"] == "tool_use"
    turns = [{"role": "user", "content": SEA}, {"role": "assistant", "content": message["content"]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "Rain."}]}]
    assert ask(demo.http, messages=turns, tools=TOOLS, tool_choice={"type": "none"})["stop_reason"] in ("end_turn", "max_tokens")


def test_output_of_a_schema_is_valid(demo):
    schema = TOOLS[0]["input_schema"]
    for get in (ask, ask_stream):
        message = get(demo.http, max_tokens=100, output_config={"format": {"type": "json_schema", "schema": schema}})
        assert json.loads(text_of(message))["city"] in ("Oslo", "Paris")
