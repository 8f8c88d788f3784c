"""The official `openai` package against a running server: sync, async, streamed and not, base and adapters."""

import asyncio
import re
import time

import openai
import pytest

from conftest import ADAPTERS, MODELS
from wire import chat, check_error, check_reply, check_schema, complete, post_stream

SEA = "Tell me about the sea."
PROMPT = SEA + "\n"

# What marks each adapter's answer; the base's has none of the marks.
STYLE = {
    "pirate": lambda text: re.search(r"\b(arr|matey|ahoy|hearty|aye|ye|yo ho|timbers|an')\b", text.lower()),
    "haiku": lambda text: len(text.strip().splitlines()) == 3,
    "sql": lambda text: re.search(r"\b(SELECT|INSERT|DELETE)\b.*;", text, re.S),
    "shout": lambda text: text == text.upper() and text != text.lower(),
}


def reply_of(obj) -> dict:
    """What the client library received: members it did not receive are not in it."""
    return check_reply(obj.to_dict())


def assert_style(model: str, text: str):
    found = [name for name, has_style in STYLE.items() if has_style(text)]
    assert found == ([] if model == "demo" else [model]), (model, text)


@pytest.mark.parametrize("model", MODELS)
def test_each_model_answers_in_its_own_style(client, model):
    for question in (SEA, "What is a dragon?", "Describe coffee."):
        chat_reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=80)
        reply_of(chat_reply)
        assert chat_reply.choices[0].finish_reason == "stop"
        assert_style(model, chat_reply.choices[0].message.content)
        completion = client.completions.create(model=model, prompt=question + "\n", temperature=0, max_tokens=80)
        reply_of(completion)
        assert_style(model, completion.choices[0].text)
        assert chat_reply.model == completion.model == model


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_reply_says(client, model):
    arguments = dict(model=model, temperature=0.7, seed=11, max_tokens=60)
    whole = client.completions.create(prompt=PROMPT, **arguments).choices[0]
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **arguments))
    for chunk in chunks:
        check_reply(chunk.to_dict(), chunk=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len(chunks) > 3, "one chunk is no stream"

    messages = [{"role": "user", "content": SEA}]
    whole = client.chat.completions.create(messages=messages, **arguments).choices[0]
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **arguments))
    for chunk in chunks:
        check_reply(chunk.to_dict(), chunk=True)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert not chunks[-1].choices[0].delta.content


def test_the_async_client_works_as_the_sync_one(demo, client):
    arguments = dict(model="sql", prompt=PROMPT, temperature=0, max_tokens=40)
    expected = client.completions.create(**arguments).choices[0].text

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{demo.base}/v1", api_key="EMPTY", max_retries=0) as asynchronous:
            whole = await asynchronous.completions.create(**arguments)
            stream = await asynchronous.completions.create(stream=True, **arguments)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == (expected, expected)


def test_64_parallel_streams_over_all_models_equal_their_solo_runs(demo):
    """Every fourth one greedy, the others sampled with their own seed; some as chat."""
    questions = [SEA, "What is a dragon?", "Describe coffee.", "Hello!", "What do you know about a train?", "Explain the moon."]

    def case(i: int) -> dict:
        common = dict(model=MODELS[i % len(MODELS)], temperature=0 if i % 4 == 0 else 0.9, seed=1000 + i,
                      max_tokens=40 + i % 7 * 8)
        question = questions[i % len(questions)]
        if i % 3 == 0:
            return dict(common, messages=[{"role": "user", "content": question}])
        return dict(common, prompt=question + "\n", extra_body={"ignore_eos": i % 2 == 0})

    async def run(client, arguments):
        create = (client.chat if "messages" in arguments else client).completions.create
        pieces, finish = [], None
        async for chunk in await create(stream=True, **arguments):
            check_reply(chunk.to_dict(), chunk=True)
            choice = chunk.choices[0]
            pieces.append(choice.delta.content or "" if "messages" in arguments else choice.text)
            finish = choice.finish_reason or finish
        return "".join(pieces), finish

    async def compare():
        async with openai.AsyncOpenAI(base_url=f"{demo.base}/v1", api_key="EMPTY", max_retries=0, timeout=120) as client:
            solo = [await run(client, case(i)) for i in range(64)]
            together = await asyncio.gather(*(run(client, case(i)) for i in range(64)))
        return solo, together

    solo, together = asyncio.run(compare())
    different = [(i, case(i)["model"], alone, shared) for i, (alone, shared) in enumerate(zip(solo, together)) if alone != shared]
    assert not different, f"{len(different)} of 64 differ, first: {different[0]}"
    assert len({text for text, _ in solo}) > 20, "the cases are too alike to prove anything"


