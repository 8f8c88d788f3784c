"""The shard on a device, here the host emulator of the CUDA kernels: the same API, and the tokens of the CPU.

A step takes about 50 ms, so requests are few and short. The first start compiles the kernels with g++ into
target/emulator-kernels, where later runs find them.
"""

import asyncio
import json
import os
import shutil
import signal

import httpx
import pytest

from conftest import ADAPTERS
from loramux_server import REPOSITORY, Server, clean_environment, run_to_end, wait_until
from wire import async_sse_lines, check_reply, complete

MODELS = ["demo", *ADAPTERS, "emoji"]
# Under every model, the first 15 tokens after this prompt lead the second best by more than the rounding of bfloat16.
PROMPT = "What is a dragon?\n"
TOKENS = 12
# The CPU keeps activations in f32, a device in bfloat16. What is unlikely has a large logprob, and with it a larger error.
LOGPROB_TOLERANCE, LOGPROB_RELATIVE = 5e-2, 1e-2
COMPILE_TIMEOUT_S = 280.0

LIMITS = ["--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--arena-bytes", "64MiB",
          "--host-adapter-memory", "64MiB"]
EMULATED = ["--device", "emulated", "--kernel-cache-dir", str(REPOSITORY / "target/emulator-kernels"), *LIMITS]


@pytest.fixture(scope="module")
def needs_compiler():
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")


@pytest.fixture(scope="module")
def device(data_dir, needs_compiler):
    with Server(*EMULATED, data_dir=data_dir, start_timeout_s=COMPILE_TIMEOUT_S) as server:
        yield server


@pytest.fixture(scope="module")
def cpu(data_dir):
    with Server("--device", "cpu", *LIMITS, data_dir=data_dir) as server:
        yield server


@pytest.fixture
def start_device(data_dir, needs_compiler):
    """`start_device(flags...)`: a server of its own on the emulator; ended after the test."""
    started = []

    def start(*flags: str) -> Server:
        started.append(Server(*EMULATED, *flags, data_dir=data_dir, start_timeout_s=COMPILE_TIMEOUT_S))
        return started[-1]

    yield start
    for server in started:
        server.close()


def greedy(model: str = "demo", prompt=PROMPT, **body) -> dict:
    return dict(dict(model=model, prompt=prompt, temperature=0, max_tokens=TOKENS, ignore_eos=True, return_token_ids=True), **body)


def ask(server: Server, body: dict) -> dict:
    """The only choice."""
    return complete(server.http, **body)["choices"][0]


def tokens(server: Server, body: dict) -> list[int]:
    return ask(server, body)["token_ids"]


