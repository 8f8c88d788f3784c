"""`/v1/responses` over a socket: what it says is what chat completions say, in OpenAI's Responses."""

import json

import pytest

from conftest import MODELS
from dialects import check_response, check_response_stream, named_events
from loramux_server import wait_until
from wire import chat, check_error

SEA = "Tell me about the sea."


def ask(http, **body) -> dict:
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    return check_response(answer.json())


def ask_stream(http, **body) -> tuple[list[dict], dict]:
    answer = http.post("/v1/responses", json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-accel-buffering"] == "no"
    events = named_events(answer.text)
    return events, check_response_stream(events)


def text_of(response: dict) -> str:
    return "".join(item["content"][0]["text"] for item in response["output"] if item["type"] == "message")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("limit", [5, 80])
def test_it_says_what_a_chat_says(demo, model, limit):
    given = dict(model=model, temperature=0.7, seed=3)
    of_chat = chat(demo.http, SEA, max_tokens=limit, **given)
    whole = ask(demo.http, input=SEA, max_output_tokens=limit, **given)
    assert text_of(whole) == of_chat["choices"][0]["message"]["content"]
    assert whole["status"] == {"stop": "completed", "length": "incomplete"}[of_chat["choices"][0]["finish_reason"]]
    assert whole["model"] == model
    assert whole["usage"]["input_tokens"] == of_chat["usage"]["prompt_tokens"]
    assert whole["usage"]["output_tokens"] == of_chat["usage"]["completion_tokens"]
    _, streamed = ask_stream(demo.http, input=[{"role": "user", "content": SEA}], max_output_tokens=limit, **given)
    assert text_of(streamed) == text_of(whole) and streamed["status"] == whole["status"]


def test_the_headers_name_the_adapter(demo):
    for stream in (False, True):
        answer = demo.http.post("/v1/responses", json={"model": "pirate", "input": "Hello!", "max_output_tokens": 4, "stream": stream})
        assert answer.headers["x-adapter-id"] == "pirate" and answer.headers["x-model-id"] == "demo"


def test_a_conversation_and_its_instructions_reach_the_model(demo):
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": SEA}]
    given = dict(model="demo", temperature=0)
    of_chat = demo.http.post("/v1/chat/completions", json={
        **given, "max_tokens": 20, "messages": [{"role": "system", "content": "Be brief."}, *turns]}).json()
    reply = ask(demo.http, input=turns, instructions="Be brief.", max_output_tokens=20, **given)
    assert text_of(reply) == of_chat["choices"][0]["message"]["content"]
    assert reply["usage"]["input_tokens"] == of_chat["usage"]["prompt_tokens"]
    assert reply["instructions"] == "Be brief."


@pytest.mark.parametrize("body, code, param", [
    ({}, "missing_field", "input"),
    ({"input": SEA, "previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    ({"input": SEA, "conversation": {"id": "c"}}, "unsupported_parameter", "conversation"),
    ({"input": SEA, "background": True}, "unsupported_parameter", "background"),
    ({"input": SEA, "tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"input": SEA, "max_output_tokens": 10**9}, "context_length_exceeded", "max_output_tokens"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "invalid_value", "input[0].content[0].type"),
])
def test_what_is_refused_is_refused_by_name(demo, body, code, param):
    answer = demo.http.post("/v1/responses", json=body)
    error = check_error(answer.json())
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


def test_an_unknown_model_is_not_found(demo):
    answer = demo.http.post("/v1/responses", json={"model": "nobody", "input": SEA})
    assert answer.status_code == 404 and check_error(answer.json())["code"] == "model_not_found"


def test_a_client_that_leaves_ends_the_request(start_server, slow_flags):
    server = start_server(*slow_flags)
    body = {"input": SEA, "stream": True, "ignore_eos": True, "max_output_tokens": 200}
    with server.http.stream("POST", "/v1/responses", json=body) as answer:
        pieces = answer.iter_bytes()  # kept: an iterator that is dropped closes the connection
        next(pieces)
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, "the request runs")
    server.wait_idle()


WEATHER = {"type": "function", "name": "get_weather", "description": "The weather of a city", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}, "required": ["city"],
    "additionalProperties": False}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(demo, choice, stream):
    given = dict(model="demo", temperature=1, seed=4, max_output_tokens=100, tools=[WEATHER], parallel_tool_calls=False, tool_choice=choice)
    reply = ask_stream(demo.http, input=SEA, **given)[1] if stream else ask(demo.http, input=SEA, **given)
    [call] = [item for item in reply["output"] if item["type"] == "function_call"]
    arguments = json.loads(call["arguments"])
    assert call["name"] == "get_weather" and arguments["city"] in ("Oslo", "Paris") and set(arguments) == {"city"}
    assert reply["status"] == "completed"
    turns = [{"role": "user", "content": SEA}, call, {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}]
    assert ask(demo.http, input=turns, tools=[WEATHER], tool_choice="none", max_output_tokens=10)["output"][0]["type"] == "message"


def test_text_of_a_schema_is_valid(demo):
    form = {"type": "json_schema", "name": "weather", "schema": WEATHER["parameters"], "strict": True}
    for get in (ask, lambda http, **body: ask_stream(http, **body)[1]):
        reply = get(demo.http, input=SEA, text={"format": form}, max_output_tokens=100)
        assert json.loads(text_of(reply))["city"] in ("Oslo", "Paris")
