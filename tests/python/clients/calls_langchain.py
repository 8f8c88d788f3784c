"""`langchain-openai`: chat models, completions, tools, structured output and embeddings."""

import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "Tell me about the sea."


@pytest.fixture
def chat(server):
    def make(model="demo", **given):
        return ChatOpenAI(model=model, base_url=server.v1, api_key=server.key, max_retries=0, **{"temperature": 0, "max_tokens": 20, **given})
    return make


class Weather(BaseModel):
    """The weather of a city."""
    model_config = ConfigDict(extra="forbid")  # otherwise there is no end to what a model may add
    city: Literal["Oslo", "Paris"]
    degrees: int = Field(ge=-50, le=50)


@tool
def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """Looks up the weather of a city."""
    return f"Rain in {city}."


def test_invoke_stream_and_batch(chat):
    model = chat("pirate")
    reply = model.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    assert reply.response_metadata["finish_reason"] in ("stop", "length")
    assert reply.usage_metadata["total_tokens"] == reply.usage_metadata["input_tokens"] + reply.usage_metadata["output_tokens"]
    alone = model.invoke(QUESTION).content
    chunks = list(model.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == alone
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 0
    assert [each.content for each in model.batch([QUESTION, QUESTION])] == [alone, alone]


def test_asynchronous(chat):
    model = chat("haiku")
    alone = model.invoke(QUESTION).content

    async def ask():
        whole = (await model.ainvoke(QUESTION)).content
        streamed = "".join([chunk.content async for chunk in model.astream(QUESTION)])
        several = [each.content for each in await model.abatch([QUESTION, QUESTION])]
        return whole, streamed, several
    assert asyncio.run(ask()) == (alone, alone, [alone, alone])


def test_a_chain_of_prompt_model_and_parser(chat):
    chain = ChatPromptTemplate.from_messages([("system", "You are a {kind}."), ("user", "{question}")]) | chat() | StrOutputParser()
    assert chain.invoke({"kind": "helper", "question": QUESTION})
    assert "".join(chain.stream({"kind": "helper", "question": QUESTION}))


def test_sampling_logprobs_and_more(chat):
    given = dict(temperature=1.2, seed=3, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.1, stop=["zzz"])
    assert chat(**given).invoke(QUESTION).content == chat(**given).invoke(QUESTION).content
    reply = chat(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert all(len(entry["top_logprobs"]) == 2 for entry in reply.response_metadata["logprobs"]["content"])
    assert len(chat(n=3, temperature=1).generate([[HumanMessage(QUESTION)]]).generations[0]) == 3
    assert chat(extra_body={"adapter_id": "shout"}).invoke(QUESTION).content == chat("shout").invoke(QUESTION).content
    assert chat(extra_body={"top_k": 1, "min_p": 0.1}).invoke(QUESTION).content


def test_completions(server):
    model = OpenAI(model="sql", base_url=server.v1, api_key=server.key, temperature=0, max_tokens=12, max_retries=0)
    alone = model.invoke(QUESTION)
    assert "".join(model.stream(QUESTION)) == alone
    assert model.batch([QUESTION, QUESTION]) == [alone, alone]
    assert asyncio.run(model.ainvoke(QUESTION)) == alone
    several = model.generate([QUESTION, "Describe coffee."])
    assert len(several.generations) == 2 and several.llm_output["token_usage"]["total_tokens"] > 0
    best = OpenAI(model="sql", base_url=server.v1, api_key=server.key, n=2, best_of=3, max_tokens=6, max_retries=0).generate([QUESTION])
    assert len(best.generations[0]) == 2


def test_errors(chat, locked):
    with pytest.raises(openai.NotFoundError):
        chat("nobody").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError):
        chat(temperature=-1).invoke(QUESTION)
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model="demo", base_url=locked.v1, api_key="wrong", max_retries=0).invoke(QUESTION)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    structured = chat(max_tokens=100).with_structured_output(Weather, method=method)
    for _ in range(2):
        assert isinstance(structured.invoke("How is the weather?"), Weather)
    raw = chat(max_tokens=100).with_structured_output(Weather, method=method, include_raw=True).invoke("How is the weather?")
    assert raw["parsing_error"] is None and isinstance(raw["parsed"], Weather)
    assert isinstance(list(structured.stream("How is the weather?"))[-1], Weather)


def test_json_mode(chat):
    schema = {"title": "Anything", "type": "object", "properties": {}}
    structured = chat(max_tokens=200).with_structured_output(schema, method="json_mode")
    assert isinstance(structured.invoke("Write JSON."), dict)


@pytest.mark.parametrize("choice", ["get_weather", "any"])
def test_tools_that_must_be_called(chat, choice):
    model = chat(max_tokens=100).bind_tools([get_weather], tool_choice=choice)
    reply = model.invoke("How is the weather?")
    (call,) = reply.tool_calls[:1]
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Oslo", "Paris") and call["id"]
    chunks = list(model.stream("How is the weather?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(c["name"], c["args"]) for c in reply.tool_calls]


def test_a_turn_with_tools(chat):
    call = {"name": "get_weather", "args": {"city": "Oslo"}, "id": "call_1"}
    answer = get_weather.invoke({"type": "tool_call", **call})
    assert isinstance(answer, ToolMessage)
    model = chat().bind_tools([get_weather])
    reply = model.invoke([HumanMessage("How is the weather in Oslo?"), AIMessage("", tool_calls=[call]), answer])
    assert reply.content or reply.tool_calls
    assert not chat().bind_tools([get_weather], tool_choice="none").invoke("How is the weather?").tool_calls


def test_embeddings(server):
    # Otherwise it cuts texts with a tokenizer that it downloads.
    model = OpenAIEmbeddings(model="demo", base_url=server.v1, api_key=server.key, check_embedding_ctx_length=False)
    first, second, again = model.embed_documents(["The sea is deep.", "Coffee is hot.", "The sea is deep."])
    assert first == again != second and len(first) == len(second)
    assert model.embed_query("The sea is deep.") == pytest.approx(first, abs=1e-6)
    assert asyncio.run(model.aembed_query("The sea is deep.")) == pytest.approx(first, abs=1e-6)


def test_the_responses_api(chat):
    model = chat(use_responses_api=True)
    reply = model.invoke(QUESTION)
    assert reply.text and reply.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == reply.text
    called = chat(use_responses_api=True, max_tokens=100).bind_tools([get_weather], tool_choice="get_weather").invoke("How is the weather?")
    assert called.tool_calls[0]["name"] == "get_weather"
