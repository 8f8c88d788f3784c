"""`openai` for Python: what its documentation shows, synchronous and not."""

import asyncio
import json
import threading
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

SEA = [{"role": "user", "content": "Tell me about the sea."}]
PROMPT = "Tell me about the sea.\n"
ADAPTERS = ["pirate", "haiku", "sql", "shout"]
# A text that does not end by itself.
ENDLESS = dict(model="demo", prompt=PROMPT, max_tokens=1500, extra_body={"ignore_eos": True})


GREEDY = dict(model="demo", messages=SEA, temperature=0, max_tokens=100)


class Weather(BaseModel):
    """The weather of a city."""
    model_config = ConfigDict(extra="forbid")  # otherwise there is no end to what a model may add
    city: Literal["Oslo", "Paris"]
    degrees: int = Field(ge=-50, le=50)


def get_tool(name: str = "get_weather") -> dict:
    return {"type": "function", "function": {"name": name, "description": "The weather of a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}, "required": ["city"], "additionalProperties": False}}}


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60) as client:
        yield client


def run_async(server, ask):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60) as client:
            return await ask(client)
    return asyncio.run(run())


def test_a_list_of_prompts_and_token_ids(client):
    alone = client.completions.create(model="sql", prompt=PROMPT, temperature=0, max_tokens=8, extra_body={"return_token_ids": True})
    ids = alone.choices[0].prompt_token_ids
    expected = alone.choices[0].text
    several = client.completions.create(model="sql", prompt=[PROMPT, "Describe coffee.\n", PROMPT], temperature=0, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == several.choices[2].text == expected
    assert client.completions.create(model="sql", prompt=ids, temperature=0, max_tokens=8).choices[0].text == expected
    both = client.completions.create(model="sql", prompt=[ids, ids], temperature=0, max_tokens=8)
    assert [choice.text for choice in both.choices] == [expected, expected]
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_n_best_of_echo_and_stop(client):
    reply = client.completions.create(model="demo", prompt=PROMPT, n=2, best_of=4, seed=1, max_tokens=6)
    assert len(reply.choices) == 2 and reply.usage.completion_tokens > 0
    echoed = client.completions.create(model="demo", prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    assert echoed.choices[0].text == PROMPT and echoed.choices[0].logprobs.token_logprobs[0] is None
    assert echoed.usage.completion_tokens == 0
    full = client.chat.completions.create(model="demo", messages=SEA, temperature=0, max_completion_tokens=40).choices[0].message.content
    stop = full[8:12]
    cut = client.chat.completions.create(model="demo", messages=SEA, temperature=0, max_tokens=40, stop=[stop]).choices[0]
    assert cut.message.content == full[:full.index(stop)] and cut.finish_reason == "stop"


def test_seeds_logprobs_and_biases(client):
    def ask(seed):
        return client.chat.completions.create(model="demo", messages=SEA, seed=seed, temperature=1.3, max_tokens=12, n=2,
                                              logprobs=True, top_logprobs=2)
    first, second = ask(7), ask(7)
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert all(len(entry.top_logprobs) == 2 for choice in first.choices for entry in choice.logprobs.content)
    assert first.system_fingerprint == second.system_fingerprint
    only = client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, logit_bias={"100": 100}, extra_body={"return_token_ids": True})
    assert only.choices[0].token_ids == [100, 100, 100]


def test_usage_at_the_end_of_a_stream(client):
    for create, given in ((client.completions.create, {"prompt": PROMPT}), (client.chat.completions.create, {"messages": SEA})):
        whole = create(model="pirate", temperature=0, max_tokens=10, **given)
        chunks = list(create(model="pirate", temperature=0, max_tokens=10, stream=True, stream_options={"include_usage": True}, **given))
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model="haiku", messages=SEA, temperature=0, max_tokens=40) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model="haiku", messages=SEA, temperature=0, max_tokens=40)
    assert "".join(event.delta for event in events if event.type == "content.delta") == whole.choices[0].message.content
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert "content.done" in [event.type for event in events]


