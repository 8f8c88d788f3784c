"""`instructor`: typed replies, in each of its modes that our server takes part in."""

import asyncio
from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

ASK = [{"role": "user", "content": "How is the weather?"}]
GIVEN = dict(model="demo", max_tokens=200, temperature=0, max_retries=0)
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")  # otherwise there is no end to what a model may add
    city: Literal["Oslo", "Paris"]
    degrees: int = Field(ge=-50, le=50)


class Loose(BaseModel):
    """JSON mode promises JSON and no more."""
    city: object = None


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("mode", MODES)
def test_a_typed_reply(client, mode):
    typed = instructor.from_openai(client, mode=mode)
    for model in ("demo", "pirate"):
        assert isinstance(typed.chat.completions.create(response_model=Weather, messages=ASK, **{**GIVEN, "model": model}), Weather)
    weather, completion = typed.chat.completions.create_with_completion(response_model=Weather, messages=ASK, **GIVEN)
    assert isinstance(weather, Weather) and completion.usage.completion_tokens > 0


def test_json_mode(client):
    typed = instructor.from_openai(client, mode=instructor.Mode.JSON)
    assert isinstance(typed.chat.completions.create(response_model=Loose, messages=ASK, **GIVEN), Loose)


@pytest.mark.parametrize("mode", MODES)
def test_partial_replies_as_they_come(client, mode):
    typed = instructor.from_openai(client, mode=mode)
    parts = list(typed.chat.completions.create_partial(response_model=Weather, messages=ASK, **GIVEN))
    assert len(parts) > 1 and parts[-1].city in ("Oslo", "Paris") and isinstance(parts[-1].degrees, int)


def test_a_list_of_replies(client):
    class Weathers(BaseModel):
        model_config = ConfigDict(extra="forbid")
        reports: list[Weather] = Field(min_length=2, max_length=2)
    typed = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    assert len(typed.chat.completions.create(response_model=Weathers, messages=ASK, **GIVEN).reports) == 2


def test_asynchronous(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
            typed = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
            return await typed.chat.completions.create(response_model=Weather, messages=ASK, **GIVEN)
    assert isinstance(asyncio.run(ask()), Weather)


def test_from_provider(server):
    typed = instructor.from_provider("openai/demo", base_url=server.v1, api_key=server.key)
    given = {name: value for name, value in GIVEN.items() if name != "model"}
    assert isinstance(typed.chat.completions.create(response_model=Weather, messages=ASK, **given), Weather)


def test_a_plain_reply(client):
    typed = instructor.from_openai(client)
    reply = typed.chat.completions.create(response_model=None, messages=ASK, **{**GIVEN, "max_tokens": 10})
    assert reply.choices[0].message.content
