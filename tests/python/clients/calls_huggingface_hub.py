"""`huggingface_hub`: InferenceClient with `base_url`, its chat and its text generation, synchronous and not."""

import asyncio
import json

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

SEA = [{"role": "user", "content": "Tell me about the sea."}]
PROMPT = "Tell me about the sea."


@pytest.fixture
def client(server):
    return InferenceClient(base_url=server.v1, api_key=server.key, timeout=60)


@pytest.fixture
def generator(server):
    """Text generation is a POST to the base URL itself."""
    return InferenceClient(base_url=server.url, api_key=server.key, timeout=60)


def test_chat(client):
    unnamed = client.chat_completion(SEA, max_tokens=20, temperature=0)
    named = client.chat.completions.create(model="demo", messages=SEA, max_tokens=20, temperature=0)
    assert unnamed.choices[0].message.content == named.choices[0].message.content
    assert named.usage.total_tokens == named.usage.prompt_tokens + named.usage.completion_tokens and named.system_fingerprint
    pirate = client.chat_completion(SEA, model="pirate", max_tokens=20, temperature=0)
    by_body = client.chat_completion(SEA, max_tokens=20, temperature=0, extra_body={"adapter_id": "pirate"})
    assert named.choices[0].message.content != pirate.choices[0].message.content == by_body.choices[0].message.content


def test_every_parameter_of_a_chat(client):
    given = dict(frequency_penalty=0.1, logit_bias=None, logprobs=True, max_tokens=6, n=2, presence_penalty=0.1, seed=3, stop=["zzz"],
                 temperature=0.9, top_logprobs=2, top_p=0.9, stream_options=None)
    first, second = client.chat_completion(SEA, **given), client.chat_completion(SEA, **given)
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices] and len(first.choices) == 2
    assert len(first.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_stream_of_a_chat(client):
    whole = client.chat_completion(SEA, model="haiku", max_tokens=30, temperature=0)
    chunks = list(client.chat_completion(SEA, model="haiku", max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_text_generation(generator):
    text = generator.text_generation(PROMPT, max_new_tokens=10)
    whole = generator.text_generation(PROMPT, max_new_tokens=10, details=True, decoder_input_details=True)
    assert whole.generated_text == text and whole.details.finish_reason in ("length", "eos_token")
    assert len(whole.details.tokens) == whole.details.generated_tokens and whole.details.prefill[0].logprob is None
    assert "".join(generator.text_generation(PROMPT, max_new_tokens=10, stream=True)) == text
    events = list(generator.text_generation(PROMPT, max_new_tokens=10, stream=True, details=True))
    assert events[-1].generated_text == text and events[-1].details.generated_tokens == len(events)
    assert all(event.details is None for event in events[:-1])


def test_every_parameter_of_text_generation(generator):
    given = dict(do_sample=True, frequency_penalty=0.1, max_new_tokens=8, repetition_penalty=1.1, return_full_text=True, seed=4,
                 stop=["zzz"], temperature=0.8, top_k=20, top_n_tokens=2, top_p=0.9, truncate=40, details=True)
    first, second = generator.text_generation(PROMPT, **given), generator.text_generation(PROMPT, **given)
    assert first.generated_text == second.generated_text and first.generated_text.startswith(PROMPT)
    assert first.details.seed == 4 and all(len(top) >= 2 for top in first.details.top_tokens)
    best = generator.text_generation(PROMPT, best_of=3, do_sample=True, max_new_tokens=6, details=True)
    assert len(best.details.best_of_sequences) == 2
    plain, adapted = (generator.text_generation(PROMPT, max_new_tokens=20, adapter_id=name) for name in (None, "shout"))
    assert plain != adapted == adapted.upper()


def test_errors(client, generator):
    with pytest.raises(HfHubHTTPError) as caught:
        client.chat_completion(SEA, temperature=-1)
    assert caught.value.response.status_code == 400 and "`temperature` must be" in str(caught.value)
    with pytest.raises(HfHubHTTPError) as caught:
        client.chat_completion(SEA, model="nobody")
    assert caught.value.response.status_code == 404
    with pytest.raises(ValidationError, match="top_p"):
        generator.text_generation(PROMPT, top_p=7)


def test_the_asynchronous_client(server):
    async def ask():
        async with AsyncInferenceClient(base_url=server.v1, api_key="x", timeout=60) as client:
            whole = await client.chat_completion(SEA, model="sql", max_tokens=20, temperature=0)
            stream = await client.chat_completion(SEA, model="sql", max_tokens=20, temperature=0, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        async with AsyncInferenceClient(base_url=server.url, api_key="x", timeout=60) as client:
            text = await client.text_generation(PROMPT, max_new_tokens=8)
            texts = [piece async for piece in await client.text_generation(PROMPT, max_new_tokens=8, stream=True)]
        return whole.choices[0].message.content, "".join(pieces), text, "".join(texts)

    whole, pieces, text, texts = asyncio.run(ask())
    assert whole == pieces and text == texts


SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"], "additionalProperties": False}


def test_structured_output(client, generator):
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    reply = client.chat_completion(SEA, max_tokens=100, temperature=0, response_format=wanted)
    assert json.loads(reply.choices[0].message.content)["city"] in ("Oslo", "Paris")
    text = generator.text_generation(PROMPT, max_new_tokens=100, grammar={"type": "json", "value": SCHEMA})
    assert json.loads(text)["city"] in ("Oslo", "Paris")
    assert len(generator.text_generation(PROMPT, max_new_tokens=100, grammar={"type": "regex", "value": "[a-f]{4}"})) == 4


def test_tools(client):
    tool = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = client.chat_completion(SEA, max_tokens=100, temperature=0, tools=[tool], tool_choice=choice)
        call = reply.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")
        chunks = list(client.chat_completion(SEA, max_tokens=100, temperature=0, tools=[tool], tool_choice=choice, stream=True))
        parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
        assert json.loads("".join(part.function.arguments or "" for part in parts if part.index == 0)) == json.loads(call.function.arguments)