def together(server: Server, bodies: list[dict]) -> list[list[int]]:
    """Token ids of requests that run at the same time."""
    async def run():
        async with httpx.AsyncClient(base_url=server.base, timeout=120, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        for answer in answers:
            assert answer.status_code == 200, answer.text
        return [check_reply(answer.json())["choices"][0]["token_ids"] for answer in answers]
    return asyncio.run(run())


def assert_close(found: list, expected: list):
    """Logprobs."""
    assert len(found) == len(expected)
    far = [(at, a, b) for at, (a, b) in enumerate(zip(found, expected)) if abs(a - b) > LOGPROB_TOLERANCE + LOGPROB_RELATIVE * abs(b)]
    assert not far, f"these differ by more than {LOGPROB_TOLERANCE} and {LOGPROB_RELATIVE:.0%}: {far}"


def long_prompt(tokens_count: int, first: int = 300) -> list[int]:
    """Ids of words in an order that no text has; none repeats."""
    return [first + (7 * at) % 1500 for at in range(tokens_count)]


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_and_logprobs_are_those_of_the_cpu(device, cpu, model):
    body = greedy(model, logprobs=3, return_tokens_as_token_ids=True)
    found, expected = ask(device, body), ask(cpu, body)
    assert found["token_ids"] == expected["token_ids"] and len(found["token_ids"]) == TOKENS
    assert found["text"] == expected["text"]
    assert_close(found["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"])
    for found_top, expected_top in zip(found["logprobs"]["top_logprobs"], expected["logprobs"]["top_logprobs"]):
        assert len(found_top) == 3
        best = list(expected_top)[0]
        assert list(found_top)[0] == best
        assert_close([found_top[best]], [expected_top[best]])


def test_adapters_change_the_tokens(cpu):
    """Else the comparisons of this file would say nothing about adapters."""
    assert len({tuple(tokens(cpu, greedy(model))) for model in MODELS}) == len(MODELS)


def test_all_models_in_one_batch_give_the_tokens_of_their_solo_runs(device):
    bodies = [greedy(model) for model in MODELS] + [greedy("demo", prompt="The moon is"), greedy("sql", prompt="Hello!\n")]
    alone = [tokens(device, body) for body in bodies]
    steps = device.metric("loramux_steps_total")
    assert together(device, bodies) == alone
    steps = device.metric("loramux_steps_total") - steps
    assert steps < len(bodies) * TOKENS / 2, f"{steps} steps: the requests did not share them"


@pytest.mark.parametrize("fused", ["rope", "activation", "norm", "rope,activation,norm"])
def test_fused_expands_give_the_tokens_of_the_cpu(start_device, cpu, fused):
    bodies = [greedy(model) for model in MODELS] + [greedy(compose=[{"adapter": "pirate", "weight": 0.8}, {"adapter": "shout", "weight": 0.6}])]
    assert together(start_device("--cuda-fuse", fused), bodies) == [tokens(cpu, body) for body in bodies]


def test_composed_and_scaled_adapters_give_the_tokens_of_the_cpu(device, cpu):
    for body in (greedy("sql", adapter_scale=0.5), greedy("pirate", adapter_scale=-0.5),
                 greedy(compose=[{"adapter": "pirate", "weight": 0.8}, {"adapter": "shout", "weight": 0.6}])):
        assert tokens(device, body) == tokens(cpu, body), body


@pytest.mark.parametrize("model", ["demo", "haiku"])
def test_prompt_logprobs_are_those_of_the_cpu(device, cpu, model):
    body = greedy(model, prompt="The sea is wide and blue. It covers most of the world.\n", prompt_logprobs=2, max_tokens=1)
    found, expected = (ask(server, body)["prompt_logprobs"] for server in (device, cpu))
    assert found[0] is None and expected[0] is None and len(found) == len(expected) > 10
    for at, (mine, other) in enumerate(zip(found[1:], expected[1:])):
        common = mine.keys() & other.keys()  # of near-equal alternatives each may name another
        assert len(common) >= len(other) - 1, (at, mine, other)
        assert_close([mine[token]["logprob"] for token in common], [other[token]["logprob"] for token in common])


def test_logit_bias_forces_and_bans(device, cpu):
    assert tokens(device, greedy(logit_bias={"100": 100}, max_tokens=3)) == [100] * 3
    first = tokens(cpu, greedy())[0]
    banned = tokens(device, greedy(logit_bias={str(first): -100}))
    assert first not in banned and banned == tokens(cpu, greedy(logit_bias={str(first): -100}))


def test_allowed_token_ids_bound_the_choice(device, cpu):
    allowed = sorted({65, 300, 301, 416, 1252, *tokens(cpu, greedy("sql"))[:4]})
    body = greedy("sql", allowed_token_ids=allowed)
    found = tokens(device, body)
    assert set(found) <= set(allowed) and found == tokens(cpu, body)
    sampled = tokens(device, {**body, "temperature": 2.0, "seed": 3})
    assert set(sampled) <= set(allowed)
    assert tokens(device, greedy(allowed_token_ids=[77], max_tokens=3)) == [77] * 3


def test_min_tokens_holds_the_end_back(device, cpu):
    """The base ends this answer after 17 tokens."""
    body = greedy(ignore_eos=False, max_tokens=24)
    ended = ask(device, body)
    assert ended["finish_reason"] == "stop" and len(ended["token_ids"]) < 20
    assert ended["token_ids"] == tokens(cpu, body)
    held = ask(device, {**body, "min_tokens": 20})
    assert len(held["token_ids"]) >= 20
    assert held["token_ids"] == tokens(cpu, {**body, "min_tokens": 20})


def test_stop_strings_and_stop_tokens_end_the_answer(device, cpu):
    words = ask(cpu, greedy(max_tokens=8))["text"].split()
    body = greedy(stop=[words[3]])
    found, expected = ask(device, body), ask(cpu, body)
    assert found["finish_reason"] == "stop" and found["text"] == expected["text"]
    assert words[2] in found["text"] and words[3] not in found["text"]
    fourth = tokens(cpu, greedy())[3]
    stopped = ask(device, greedy(stop_token_ids=[fourth]))
    assert stopped["finish_reason"] == "stop" and stopped["token_ids"] == tokens(cpu, greedy(stop_token_ids=[fourth]))


@pytest.mark.parametrize("penalty", [dict(repetition_penalty=1.5), dict(presence_penalty=1.5), dict(frequency_penalty=1.5),
                                     dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5)])
