"""Anthropic's own Python client, unchanged, against our server."""

import asyncio
import time

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

SEA = "Tell me about the sea."


def ask(content=SEA, extra: dict | None = None, **more) -> dict:
    """Arguments of a call. The client has no word for `temperature` any more, and passes on what it is told."""
    messages = [{"role": "user", "content": content}]
    return {"model": "demo", "max_tokens": 20, "messages": messages, "extra_body": {"temperature": 0, **(extra or {})}, **more}


@pytest.fixture
def client(server):
    with Anthropic(base_url=server.url, api_key=server.key, max_retries=0, timeout=60) as client:
        yield client


def text_of(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.mark.parametrize("model", ["demo", "pirate", "sql"])
def test_whole_streamed_and_asynchronous(client, server, model):
    given = ask(model=model)
    whole = client.messages.create(**given)
    assert whole.type == "message" and whole.role == "assistant" and whole.model == model and text_of(whole)
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole.usage.output_tokens > 0
    assert whole._request_id

    kinds = [event.type for event in client.messages.create(**given, stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    with client.messages.stream(**given) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == text_of(final) == text_of(whole) and len(pieces) > 3
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens

    async def asynchronous():
        async with AsyncAnthropic(base_url=server.url, api_key=server.key, max_retries=0) as client:
            whole = await client.messages.create(**given)
            async with client.messages.stream(**given) as stream:
                return whole, await stream.get_final_message()

    assert {text_of(message) for message in asyncio.run(asynchronous())} == {text_of(whole)}


def test_every_plain_parameter(client):
    message = client.messages.create(**ask(
        [{"type": "text", "text": SEA, "cache_control": {"type": "ephemeral"}}], system=[{"type": "text", "text": "Be brief."}],
        stop_sequences=["zzz"], metadata={"user_id": "u"}, service_tier="auto", thinking={"type": "disabled"},
        extra={"temperature": 0.9, "top_p": 0.9, "top_k": 5, "seed": 1}, extra_headers={"anthropic-beta": "x"}))
    assert text_of(message)
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": SEA}]
    assert text_of(client.messages.create(**ask(messages=turns)))


def test_why_it_ended(client):
    whole = text_of(client.messages.create(**ask()))
    assert client.messages.create(**ask(max_tokens=2)).stop_reason == "max_tokens"
    word = whole.split()[2]
    cut = client.messages.create(**ask(stop_sequences=[word]))
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word)
    assert text_of(cut) == whole.partition(word)[0]


def test_a_begun_answer_is_continued(client):
    whole = text_of(client.messages.create(**ask()))
    head = whole[: len(whole) // 2].rstrip()
    turns = [{"role": "user", "content": SEA}, {"role": "assistant", "content": head}]
    assert text_of(client.messages.create(**ask(messages=turns))), "it goes on"


TOOLS = [{"name": "get_weather", "description": "The weather of a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}, "required": ["city"],
    "additionalProperties": False}}]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_called_and_its_result_read(client, choice):
    given = ask(tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True}, max_tokens=100)
    whole = client.messages.create(**given)
    with client.messages.stream(**given) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_message()
    assert "input_json" in kinds
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        [call] = [block for block in message.content if block.type == "tool_use"]
        assert call.name == "get_weather" and call.input["city"] in ("Oslo", "Paris")
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}]
    turns = [{"role": "user", "content": SEA}, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    after = client.messages.create(**ask(messages=turns, tools=TOOLS, tool_choice={"type": "none"}))
    assert after.stop_reason in ("end_turn", "max_tokens")
    counted = {"model": "demo", "messages": given["messages"]}
    assert client.messages.count_tokens(**counted, tools=TOOLS).input_tokens >= client.messages.count_tokens(**counted).input_tokens


def test_tokens_are_counted(client):
    given = ask()
    counted = {name: given[name] for name in ("model", "messages")}
    usage = client.messages.create(**given).usage
    total = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert client.messages.count_tokens(**counted).input_tokens == total
    assert client.messages.count_tokens(**counted, system="Be brief.").input_tokens > total


def test_errors_become_the_clients_exceptions(client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**ask(model="nobody"))
    assert unknown.value.body["error"]["type"] == "not_found_error" and unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**ask(extra={"temperature": 1.5}))
    assert "`temperature`" in refused.value.body["error"]["message"]
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**ask([{"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}]))
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]))
    with pytest.raises(anthropic.BadRequestError):
        with client.messages.stream(**ask(extra={"temperature": 1.5})):
            pass


def test_keys_and_limits(locked):
    with Anthropic(base_url=locked.url, api_key="wrong", max_retries=0) as wrong:
        with pytest.raises(anthropic.AuthenticationError):
            wrong.messages.create(**ask())
    with Anthropic(base_url=locked.url, auth_token=locked.key, api_key=None, max_retries=0) as bearer:
        assert bearer.messages.count_tokens(model="demo", messages=ask()["messages"]).input_tokens > 0
    with Anthropic(base_url=locked.url, api_key=locked.key, max_retries=0) as client:
        long = ask(max_tokens=150, extra={"ignore_eos": True})
        with client.messages.stream(**long) as stream:
            next(iter(stream.text_stream))
            with pytest.raises(anthropic.RateLimitError) as limited:
                client.messages.create(**ask())
            assert int(limited.value.response.headers["retry-after"]) >= 1
        locked.wait_running(0)  # leaving the stream ended the request
        deadline = time.monotonic() + 20
        while True:
            try:
                assert client.messages.create(**ask(max_tokens=1)).usage.output_tokens == 1
                return
            except anthropic.RateLimitError:
                assert time.monotonic() < deadline, "the stream that was left still counts"
                time.sleep(0.05)
