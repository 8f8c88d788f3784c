"""`text-generation`, the client of TGI. Its `chat(stream=True)` cannot read `[DONE]`, TGI's own either, so it is not called."""

import asyncio
import json

import pytest
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType, Message, Tool

PROMPT = "Tell me about the sea."


@pytest.fixture
def client(server):
    return Client(server.url, timeout=60)


def test_generate_and_stream(server, client):
    whole = client.generate(PROMPT, max_new_tokens=10)
    events = list(client.generate_stream(PROMPT, max_new_tokens=10))
    assert "".join(event.token.text for event in events if not event.token.special) == whole.generated_text
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.generated_tokens == whole.details.generated_tokens == len(whole.details.tokens)
    assert whole.details.finish_reason in ("length", "eos_token") and whole.details.prefill == []

    async def ask():
        other = AsyncClient(server.url, timeout=60)
        text = (await other.generate(PROMPT, max_new_tokens=10)).generated_text
        return text, [event async for event in other.generate_stream(PROMPT, max_new_tokens=10)][-1].generated_text
    assert asyncio.run(ask()) == (whole.generated_text, whole.generated_text)


def test_every_parameter(client):
    given = dict(do_sample=True, max_new_tokens=6, repetition_penalty=1.1, frequency_penalty=0.1, return_full_text=True, seed=5,
                 stop_sequences=["zzz"], temperature=0.8, top_k=20, top_p=0.9, truncate=50)
    first = client.generate(PROMPT, decoder_input_details=True, top_n_tokens=3, **given)
    second = client.generate(PROMPT, **given)
    assert first.generated_text == second.generated_text and first.generated_text.startswith(PROMPT)
    assert first.details.seed == 5 and first.details.prefill[0].logprob is None
    assert all(len(top) >= 3 for top in first.details.top_tokens)
    events = list(client.generate_stream(PROMPT, top_n_tokens=2, **given))
    assert events[-1].generated_text == second.generated_text and all(len(event.top_tokens) >= 2 for event in events)
    best = client.generate(PROMPT, best_of=3, do_sample=True, max_new_tokens=6)
    assert len(best.details.best_of_sequences) == 2


def test_chat(client):
    given = dict(messages=[Message(role="user", content=PROMPT)], max_tokens=12, seed=1)
    first, second = client.chat(**given), client.chat(**given)
    assert first.choices[0].message.content == second.choices[0].message.content and first.model == "tgi"
    more = client.chat(**given, repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1, logprobs=True, top_logprobs=2, n=2,
                       temperature=0.9, top_p=0.9)
    assert len(more.choices) == 2 and len(more.choices[0].logprobs["content"][0]["top_logprobs"]) == 2

    async def ask():
        return await AsyncClient(client.base_url, timeout=60).chat(**given)
    assert asyncio.run(ask()).choices[0].message.content == first.choices[0].message.content


def test_errors(client):
    with pytest.raises(ValidationError, match="maximum context length"):
        client.generate(PROMPT, max_new_tokens=100_000)
    with pytest.raises(ValidationError, match="watermark"):
        client.generate(PROMPT, watermark=True)
    with pytest.raises(ValidationError):
        list(client.generate_stream(PROMPT, max_new_tokens=100_000))


SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"], "additionalProperties": False}


def test_grammars(client):
    text = client.generate(PROMPT, max_new_tokens=100, grammar=Grammar(type=GrammarType.Json, value=SCHEMA)).generated_text
    assert json.loads(text)["city"] in ("Oslo", "Paris")
    text = client.generate(PROMPT, max_new_tokens=100, grammar=Grammar(type=GrammarType.Regex, value="[a-f]{4}")).generated_text
    assert len(text) == 4
    events = list(client.generate_stream(PROMPT, max_new_tokens=100, grammar=Grammar(type=GrammarType.Json, value=SCHEMA)))
    assert json.loads(events[-1].generated_text)["city"] in ("Oslo", "Paris")


def test_tools(client):
    tool = Tool(type="function", function={"name": "get_weather", "description": "The weather.", "parameters": SCHEMA})
    reply = client.chat([Message(role="user", content=PROMPT)], max_tokens=100, tools=[tool], tool_choice="required")
    call = reply.choices[0].message.tool_calls[0]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Paris")