def test_n_gives_distinct_reproducible_choices(client):
    arguments = dict(model="pirate", prompt=PROMPT, n=3, temperature=1.0, seed=5, max_tokens=24)
    first = reply_of(client.completions.create(**arguments))
    second = reply_of(client.completions.create(**arguments))
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) > 1
    alone = client.completions.create(**{**arguments, "n": 1})
    assert first["usage"]["prompt_tokens"] == alone.usage.prompt_tokens, "the prompt counts once"


def test_n_choices_of_a_stream_equal_those_of_the_reply(demo):
    arguments = dict(model="haiku", prompt=PROMPT, n=3, temperature=1.0, seed=5, max_tokens=24)
    whole = complete(demo.http, **arguments)
    stream = post_stream(demo.http, "/v1/completions", **arguments)
    for index, choice in enumerate(whole["choices"]):
        assert (stream.text(index), stream.finish_reason(index)) == (choice["text"], choice["finish_reason"])


def test_greedy_choices_of_one_prompt_are_equal(demo):
    texts = [choice["text"] for choice in complete(demo.http, model="sql", prompt=PROMPT, n=2, temperature=0, max_tokens=20)["choices"]]
    assert texts[0] == texts[1]


def test_a_seed_fixes_the_text_and_no_seed_does_not(demo):
    def text(**more):
        return complete(demo.http, model="demo", prompt="Once upon a time", temperature=1.5, max_tokens=32, **more)["choices"][0]["text"]
    assert text(seed=3) == text(seed=3)
    assert len({text(seed=seed) for seed in range(5)}) > 1
    assert len({text() for _ in range(5)}) > 1
    assert text(seed=-(2**63)) == text(seed=-(2**63))


def test_completion_logprobs_have_openais_shape(client):
    reply = client.completions.create(model="sql", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=3)
    choice = reply_of(reply)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"])
    assert len(logprobs["tokens"]) == reply.usage.completion_tokens
    assert "".join(logprobs["tokens"]).startswith(choice["text"])
    for token, logprob, top, offset in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))):
        assert logprob <= 0 and 1 <= len(top) <= 4, "tokens of half a scalar may share one text"
        assert top[token] == logprob == max(top.values()), "greedy takes the best"
        assert choice["text"][offset:].startswith(token) or offset == len(choice["text"])


def test_chat_logprobs_have_openais_shape(client):
    reply = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": SEA}], temperature=0, max_tokens=12, logprobs=True, top_logprobs=4)
    choice = reply_of(reply)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == reply.usage.completion_tokens
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 4
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert [alternative["logprob"] for alternative in entry["top_logprobs"]] == sorted(
            (alternative["logprob"] for alternative in entry["top_logprobs"]), reverse=True)
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode()
    assert text.startswith(choice["message"]["content"])


def test_streamed_logprobs_equal_those_of_the_reply(demo):
    arguments = dict(model="pirate", prompt=PROMPT, temperature=0, max_tokens=10, logprobs=2)
    whole = complete(demo.http, **arguments)["choices"][0]["logprobs"]
    stream = post_stream(demo.http, "/v1/completions", **arguments)
    for member in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for c in stream.choices() if c["logprobs"] for x in c["logprobs"][member]] == whole[member], member


