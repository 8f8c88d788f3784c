"""`litellm`: our server as an OpenAI-compatible provider and as `hosted_vllm`."""

import asyncio
import json
from typing import Literal

import litellm
import pytest
from pydantic import BaseModel, ConfigDict, Field

SEA = [{"role": "user", "content": "Tell me about the sea."}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}, "required": ["city"], "additionalProperties": False}}}


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")  # otherwise there is no end to what a model may add
    city: Literal["Oslo", "Paris"]
    degrees: int = Field(ge=-50, le=50)


@pytest.fixture
def at(server):
    return dict(api_base=server.v1, api_key=server.key, temperature=0, max_tokens=20, num_retries=0)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat_and_stream(at, provider):
    for model in ("demo", "pirate"):
        whole = litellm.completion(model=f"{provider}/{model}", messages=SEA, **at)
        assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens > 0
        chunks = list(litellm.completion(model=f"{provider}/{model}", messages=SEA, stream=True, stream_options={"include_usage": True}, **at))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)][-1] == whole.usage.completion_tokens
        assert litellm.stream_chunk_builder(chunks, messages=SEA).choices[0].message.content == whole.choices[0].message.content


def test_asynchronous(at):
    async def ask():
        whole = await litellm.acompletion(model="openai/haiku", messages=SEA, **at)
        stream = await litellm.acompletion(model="openai/haiku", messages=SEA, stream=True, **at)
        return whole.choices[0].message.content, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_text_completion(at):
    whole = litellm.text_completion(model="text-completion-openai/sql", prompt="Tell me about the sea.\n", **at)
    stream = litellm.text_completion(model="text-completion-openai/sql", prompt="Tell me about the sea.\n", stream=True, **at)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == whole.choices[0].text
    several = litellm.text_completion(model="text-completion-openai/sql", prompt=["One.\n", "Two.\n"], n=2, **{**at, "temperature": 1})
    assert len(several.choices) == 4


def test_parameters(at):
    given = {**at, "temperature": 1.2, "seed": 4, "n": 2, "top_p": 0.9, "stop": ["zzz"], "presence_penalty": 0.1, "frequency_penalty": 0.1,
             "logprobs": True, "top_logprobs": 2, "user": "someone"}
    first, second = (litellm.completion(model="openai/demo", messages=SEA, **given) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices] and len(first.choices) == 2
    assert len(first.choices[0].logprobs.content[0].top_logprobs) == 2
    shout = litellm.completion(model="openai/shout", messages=SEA, **at).choices[0].message.content
    assert litellm.completion(model="openai/demo", messages=SEA, extra_body={"adapter_id": "shout"}, **at).choices[0].message.content == shout
    assert litellm.completion(model="hosted_vllm/demo", messages=SEA, top_k=1, min_p=0.1, repetition_penalty=1.1, **at).choices


def test_errors(at, locked):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nobody", messages=SEA, **at)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model="openai/demo", messages=SEA, **{**at, "temperature": -1})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/demo", messages=SEA, **{**at, "max_tokens": 100_000})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model="openai/demo", messages=SEA, **{**at, "api_base": locked.v1, "api_key": "wrong"})


def test_a_router_falls_back(at):
    def deployment(name, model):
        return {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_base": at["api_base"], "api_key": at["api_key"]}}
    router = litellm.Router([deployment("first", "nobody"), deployment("second", "sql")], fallbacks=[{"first": ["second"]}], num_retries=0)
    reply = router.completion(model="first", messages=SEA, max_tokens=10, temperature=0)
    direct = litellm.completion(model="openai/sql", messages=SEA, **{**at, "max_tokens": 10})
    assert reply.choices[0].message.content == direct.choices[0].message.content


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_structured_output(at, provider):
    given = {**at, "max_tokens": 100}
    reply = litellm.completion(model=f"{provider}/demo", messages=SEA, response_format=Weather, **given)
    Weather.model_validate_json(reply.choices[0].message.content)
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema(), "strict": True}}
    stream = litellm.completion(model=f"{provider}/demo", messages=SEA, response_format=schema, stream=True, **given)
    Weather.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in stream))


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"])
def test_tools(at, provider, choice):
    given = {**at, "max_tokens": 100, "tools": [WEATHER], "tool_choice": choice}
    reply = litellm.completion(model=f"{provider}/demo", messages=SEA, **given)
    call = reply.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")
    chunks = list(litellm.completion(model=f"{provider}/demo", messages=SEA, stream=True, **given))
    streamed = litellm.stream_chunk_builder(chunks, messages=SEA).choices[0].message.tool_calls[0]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    turn = [*SEA, reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    assert litellm.completion(model=f"{provider}/demo", messages=turn, **{**at, "tools": [WEATHER]}).choices


def test_embeddings(at):
    where = {name: at[name] for name in ("api_base", "api_key")}
    for provider in ("openai", "hosted_vllm"):
        reply = litellm.embedding(model=f"{provider}/demo", input=["The sea.", "Coffee."], **where)
        assert len(reply.data) == 2 and len(reply.data[0]["embedding"]) > 1 and reply.usage.prompt_tokens > 0
    assert asyncio.run(litellm.aembedding(model="openai/demo", input="The sea.", **where)).data


def test_the_responses_api(at):
    where = {name: at[name] for name in ("api_base", "api_key", "temperature")}
    reply = litellm.responses(model="openai/demo", input="Tell me about the sea.", max_output_tokens=20, **where)
    assert reply.output[-1].content[0].text
    events = list(litellm.responses(model="openai/demo", input="Tell me about the sea.", max_output_tokens=20, stream=True, **where))
    assert "response.output_text.delta" in [event.type for event in events]