@pytest.mark.parametrize("model, prompt", [("shout", "rain rain rain rain"), ("demo", "one two three one two three one two three one")])
def test_penalties_give_the_tokens_of_the_cpu(device, cpu, model, prompt, penalty):
    """Answers that would repeat the prompt, or themselves."""
    body = greedy(model, prompt=prompt)
    penalized = tokens(cpu, {**body, **penalty})
    assert tokens(device, {**body, **penalty}) == penalized
    assert penalized != tokens(cpu, body), "the penalty changes nothing here"


def test_a_seed_gives_the_same_draws_alone_and_in_a_batch(device):
    def sampled(model, seed, **body):
        return greedy(model, **{**dict(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001, seed=seed), **body})
    bodies = [sampled(model, seed) for model in ("demo", "pirate", "shout") for seed in (1, 2)]
    alone = [tokens(device, body) for body in bodies]
    assert [tokens(device, body) for body in bodies[:2]] == alone[:2]
    assert together(device, [*bodies, greedy("sql"), sampled("haiku", 9)])[:len(bodies)] == alone
    assert len(set(map(tuple, alone))) == len(alone), "other seeds, other draws"


def test_draws_are_as_frequent_as_they_are_likely(device, cpu):
    """Two tokens, with a bias that makes both equally likely: 64 draws give each about half the time."""
    first, second = 416, 1252
    body = greedy(prompt=long_prompt(5), max_tokens=1, allowed_token_ids=[first, second])
    low, high = -100.0, 100.0
    for _ in range(14):
        middle = (low + high) / 2
        wins = tokens(cpu, {**body, "logit_bias": {str(first): middle}}) == [first]
        low, high = (low, middle) if wins else (middle, high)
    assert -90 < low < 90, "the bias decides nothing"
    body |= dict(temperature=1.0, logit_bias={str(first): low})
    draws = [choice["token_ids"][0] for seed in range(8) for choice in complete(device.http, **body, n=8, seed=100 * seed)["choices"]]
    assert len(draws) == 64 and 16 <= draws.count(first) <= 48, f"{draws.count(first)} of 64 (four deviations are 16)"


def test_n_choices_share_the_prompt_and_part_ways(device):
    body = greedy("pirate", n=2, temperature=1.3, seed=5, max_tokens=10)
    first, second = complete(device.http, **body), complete(device.http, **body)
    choices = [choice["token_ids"] for choice in first["choices"]]
    assert choices[0] != choices[1]
    assert choices == [choice["token_ids"] for choice in second["choices"]]
    greedy_choices = [choice["token_ids"] for choice in complete(device.http, **greedy("pirate", n=2))["choices"]]
    assert greedy_choices == [tokens(device, greedy("pirate"))] * 2


@pytest.mark.parametrize("model", ["demo", "shout"])
def test_a_prompt_of_several_steps_gives_the_tokens_of_the_cpu(device, cpu, model):
    """150 tokens at 64 a step, the last ones a sentence, so that the answer is sure."""
    sentence = cpu.http.post("/tokenize", json=dict(model=model, prompt=PROMPT)).json()["tokens"]
    prompt = long_prompt(150 - len(sentence)) + sentence
    body = greedy(model, prompt=prompt, cache_salt="prompt of several steps")
    steps = device.metric("loramux_steps_total")
    assert tokens(device, body) == tokens(cpu, body)
    assert device.metric("loramux_steps_total") - steps >= 3 + TOKENS - 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_the_cpu(device, cpu, pooling):
    """Prompts of one step and of several, under base and adapter."""
    def embed(server: Server, model: str) -> list[list[float]]:
        body = {"model": model, "input": ["Hi", PROMPT, PROMPT * 8], "pooling": pooling}
        return [datum["embedding"] for datum in server.http.post("/v1/embeddings", json=body).raise_for_status().json()["data"]]

    for model in ("demo", ADAPTERS[0]):
        for ours, theirs in zip(embed(device, model), embed(cpu, model), strict=True):
            assert sum(a * b for a, b in zip(ours, theirs, strict=True)) > 0.999, model


def test_a_cached_prompt_gives_the_same_tokens(device):
    for model in ("demo", "haiku"):
        body = greedy(model, prompt=long_prompt(70, first=400))
        first, second = complete(device.http, **body), complete(device.http, **body)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
        assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]


def test_two_slots_serve_five_adapters_in_turns(device, start_device):
    """Each comes into a slot that another one had: its tokens stay its own, one by one and all at once."""
    models = [*ADAPTERS, "emoji"]
    alone = [tokens(device, greedy(model)) for model in models]
    server = start_device("--max-loras", "2")
    for _ in range(2):
        assert [tokens(server, greedy(model)) for model in models] == alone
    assert together(server, [greedy(model) for model in models]) == alone
    assert server.metric("loramux_adapter_evictions_total") >= 10