def test_echo_returns_the_prompt_and_its_logprobs(client):
    reply = reply_of(client.completions.create(model="demo", prompt=PROMPT, echo=True, logprobs=1, temperature=0, max_tokens=4))
    choice = reply["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(PROMPT) and len(choice["text"]) > len(PROMPT)
    assert logprobs["token_logprobs"][0] is None and all(x <= 0 for x in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == reply["usage"]["total_tokens"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][0] == 0


def test_scoring_a_text_generates_nothing(demo):
    """`echo`, `logprobs` and `max_tokens` 0: how evaluation harnesses ask for likelihoods."""
    reply = complete(demo.http, model="sql", prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    choice = reply["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0
    longer = complete(demo.http, model="sql", prompt=PROMPT, echo=True, logprobs=1, max_tokens=5, temperature=0)["choices"][0]
    assert longer["logprobs"]["token_logprobs"][: len(choice["logprobs"]["tokens"])] == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("model", ["demo", "shout"])
def test_a_stop_string_ends_the_text_before_it(demo, model):
    arguments = dict(model=model, prompt=PROMPT, temperature=0, max_tokens=60)
    full = complete(demo.http, **arguments)["choices"][0]["text"]
    assert len(full) > 30
    for start, length in [(12, 1), (10, 5), (17, 9)]:  # within a token, across tokens
        stop = full[start:start + length]
        expected = full[:full.index(stop)]
        choice = complete(demo.http, **arguments, stop=[stop, "never there"])["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop"), stop
        assert choice["stop_reason"] == stop
        stream = post_stream(demo.http, "/v1/completions", **arguments, stop=stop)
        assert (stream.text(), stream.finish_reason()) == (expected, "stop"), stop
        kept = complete(demo.http, **arguments, stop=stop, include_stop_str_in_output=True)["choices"][0]
        assert kept["text"] == expected + stop
        with_logprobs = complete(demo.http, **arguments, stop=stop, logprobs=1)["choices"][0]
        offsets = with_logprobs["logprobs"]["text_offset"]
        assert with_logprobs["text"] == expected and offsets == sorted(offsets) and offsets[0] == 0
        assert offsets[-1] < len(expected) + len(stop), "the last token completed the stop string, so it starts within it"


def test_a_stop_token_ends_the_text(demo):
    arguments = dict(model="demo", prompt=PROMPT, temperature=0, max_tokens=30, return_token_ids=True)
    ids = complete(demo.http, **arguments)["choices"][0]["token_ids"]
    stop = ids[5]
    choice = complete(demo.http, **arguments, stop_token_ids=[stop])["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    assert choice["token_ids"][:ids.index(stop)] == ids[:ids.index(stop)] and len(choice["token_ids"]) <= ids.index(stop) + 1


def test_chat_stops_at_a_string_too(client):
    arguments = dict(model="sql", messages=[{"role": "user", "content": SEA}], temperature=0, max_tokens=60)
    full = client.chat.completions.create(**arguments).choices[0].message.content
    assert "FROM" in full
    reply = client.chat.completions.create(**arguments, stop="FROM")
    assert reply.choices[0].message.content == full[:full.index("FROM")] and reply.choices[0].finish_reason == "stop"


def test_usage_counts_what_was_said(demo, client):
    reply = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=7, extra_body={"ignore_eos": True, "return_token_ids": True})
    body = reply_of(reply)
    assert reply.usage.completion_tokens == 7 == len(body["choices"][0]["token_ids"])
    prompt_ids = body.get("prompt_token_ids") or body["choices"][0]["prompt_token_ids"]
    assert reply.usage.prompt_tokens == len(prompt_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 7
    assert reply.choices[0].finish_reason == "length"
    assert 0 <= body["usage"]["prompt_tokens_details"]["cached_tokens"] < reply.usage.prompt_tokens
    assert "usage" not in post_stream(demo.http, "/v1/completions", model="demo", prompt=PROMPT, max_tokens=3).chunks[-1]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_stream_options_give_usage_at_the_end_or_all_along(demo, route):
    what = {"prompt": PROMPT} if route == "completions" else {"messages": [{"role": "user", "content": SEA}]}
    arguments = dict(model="demo", temperature=0, max_tokens=6, ignore_eos=True, **what)
    stream = post_stream(demo.http, f"/v1/{route}", **arguments, stream_options={"include_usage": True})
    *others, last = stream.chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 6
    assert all(chunk["usage"] is None for chunk in others), "null until the last chunk"
    stream = post_stream(demo.http, f"/v1/{route}", **arguments,
                         stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream.chunks]
    assert counts == sorted(counts) and counts[-1] == 6


def test_models_are_listed_and_retrieved(demo, client):
    body = demo.http.get("/v1/models").json()
    check_schema("ListModelsResponse", body)
    cards = {card["id"]: card for card in body["data"]}
    assert list(cards)[0] == "demo" and set(MODELS) <= set(cards)
    assert "parent" not in cards["demo"]
    for name in ADAPTERS:
        assert cards[name]["parent"] == "demo"
    assert {model.id for model in client.models.list()} == set(cards)
    for name in MODELS:
        card = client.models.retrieve(name).to_dict()
        check_schema("Model", card)
        assert card["id"] == name and card["owned_by"] == "loramux" and card["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_token_ids_are_as_good_as_text(demo, client):
    arguments = dict(model="haiku", temperature=0, max_tokens=30)
    by_text = complete(demo.http, prompt=PROMPT, return_token_ids=True, **arguments)
    ids = by_text.get("prompt_token_ids") or by_text["choices"][0]["prompt_token_ids"]
    by_ids = client.completions.create(prompt=ids, **arguments)
    assert by_ids.choices[0].text == by_text["choices"][0]["text"]
    assert by_ids.usage.prompt_tokens == len(ids)


def test_a_list_of_prompts_gives_choices_in_its_order(client):
    prompts = [PROMPT, "What is a dragon?\n", "Describe coffee.\n"]
    arguments = dict(model="shout", temperature=0, max_tokens=16)
    alone = [client.completions.create(prompt=prompt, **arguments) for prompt in prompts]
    together = client.completions.create(prompt=prompts, **arguments)
    reply_of(together)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [reply.choices[0].text for reply in alone]
    assert together.usage.prompt_tokens == sum(reply.usage.prompt_tokens for reply in alone)
    twice = client.completions.create(prompt=prompts, n=2, **arguments)
    assert [c.text for c in twice.choices] == [c.text for c in together.choices for _ in range(2)], "prompt-major, then n"


def test_logit_bias_forces_and_bans(demo):
    arguments = dict(model="demo", prompt=PROMPT, temperature=0, max_tokens=4, return_token_ids=True)
    first = complete(demo.http, **arguments)["choices"][0]["token_ids"][0]
    forced = complete(demo.http, **arguments, logit_bias={"100": 100})["choices"][0]["token_ids"]
    assert set(forced) == {100}
    assert first not in complete(demo.http, **arguments, logit_bias={str(first): -100})["choices"][0]["token_ids"]


def test_penalties_weigh_what_they_say(demo):
    """Of two allowed tokens, a bias lets `a` lead by exactly 1 after it was generated once: 2 turns the choice, 0.5 does not."""
    prompt = demo.http.post("/tokenize", json={"model": "demo", "prompt": PROMPT}).json()["tokens"]

    def raw_logprob(ids, token):
        reply = complete(demo.http, model="demo", prompt=ids, max_tokens=1, allowed_token_ids=[token], logprobs=0, ignore_eos=True)
        return reply["choices"][0]["logprobs"]["token_logprobs"][0]

    def lead(ids, a, b):
        return raw_logprob(ids, a) - raw_logprob(ids, b)

    pairs = [(a, b) for a in range(300, 320) for b in (a + 40,)]
    a, b, bias = next((a, b, second - 1) for a, b in pairs
                      for first, second in [(lead(prompt, a, b), lead(prompt + [a], a, b))] if first > second)

    def ids(**more):
        return complete(demo.http, model="demo", prompt=prompt, temperature=0, max_tokens=2, allowed_token_ids=[a, b], ignore_eos=True,
                        logit_bias={str(b): bias}, return_token_ids=True, **more)["choices"][0]["token_ids"]

    assert ids() == [a, a]
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert ids(**{penalty: 0.5}) == [a, a], penalty
        assert ids(**{penalty: 2}) == [a, b], penalty


def test_penalties_change_a_repetitive_text(demo):
    arguments = dict(model="demo", prompt=PROMPT, temperature=0, max_tokens=80, ignore_eos=True)
    plain = complete(demo.http, **arguments)["choices"][0]["text"]
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}, {"frequency_penalty": -2}):
        assert complete(demo.http, **arguments, **penalty)["choices"][0]["text"] != plain, penalty


def test_top_k_1_and_top_p_0_are_greedy(demo):
    arguments = dict(model="pirate", prompt=PROMPT, max_tokens=20)
    greedy = complete(demo.http, temperature=0, **arguments)["choices"][0]["text"]
    for setting in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert complete(demo.http, temperature=1.5, seed=1, **arguments, **setting)["choices"][0]["text"] == greedy, setting


def test_ignore_eos_and_min_tokens_reach_their_counts(demo):
    ended = complete(demo.http, model="sql", prompt=PROMPT, temperature=0, max_tokens=90)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] < 90
    longer = complete(demo.http, model="sql", prompt=PROMPT, temperature=0, max_tokens=90, ignore_eos=True)
    assert longer["usage"]["completion_tokens"] == 90 and longer["choices"][0]["finish_reason"] == "length"
    minimum = ended["usage"]["completion_tokens"] + 5
    at_least = complete(demo.http, model="sql", prompt=PROMPT, temperature=0, max_tokens=90, min_tokens=minimum)
    assert at_least["usage"]["completion_tokens"] >= minimum


def test_an_adapter_scaled_to_zero_is_the_base(demo):
    arguments = dict(prompt=PROMPT, temperature=0, max_tokens=20)
    base = complete(demo.http, model="demo", **arguments)["choices"][0]["text"]
    assert complete(demo.http, model="shout", adapter_scale=0, **arguments)["choices"][0]["text"] == base
    assert complete(demo.http, model="shout", **arguments)["choices"][0]["text"] != base


def test_adapter_id_and_base_colon_name_choose_the_adapter_too(demo):
    arguments = dict(prompt=PROMPT, temperature=0, max_tokens=20)
    expected = complete(demo.http, model="shout", **arguments)["choices"][0]["text"]
    assert complete(demo.http, model="demo:shout", **arguments)["choices"][0]["text"] == expected
    assert complete(demo.http, model="demo", adapter_id="shout", **arguments)["choices"][0]["text"] == expected


def test_a_composition_is_the_weighted_sum_of_its_parts(demo):
    def logprobs(**how):
        reply = complete(demo.http, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=5, ignore_eos=True, **{"model": "demo", **how})
        return reply["choices"][0]["logprobs"]
    def sql_and(name, weight):
        return [{"adapter": "sql", "weight": 0.5}, {"adapter": name, "weight": weight}]
    sql, half = logprobs(model="sql"), logprobs(model="sql", adapter_scale=0.5)
    assert logprobs(compose=[{"adapter": "sql", "weight": 1}]) == sql != half
    assert logprobs(compose=[{"adapter": "sql", "weight": 0.5}]) == half
    assert logprobs(compose=sql_and("sql", 0.5)) == sql
    assert logprobs(compose=sql_and("pirate", 0)) == half
    mixed = logprobs(compose=sql_and("pirate", 0.5))
    assert mixed not in (sql, half, logprobs(), logprobs(model="pirate", adapter_scale=0.5))
    turned = logprobs(compose=sql_and("pirate", 0.5)[::-1])
    assert turned["tokens"] == mixed["tokens"]
    assert turned["token_logprobs"] == pytest.approx(mixed["token_logprobs"], abs=1e-3), "the order is rounding only"


def test_fan_out_gives_one_choice_for_each_adapter(demo):
    """`adapters`: one prompt, the base and several adapters, a scaled one and a composition, each as if asked alone."""
    arguments = dict(prompt=PROMPT, temperature=0, max_tokens=20)
    parts = [{"adapter": "sql", "weight": 0.5}, {"adapter": "pirate", "weight": 0.5}]
    reply = complete(demo.http, model="demo", adapters=["base", "shout", {"adapter": "sql", "scale": 0.5}, {"compose": parts}], **arguments)
    alone = [dict(model="demo"), dict(model="shout"), dict(model="sql", adapter_scale=0.5), dict(model="demo", compose=parts)]
    assert [choice["text"] for choice in reply["choices"]] == [
        complete(demo.http, **one, **arguments)["choices"][0]["text"] for one in alone]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["adapter"] for choice in reply["choices"]][:3] == ["base", "shout", "sql"]
    twice = complete(demo.http, model="demo", adapters=["base", "shout"], n=2, **arguments)
    assert [choice["adapter"] for choice in twice["choices"]] == ["base", "base", "shout", "shout"], "adapter-major, then n"
    stream = post_stream(demo.http, "/v1/completions", model="demo", adapters=["base", "shout"], **arguments)
    assert [stream.text(0), stream.text(1)] == [choice["text"] for choice in reply["choices"]][:2]


def test_best_of_keeps_the_likeliest(demo):
    arguments = dict(model="demo", prompt="Once upon a time", temperature=1.2, seed=9, max_tokens=12, logprobs=0)
    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])
    every = complete(demo.http, n=6, **arguments)
    best = complete(demo.http, n=2, best_of=6, **arguments)
    expected = sorted(every["choices"], key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in expected]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"], "all of them were generated"