def test_models_are_listed_and_found(client):
    listed = [model.id for model in client.models.list()]
    assert {"demo", *ADAPTERS} <= set(listed)
    for name in listed:
        found = client.models.retrieve(name)
        assert found.id == name and found.object == "model" and found.created > 0 and found.owned_by
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_adapters_by_name_and_by_extra_body(client):
    def say(**given):
        return client.chat.completions.create(messages=SEA, temperature=0, max_tokens=20, **given).choices[0].message.content
    texts = {name: say(model=name) for name in ["demo", *ADAPTERS]}
    assert len(set(texts.values())) == 5
    assert say(model="demo", extra_body={"adapter_id": "shout"}) == texts["shout"]
    assert say(model="demo:shout") == texts["shout"]
    assert say(model="shout", extra_body={"adapter_scale": 0}) == texts["demo"]
    assert say(model="demo", extra_body={"compose": [{"adapter": "shout", "weight": 1}]}) == texts["shout"]
    fan = client.chat.completions.create(model="demo", messages=SEA, temperature=0, max_tokens=20, extra_body={"adapters": ["base", "sql"]})
    assert [choice.message.content for choice in fan.choices] == [texts["demo"], texts["sql"]]
    more = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, extra_body={
        "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "stop_token_ids": [5], "skip_special_tokens": False})
    assert more.usage.completion_tokens == 4


def test_raw_and_streaming_responses(client):
    raw = client.chat.completions.with_raw_response.create(
        model="sql", messages=SEA, max_tokens=4, extra_headers={"x-request-id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1" and raw.headers["x-adapter-id"] == "sql"
    assert raw.parse()._request_id == "mine-1"
    with client.chat.completions.with_streaming_response.create(model="demo", messages=SEA, max_tokens=4, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_errors_have_their_classes(client, locked):
    cases = [(openai.BadRequestError, "invalid_value", dict(model="demo", messages=SEA, temperature=-1)),
             (openai.BadRequestError, "context_length_exceeded", dict(model="demo", messages=SEA, max_tokens=10**6)),
             (openai.NotFoundError, "model_not_found", dict(model="nobody", messages=SEA)),
             (openai.BadRequestError, None, dict(model="demo", messages=[])),
             (openai.BadRequestError, None, dict(model="demo", messages=[{"role": "user", "content": [
                 {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]))]
    for kind, code, given in cases:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(stream=stream, **given)
            assert caught.value.type == "invalid_request_error" and caught.value.request_id
            assert code in (None, caught.value.code), caught.value.code
    with openai.OpenAI(base_url=locked.v1, api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="demo", messages=SEA)


def test_a_busy_server_is_asked_again(locked):
    """The key may ask one thing at a time: 429 with `Retry-After`, and the client comes back until the stream was closed."""
    with openai.OpenAI(base_url=locked.v1, api_key=locked.key, max_retries=5, timeout=60) as client:
        first = client.completions.create(stream=True, **ENDLESS)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).completions.create(model="demo", prompt=PROMPT, max_tokens=1)
        assert caught.value.code == "rate_limited" and int(caught.value.response.headers["retry-after"]) >= 1
        closer = threading.Timer(0.3, first.close)
        closer.start()
        raw = client.completions.with_raw_response.create(model="demo", prompt=PROMPT, max_tokens=1)
        closer.join()
        assert raw.retries_taken >= 1 and raw.parse().usage.completion_tokens == 1


def test_closing_and_timeouts_cancel(locked):
    with openai.OpenAI(base_url=locked.v1, api_key=locked.key, max_retries=0, timeout=60) as client:
        locked.wait_running(0)
        with client.completions.create(stream=True, **ENDLESS) as stream:
            next(iter(stream))
            locked.wait_running(1)
        locked.wait_running(0)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=httpx.Timeout(0.5, connect=10)).completions.create(**ENDLESS)
        locked.wait_running(0)

    async def leave():
        async with openai.AsyncOpenAI(base_url=locked.v1, api_key=locked.key, max_retries=0) as client:
            asked = asyncio.create_task(client.completions.create(**ENDLESS))
            await asyncio.to_thread(locked.wait_running, 1)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
    asyncio.run(leave())
    locked.wait_running(0)


def test_the_asynchronous_client(server, client):
    given = dict(model="pirate", messages=SEA, temperature=0, max_tokens=20)
    expected = client.chat.completions.create(**given).choices[0].message.content

    async def ask(client):
        whole = await client.chat.completions.create(**given)
        stream = await client.chat.completions.create(stream=True, **given)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        models = [model.id async for model in client.models.list()]
        many = await asyncio.gather(*(client.chat.completions.create(**{**given, "model": name}) for name in ADAPTERS))
        return whole.choices[0].message.content, "".join(pieces), models, many

    whole, streamed, models, many = run_async(server, ask)
    assert whole == streamed == expected and set(ADAPTERS) <= set(models)
    assert len({reply.choices[0].message.content for reply in many}) == len(ADAPTERS)


def test_structured_output(client):
    for model in ("demo", "shout"):
        reply = client.chat.completions.parse(**{**GREEDY, "model": model}, response_format=Weather)
        assert isinstance(reply.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(**GREEDY, response_format=Weather) as stream:
        events = list(stream)
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    assert [event for event in events if event.type == "content.delta" and event.parsed]
    schema = {"name": "weather", "schema": Weather.model_json_schema(), "strict": True}
    plain = client.chat.completions.create(**GREEDY, response_format={"type": "json_schema", "json_schema": schema}, n=2, logprobs=True)
    for choice in plain.choices:
        Weather.model_validate_json(choice.message.content)
        assert choice.finish_reason == "stop" and choice.logprobs.content
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=100, extra_body={"structured_outputs": {"json": Weather.model_json_schema()}})
    Weather.model_validate_json(completion.choices[0].text)
    choice = client.chat.completions.create(**GREEDY, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")
    regex = client.chat.completions.create(**GREEDY, extra_body={"guided_regex": "[a-f]{4}-[0-9]{2}"})
    assert len(regex.choices[0].message.content) == 7
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}})
    assert caught.value.code == "invalid_schema"


def test_cut_structured_output_is_said_to_be_cut(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**GREEDY, "max_tokens": 2}, response_format=Weather)


@pytest.mark.parametrize("choice", ["required", named("get_weather")], ids=["required", "named"])
def test_tools_that_must_be_called(client, choice):
    given = dict(**GREEDY, tools=[get_tool(), get_tool("other")], tool_choice=choice, parallel_tool_calls=False)
    reply = client.chat.completions.create(**given)
    (call,) = reply.choices[0].message.tool_calls
    assert call.id and call.type == "function" and json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")
    assert choice == "required" or call.function.name == "get_weather"
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    parts = [part for chunk in chunks for each in chunk.choices for part in each.delta.tool_calls or []]
    assert [part.function.name for part in parts if part.function.name] == [call.function.name] and parts[0].id
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments
    assert chunks[-1].usage.total_tokens == reply.usage.total_tokens
    turn = [*SEA, reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    for more in ({}, {"tools": [get_tool()]}, {"tools": [get_tool()], "tool_choice": "none"}):
        assert client.chat.completions.create(**{**GREEDY, "messages": turn}, **more).choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_tools_from_types(client):
    tool = openai.pydantic_function_tool(Weather)
    given = dict(**GREEDY, tools=[tool], tool_choice=named("Weather"))
    reply = client.chat.completions.parse(**given)
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    with client.chat.completions.stream(**given) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.tool_calls[0].function
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(final.parsed_arguments, Weather)


def test_tools_that_may_be_called(client):
    for choice in ("auto", "none"):
        message = client.chat.completions.create(**GREEDY, tools=[get_tool()], tool_choice=choice).choices[0].message
        assert message.content or message.tool_calls
        assert choice == "auto" or not message.tool_calls
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, tools=[get_tool()], tool_choice=named("nothing"))
    assert caught.value.param.startswith("tool_choice")


def test_embeddings(client, server):
    texts = ["The sea is deep.", "Coffee is hot."]
    packed = client.embeddings.create(model="demo", input=texts)
    assert [each.index for each in packed.data] == [0, 1] and packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    plain = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    for left, right in zip(packed.data, plain.data):
        assert left.embedding == pytest.approx(right.embedding, abs=1e-6)
    ids = client.completions.create(model="demo", prompt=texts[0], max_tokens=1, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    for given in (ids, [ids]):
        assert client.embeddings.create(model="demo", input=given).data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-4)
    adapted = client.embeddings.create(model="shout", input=texts[0]).data[0].embedding
    assert adapted != pytest.approx(plain.data[0].embedding, abs=1e-3)
    assert run_async(server, lambda c: c.embeddings.create(model="demo", input=texts[0])).data[0].embedding == packed.data[0].embedding


def test_responses(client, server):
    given = dict(model="pirate", input="Tell me about the sea.", temperature=0, max_output_tokens=100)
    reply = client.responses.create(**given)
    assert reply.output_text and reply.usage.output_tokens > 0 and reply.status in ("completed", "incomplete")
    events = list(client.responses.create(**given, stream=True))
    assert events[0].type == "response.created" and [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == reply.output_text
    with client.responses.stream(**given) as stream:
        list(stream)
        assert stream.get_final_response().output_text == reply.output_text
    assert run_async(server, lambda c: c.responses.create(**given)).output_text == reply.output_text
    items = client.responses.create(**{**given, "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}]}, instructions="Be kind.")
    assert items.output_text
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**given, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**given, "model": "nobody"})


def test_responses_with_types_and_tools(client):
    given = dict(model="demo", input="How is the weather?", temperature=0, max_output_tokens=100)
    assert isinstance(client.responses.parse(**given, text_format=Weather).output_parsed, Weather)
    tool = {"type": "function", "strict": True, **get_tool()["function"]}
    reply = client.responses.create(**given, tools=[tool], tool_choice={"type": "function", "name": "get_weather"})
    call = next(item for item in reply.output if item.type == "function_call")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Paris")
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    turn = client.responses.create(**{**given, "input": [{"role": "user", "content": "How is the weather?"}, call, answer]})
    assert turn.output_text
