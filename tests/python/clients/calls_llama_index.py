"""`llama-index`: OpenAILike, its function calling and structured output, and OpenAIEmbedding."""

import asyncio
from typing import Literal

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "Tell me about the sea."
ASK = [ChatMessage(role="user", content=QUESTION)]


class Weather(BaseModel):
    """The weather of a city."""
    model_config = ConfigDict(extra="forbid")  # otherwise there is no end to what a model may add
    city: Literal["Oslo", "Paris"]
    degrees: int = Field(ge=-50, le=50)


def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """Looks up the weather of a city."""
    return f"Rain in {city}."


@pytest.fixture
def llm(server):
    def make(model="demo", **given):
        return OpenAILike(model=model, api_base=server.v1, api_key=server.key, max_retries=0, context_window=2048, **{
            "is_chat_model": True, "is_function_calling_model": True, "temperature": 0, "max_tokens": 20, **given})
    return make


def test_chat(llm):
    model = llm("pirate")
    whole = model.chat(ASK).message.content
    assert whole and whole != llm().chat(ASK).message.content
    assert [r.message.content for r in model.stream_chat(ASK)][-1] == whole
    assert "".join(r.delta or "" for r in model.stream_chat(ASK)) == whole

    async def ask():
        streamed = [r.message.content async for r in await model.astream_chat(ASK)]
        return (await model.achat(ASK)).message.content, streamed[-1]
    assert asyncio.run(ask()) == (whole, whole)


@pytest.mark.parametrize("is_chat_model", [True, False])
def test_complete(llm, is_chat_model):
    model = llm("sql", is_chat_model=is_chat_model)
    whole = model.complete(QUESTION).text
    assert whole and [r.text for r in model.stream_complete(QUESTION)][-1] == whole

    async def ask():
        return (await model.acomplete(QUESTION)).text, [r.text async for r in await model.astream_complete(QUESTION)][-1]
    assert asyncio.run(ask()) == (whole, whole)


def test_parameters(llm):
    given = dict(temperature=1.2, additional_kwargs={"seed": 5, "top_p": 0.9, "stop": ["zzz"], "extra_body": {"top_k": 50}})
    assert llm(**given).chat(ASK).message.content == llm(**given).chat(ASK).message.content
    assert llm(logprobs=True, top_logprobs=2).chat(ASK).raw.choices[0].logprobs.content
    by_body = llm(additional_kwargs={"extra_body": {"adapter_id": "shout"}}).chat(ASK).message.content
    assert by_body == llm("shout").chat(ASK).message.content


def test_errors(llm, locked):
    with pytest.raises(openai.NotFoundError):
        llm("nobody").chat(ASK)
    with pytest.raises(openai.BadRequestError):
        llm(additional_kwargs={"top_p": 7}).chat(ASK)
    with pytest.raises(openai.AuthenticationError):
        OpenAILike(model="demo", api_base=locked.v1, api_key="wrong", is_chat_model=True, max_retries=0).chat(ASK)


def test_function_calling(llm):
    tool = FunctionTool.from_defaults(get_weather)
    model = llm(max_tokens=100)
    reply = model.chat_with_tools([tool], user_msg="How is the weather?", tool_required=True)
    (call,) = model.get_tool_calls_from_response(reply)[:1]
    assert call.tool_name == "get_weather" and call.tool_kwargs["city"] in ("Oslo", "Paris")
    streamed = list(model.stream_chat_with_tools([tool], user_msg="How is the weather?", tool_required=True))[-1]
    assert [c.tool_kwargs for c in model.get_tool_calls_from_response(streamed)] == [
        c.tool_kwargs for c in model.get_tool_calls_from_response(reply)]
    assert "Rain in" in str(model.predict_and_call([tool], user_msg="How is the weather?", tool_required=True))


def test_structured_output(llm):
    model = llm(max_tokens=100)
    assert isinstance(model.as_structured_llm(Weather).complete("How is the weather?").raw, Weather)
    assert isinstance(model.structured_predict(Weather, PromptTemplate("How is the weather in {place}?"), place="Oslo"), Weather)
    enforced = llm(max_tokens=100, should_use_structured_outputs=True)
    assert isinstance(enforced.structured_predict(Weather, PromptTemplate("How is the weather in {place}?"), place="Oslo"), Weather)


def test_embeddings(server):
    model = OpenAIEmbedding(model_name="demo", api_base=server.v1, api_key=server.key, max_retries=0)
    first, second = model.get_text_embedding_batch(["The sea is deep.", "Coffee is hot."])
    assert first != second and model.get_text_embedding("The sea is deep.") == pytest.approx(first, abs=1e-6)
    assert model.get_query_embedding("The sea is deep.") == pytest.approx(first, abs=1e-6)
    assert asyncio.run(model.aget_text_embedding("The sea is deep.")) == pytest.approx(first, abs=1e-6)