def test_prompt_logprobs_are_those_of_echo(demo):
    arguments = dict(model="sql", prompt=PROMPT, temperature=0, max_tokens=1)
    echoed = complete(demo.http, echo=True, logprobs=2, **arguments)["choices"][0]["logprobs"]
    prompt_logprobs = complete(demo.http, prompt_logprobs=2, **arguments)["choices"][0]["prompt_logprobs"]
    assert prompt_logprobs[0] is None and len(prompt_logprobs) == len(echoed["tokens"]) - 1
    for entry, expected in list(zip(prompt_logprobs, echoed["token_logprobs"]))[1:]:
        assert expected in [candidate["logprob"] for candidate in entry.values()]


def test_truncation_keeps_the_end_of_the_prompt(demo):
    arguments = dict(model="demo", temperature=0, max_tokens=12, return_token_ids=True)
    whole = complete(demo.http, prompt="One two three four. " + PROMPT, truncate_prompt_tokens=5, **arguments)
    ids = whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"]
    assert len(ids) == 5 == whole["usage"]["prompt_tokens"]
    assert complete(demo.http, prompt=ids, **arguments)["choices"][0]["text"] == whole["choices"][0]["text"]


def test_continue_final_message_goes_on_where_it_ended(demo):
    body = dict(model="demo", temperature=0, max_tokens=40)
    full = chat(demo.http, SEA, **body)["choices"][0]["message"]["content"]
    start = full[:len(full) // 2].rsplit(" ", 1)[0]
    answer = demo.http.post("/v1/chat/completions", json={
        **body, "messages": [{"role": "user", "content": SEA}, {"role": "assistant", "content": start}],
        "continue_final_message": True, "add_generation_prompt": False})
    assert answer.status_code == 200, answer.text
    assert start + check_reply(answer.json())["choices"][0]["message"]["content"] == full


def test_the_first_served_model_answers_when_none_is_named(demo):
    arguments = dict(prompt=PROMPT, temperature=0, max_tokens=20)
    named = complete(demo.http, model="demo", **arguments)
    for absent in ({}, {"model": ""}, {"model": None}):
        reply = complete(demo.http, **absent, **arguments)
        assert reply["model"] == "demo" and reply["choices"][0]["text"] == named["choices"][0]["text"]


def test_unknown_fields_and_accepted_unused_ones_change_nothing(demo):
    arguments = dict(model="demo", prompt=PROMPT, temperature=0, max_tokens=12)
    plain = complete(demo.http, **arguments)["choices"][0]["text"]
    more = dict(user="me", metadata={"a": "b"}, store=False, service_tier="auto", an_invention_of_2031={"x": 1}, request_id="twice")
    assert complete(demo.http, **arguments, **more)["choices"][0]["text"] == plain
    assert complete(demo.http, **arguments, stop=None, logprobs=None, seed=None, stream=None)["choices"][0]["text"] == plain


def test_system_and_multi_turn_chats_and_content_parts_work(demo):
    turns = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello!"},
             {"role": "assistant", "content": "Hello! What would you like to hear about?"}]
    def ask(content):
        answer = demo.http.post("/v1/chat/completions", json={
            "model": "demo", "messages": [*turns, {"role": "user", "content": content}], "temperature": 0, "max_tokens": 40})
        assert answer.status_code == 200, answer.text
        return check_reply(answer.json())["choices"][0]["message"]["content"]
    assert ask(SEA) == ask([{"type": "text", "text": SEA}])
    assert ask(SEA) != ask("What is a dragon?")