def test_float16_serves_base_and_adapters(start_device, cpu):
    server = start_device("--dtype", "float16")
    bodies = [greedy(model) for model in MODELS]
    assert together(server, bodies) == [tokens(cpu, body) for body in bodies]
    assert [event["dtype"] for event in server.log_events() if event.get("message") == "ready"] == ["float16"]


def test_streams_outlive_the_shard(start_device, device):
    """Killed while every stream has some tokens: all go on, with the tokens of an undisturbed run.

    A device computes what was generated again as a prompt, with another rounding than step by step. So only tokens that
    lead the second best clearly are sure to come again, and of the one that draws only those that were out already.
    """
    drawing = greedy("pirate", max_tokens=15, temperature=1.1, seed=4)
    bodies = [greedy(model, max_tokens=15) for model in MODELS] + [drawing]
    alone = [tokens(device, body) for body in bodies]
    server = start_device()

    async def stream(client, body: dict, found: list[int]):
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in async_sse_lines(answer):
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    found += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
        raise AssertionError(f"closed after {len(found)} tokens without [DONE]")

    async def run() -> list[list[int]]:
        found: list[list[int]] = [[] for _ in bodies]
        async with httpx.AsyncClient(base_url=server.base, timeout=120, trust_env=False) as client:
            streams = [asyncio.create_task(stream(client, body, ids)) for body, ids in zip(bodies, found)]
            try:
                while min(map(len, found)) < 4:
                    assert not any(one.done() for one in streams), [one.exception() for one in streams if one.done()]
                    await asyncio.sleep(0.01)
                os.kill(server.shard_pid(), signal.SIGKILL)
                await asyncio.gather(*streams)
            finally:
                for one in streams:
                    one.cancel()
        return found

    found = asyncio.run(run())
    assert found[:-1] == alone[:-1]
    assert found[-1][:4] == alone[-1][:4] and len(found[-1]) == 15
    assert server.metric("loramux_shard_restarts_total") == 1
    server.wait_idle()
    wait_until(server.is_healthy, "/health says 200 again")


def has_gpu() -> bool:
    """Whether this machine has a driver for NVIDIA's GPUs."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def error_line(*flags: str) -> str:
    """Ends with an error at once; the one line that says why."""
    ended = run_to_end("--port", "0", *flags, timeout_s=60)
    assert ended.returncode not in (0, -signal.SIGSEGV, -signal.SIGABRT), ended
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended
    assert "panicked" not in ended.stderr, ended.stderr
    return lines[0]


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_an_error_that_says_what_was_looked_for(data_dir, name):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    line = error_line("--device", name, "--data-dir", data_dir)
    assert "--device cuda:" in line and "libcuda.so" in line and "looked in" in line


def test_auto_without_a_gpu_says_that_it_takes_the_cpu(start_server):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    server = start_server("--device", "auto", *LIMITS)
    said = [event["message"] for event in server.log_events() if "libcuda.so" in event.get("message", "")]
    assert len(said) == 1 and "CPU" in said[0], server.log()
    complete(server.http, **greedy(max_tokens=2))


def test_float32_on_a_device_is_refused(data_dir, needs_compiler):
    line = error_line(*EMULATED, "--dtype", "float32", "--data-dir", data_dir)
    assert "--dtype float32" in line and "bfloat16" in line and "--device cpu" in line


def test_float16_on_the_cpu_is_refused(data_dir):
    line = error_line("--device", "cpu", "--dtype", "float16", "--data-dir", data_dir)
    assert "--dtype float16" in line


@pytest.mark.parametrize("name", ["nonsense", "cuda:", "cuda:-1", "gpu", ""])
def test_an_unknown_device_is_an_error_that_names_the_known_ones(name):
    line = error_line("--device", name)
    assert "--device" in line and "auto, cpu, cuda and cuda:N" in line


def test_a_missing_compiler_is_an_error_that_names_it(data_dir, tmp_path):
    """With an empty PATH there is no g++, and nothing is compiled yet."""
    ended = run_to_end("--port", "0", "--device", "emulated", "--kernel-cache-dir", str(tmp_path), "--data-dir", data_dir,
                       env={**clean_environment(), "PATH": str(tmp_path)})
    assert ended.returncode not in (0, -signal.SIGSEGV, -signal.SIGABRT)
    assert "g++" in ended.stderr + ended.stdout
