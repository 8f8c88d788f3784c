"""What one request gets never depends on another: caches, chunked prefill, shared prompts, partial characters."""

import asyncio
import json
import random

import httpx
import pytest

from adapter_files import write_random_adapter
from conftest import MODELS
from loramux_server import REPOSITORY, Server
from wire import complete, post_stream

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
SEED = 7


def together(server, bodies: list[dict], timeout_s: float = 240) -> list:
    """All requests at once; token ids, or the error's text."""
    async def ask():
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(base_url=server.base, timeout=timeout_s, limits=limits, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        return [[choice["token_ids"] for choice in answer.json()["choices"]] if answer.status_code == 200 else answer.text
                for answer in answers]
    return asyncio.run(ask())


@pytest.fixture(scope="module")
def uncached(data_dir):
    """The reference: no prefix cache, one sequence at a time."""
    with Server("--prefix-caching", "false", "--max-num-seqs", "1", data_dir=data_dir) as server:
        yield server


def test_a_shared_prefix_is_shared_only_within_its_adapter_and_scale(start_server, uncached):
    """A 600-token prefix under base, every adapter, other scales and a composition, in turns: the cache must tell them apart."""
    rng = random.Random(SEED)
    prefix = [rng.randrange(300, 2000) for _ in range(600)]
    variants = [dict(model=model) for model in MODELS]
    variants += [dict(model="sql", adapter_scale=0.5), dict(model="sql", adapter_scale=-1), dict(model="demo", cache_salt="mine"),
                 dict(model="demo", compose=[{"adapter": "sql", "weight": 0.5}, {"adapter": "pirate", "weight": 0.5}])]
    bodies = [dict(variant, prompt=prefix + [400 + turn], temperature=0, max_tokens=8, ignore_eos=True, return_token_ids=True)
              for turn in range(3) for variant in variants]
    expected = [[complete(uncached.http, **body)["choices"][0]["token_ids"]] for body in bodies]
    server = start_server()
    one_by_one = [[complete(server.http, **body)["choices"][0]["token_ids"]] for body in bodies]
    assert one_by_one == expected
    assert together(server, bodies) == expected
    assert server.metric("vllm:prefix_cache_hits_total") > 0, "nothing was shared, so nothing was shown"
    repeated = complete(server.http, **bodies[0])
    assert repeated["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
    salted = complete(server.http, **{**bodies[0], "cache_salt": "never used before"})
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_prefix_cache_does_not_outlive_an_adapters_content(start_server, tmp_path):
    """Same name, same prompt, new content: nothing of the old keys and values may be used."""
    for name, seed in (("moving", 1), ("next", 2)):
        write_random_adapter(tmp_path / name, MODEL_CONFIG, 8, seed=seed, gain=2)
    server = start_server("--adapter-dir", str(tmp_path))
    body = dict(prompt=[random.Random(SEED).randrange(300, 2000) for _ in range(500)], temperature=0, max_tokens=12, ignore_eos=True,
                return_token_ids=True)
    expected = complete(server.http, model="next", **body)["choices"][0]["token_ids"]
    old = complete(server.http, model="moving", **body)["choices"][0]["token_ids"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "next" / name).rename(tmp_path / "moving" / name)
    new = complete(server.http, model="moving", **body)["choices"][0]["token_ids"]
    assert new == expected != old


def test_keys_do_not_share_a_prefix_cache(start_server):
    server = start_server("--api-key", "one,two")
    body = dict(model="demo", prompt=list(range(300, 700)), temperature=0, max_tokens=1)
    def cached(key):
        answer = server.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached("one") == 0 and cached("one") >= 384
    assert cached("two") == 0 and cached("two") >= 384


@pytest.mark.parametrize("step_tokens", ["64", "2048"])
def test_long_prompts_in_pieces_equal_whole_ones(start_server, uncached, step_tokens):
    """Prompts of every length up to the context, cut into steps of 64 positions beside decodes."""
    rng = random.Random(SEED)
    lengths = [1, 15, 16, 17, 63, 64, 65, 500, 1000, 2000, 2032]
    bodies = [dict(model=MODELS[i % len(MODELS)], prompt=[rng.randrange(300, 2000) for _ in range(length)], temperature=0, max_tokens=16,
                   ignore_eos=True, return_token_ids=True) for i, length in enumerate(lengths)]
    expected = [[complete(uncached.http, **body)["choices"][0]["token_ids"]] for body in bodies]
    server = start_server("--max-num-batched-tokens", step_tokens, "--max-num-seqs", "16")
    assert together(server, bodies) == expected


def test_choices_that_share_a_prompt_do_not_share_what_follows(start_server, uncached):
    """n > 1 copies blocks on write; choice i of seed s is the only choice of seed s + i, at every phase of the last block."""
    server = start_server()
    for length in (15, 16, 17, 31, 32):
        body = dict(model="pirate", prompt=list(range(500, 500 + length)), temperature=1.0, max_tokens=24, ignore_eos=True, return_token_ids=True)
        choices = complete(server.http, **body, n=4, seed=30)["choices"]
        alone = [complete(uncached.http, **body, seed=30 + i)["choices"][0]["token_ids"] for i in range(4)]
        assert [choice["token_ids"] for choice in choices] == alone, length


def test_streams_hold_back_half_characters(demo):
    """Hot sampling gives broken UTF-8; what is streamed is whole characters and adds up to the reply."""
    for seed in range(12):
        body = dict(model="demo", prompt="🌊 The sea", temperature=3.0, seed=seed, max_tokens=80, ignore_eos=True, skip_special_tokens=seed % 2 == 0)
        whole = complete(demo.http, **body)["choices"][0]["text"]
        stream = post_stream(demo.http, "/v1/completions", **body)
        assert stream.text() == whole, f"seed {seed}"


def test_any_stop_string_cuts_streams_and_replies_at_the_same_place(demo):
    """Substrings of the text itself, within and across tokens, alone and with decoys that share their start."""
    rng = random.Random(SEED)
    for round_number in range(30):
        body = dict(model=rng.choice(MODELS), prompt="What is a dragon?\n", temperature=1.0, seed=round_number, max_tokens=48, ignore_eos=True)
        full = complete(demo.http, **body)["choices"][0]["text"]
        start = rng.randrange(len(full) - 1)
        stop = full[start:start + rng.randrange(1, 12)]
        stops = [stop, stop + "\u0001", stop[:-1] + "\u0001"]
        expected = full[:full.index(stop)]
        whole = complete(demo.http, **body, stop=stops)["choices"][0]
        stream = post_stream(demo.http, "/v1/completions", **body, stop=stops)
        assert (whole["text"], whole["finish_reason"]) == (expected, "stop"), (round_number, stop)
        assert (stream.text(), stream.finish_reason()) == (expected, "stop"), (round_number, stop)


def test_300_mixed_requests_leave_nothing_behind(start_server):
    """Random models, lengths, streams, stops and early leavers; then memory is as empty as before, and answers are the same."""
    server = start_server("--prefix-caching", "false", "--max-num-seqs", "32")
    probe = dict(model="haiku", prompt="Tell me about the sea.\n", temperature=0, max_tokens=30, return_token_ids=True)
    before = complete(server.http, **probe)["choices"][0]["token_ids"]
    rng = random.Random(SEED)

    async def one(client, i: int):
        body = dict(model=rng.choice(MODELS), prompt=[rng.randrange(300, 2000) for _ in range(rng.choice([1, 10, 100, 400]))], seed=i,
                    max_tokens=rng.choice([1, 5, 40]), n=rng.choice([1, 1, 3]), temperature=rng.choice([0, 1.0]), ignore_eos=True,
                    stop=rng.choice([None, "e", "the"]), stream=rng.random() < 0.5)
        leaves_after = rng.choice([None, None, 0, 1, 5])
        if not body["stream"] or leaves_after is None:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_raw():
                leaves_after -= 1
                if leaves_after < 0:
                    return

    async def all_of_them():
        gate = asyncio.Semaphore(48)
        async with httpx.AsyncClient(base_url=server.base, timeout=120, limits=httpx.Limits(max_connections=64), trust_env=False) as client:
            async def gated(i):
                async with gate:
                    await one(client, i)
            await asyncio.gather(*(gated(i) for i in range(300)))

    asyncio.run(all_of_them())
    server.wait_idle(5)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert complete(server.http, **probe)["choices"][0]["token_ids"] == before
    assert server.metric("loramux_shard_restarts_total") == 0