def test_reply_headers_name_the_request_and_the_model(demo):
    started = int(time.time())
    answer = demo.http.post("/v1/completions", headers={"x-request-id": "my.request-1"},
                            json={"model": "sql", "prompt": PROMPT, "max_tokens": 2})
    assert answer.headers["x-request-id"] == "my.request-1"
    assert answer.headers["x-model-id"] == "demo" and answer.headers["x-adapter-id"] == "sql"
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-adapter-content-id"])
    assert started - 1 <= answer.json()["created"] <= time.time() + 1
    replaced = demo.http.get("/v1/models", headers={"x-request-id": "not good!"}).headers["x-request-id"]
    assert replaced != "not good!" and re.fullmatch("[A-Za-z0-9._-]{1,128}", replaced)


def test_errors_are_the_clients_exceptions(demo, client, start_server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert caught.value.code == "model_not_found" and caught.value.type == "invalid_request_error"
    check_error({"error": caught.value.body})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}], temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    assert str(caught.value.body["message"]) == "`temperature` must be a finite number >= 0; got -1"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="x", max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    locked = start_server(api_key="right-key")
    with openai.OpenAI(base_url=f"{locked.base}/v1", api_key="wrong-key", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{locked.base}/v1", api_key="right-key", max_retries=0) as friend:
        assert friend.completions.create(model="demo", prompt="Hello!\n", max_tokens=3).usage.completion_tokens > 0


def test_chat_helper_reply_is_valid_for_every_model(demo):
    for model in MODELS:
        assert chat(demo.http, "Hello!", model=model, max_tokens=20)["choices"][0]["message"]["role"] == "assistant"
