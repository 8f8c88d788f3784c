"""The shard process is killed and hung while streams run: every stream ends with the tokens of an undisturbed run."""

import asyncio
import json
import os
import random
import shutil
import signal
import time

import httpx
import pytest

from adapter_files import write_random_adapter
from conftest import MODELS
from loramux_server import POLL_S, REPOSITORY, wait_until
from wire import Stream, async_sse_lines, check_error, complete, sse_lines

STREAMS = 32
KILLS = 50
HANGS = 2
SEED = int(os.environ.get("LORAMUX_TEST_SEED", "20261121"))
TOKENS = 100
QUESTIONS = ["Tell me about the sea.\n", "What is a dragon?\n", "The moon is", "Describe coffee.\n", "Hello!\n", "Explain a train.\n"]


def request(i: int) -> dict:
    return dict(model=MODELS[i % len(MODELS)], prompt=QUESTIONS[i % len(QUESTIONS)], temperature=0, max_tokens=TOKENS + i,
                ignore_eos=True, return_token_ids=True)


class Running:
    """Streams that run beside the test; each starts again when it ends, so that there is always something to disturb."""

    def __init__(self, server):
        self.server, self.stopping = server, False
        self.tokens = [0] * STREAMS
        self.finished: list[tuple[int, list[int]]] = []
        self.errors: list[str] = []

    @property
    def moved(self) -> int:
        return sum(self.tokens)

    async def one(self, client, i: int):
        while not self.stopping:
            ids = []
            try:
                async with client.stream("POST", "/v1/completions", json={**request(i), "stream": True}) as answer:
                    if answer.status_code != 200:
                        self.errors.append(f"stream {i}: {answer.status_code} {(await answer.aread()).decode()}")
                        return
                    done = False
                    async for line in async_sse_lines(answer):
                        if not line.startswith("data: "):
                            continue
                        if line == "data: [DONE]":
                            done = True
                            continue
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            self.errors.append(f"stream {i} after {len(ids)} tokens: {chunk}")
                            return
                        for choice in chunk["choices"]:
                            new = choice.get("token_ids") or []
                            ids += new
                            self.tokens[i] += len(new)
                    if not done:
                        self.errors.append(f"stream {i}: closed after {len(ids)} tokens without [DONE]")
                        return
            except httpx.HTTPError as error:
                self.errors.append(f"stream {i} after {len(ids)} tokens: {error!r}")
                return
            self.finished.append((i, ids))


async def until(condition, what: str, timeout_s: float):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


async def disturb(server, times: int, signal_number: int, recovery_s: float) -> Running:
    """Sends the signal `times` times at random moments and waits each time until the shard is new and a stream moved."""
    rng = random.Random(SEED + signal_number)
    running = Running(server)
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    async with httpx.AsyncClient(base_url=server.base, timeout=120, limits=limits, trust_env=False) as client:
        tasks = [asyncio.create_task(running.one(client, i)) for i in range(STREAMS)]
        try:
            for kill in range(times):
                if kill % 2 == 0:  # after some tokens; else at any point of the recovery's replay
                    target = running.moved + rng.randrange(1, 400)
                    await until(lambda: running.moved >= target or running.errors, f"{target} tokens (seed {SEED}, kill {kill})", 60)
                old = server.shard_pid()
                assert old is not None, f"no shard before kill {kill}; errors {running.errors}"
                os.kill(old, signal_number)
                await until(lambda: server.shard_pid() not in (None, old) or running.errors, f"a new shard (seed {SEED}, kill {kill})", recovery_s)
                moved = running.moved
                await until(lambda: running.moved > moved or running.errors, f"a stream that moves (seed {SEED}, kill {kill})", recovery_s)
                assert not running.errors, (f"seed {SEED}, kill {kill}", running.errors)
            running.stopping = True
            await asyncio.wait_for(asyncio.gather(*tasks), 120)
        finally:
            for task in tasks:
                task.cancel()
    return running


@pytest.fixture
def server(start_server):
    return start_server("--step-watchdog", "2s")


@pytest.fixture
def undisturbed(server):
    alone = {}
    for i in range(STREAMS):
        reply = complete(server.http, **request(i))
        alone[i] = reply["choices"][0]["token_ids"]
        assert len(alone[i]) == TOKENS + i
    return alone


def check(running: Running, undisturbed: dict):
    assert not running.errors, (f"seed {SEED}", running.errors)
    assert {i for i, _ in running.finished} == set(range(STREAMS))
    wrong = [(i, request(i)["model"]) for i, ids in running.finished if ids != undisturbed[i]]
    assert not wrong, f"seed {SEED}: {len(wrong)} of {len(running.finished)} streams differ from an undisturbed run: {wrong}"


@pytest.mark.timeout(600)
def test_killing_the_shard_is_a_pause_in_every_stream(server, undisturbed):
    running = asyncio.run(disturb(server, KILLS, signal.SIGKILL, recovery_s=30))
    check(running, undisturbed)
    assert server.metric("loramux_shard_restarts_total") == KILLS
    assert server.metric("loramux_replayed_requests_total") > 0
    server.wait_idle()
    assert server.metric("vllm:kv_cache_usage_perc") <= 1
    assert server.is_healthy()


@pytest.mark.timeout(300)
def test_a_hung_shard_is_replaced_by_the_watchdog(server, undisturbed):
    running = asyncio.run(disturb(server, HANGS, signal.SIGSTOP, recovery_s=30))
    check(running, undisturbed)
    assert server.metric("loramux_shard_restarts_total") == HANGS


def test_health_is_503_while_there_is_no_shard(start_server):
    """The next shard is stopped as soon as it is there, so that the time without one can be seen. Nothing else runs."""
    server = start_server()
    old = server.shard_pid()
    os.kill(old, signal.SIGKILL)
    new = wait_until(lambda: server.shard_pid() not in (None, old) and server.shard_pid(), "a new shard", 10)
    os.kill(new, signal.SIGSTOP)
    try:
        wait_until(lambda: server.http.get("/health").status_code == 503, "/health says 503 without a shard", 5)
        refused = server.http.get("/health")
        assert check_error(refused.json())["code"] == "not_ready" and int(refused.headers["retry-after"]) >= 1
        assert server.http.get("/health/live").status_code == 200
        assert server.http.get("/health/startup").status_code == 200
    finally:
        os.kill(new, signal.SIGCONT)
    wait_until(server.is_healthy, "/health says 200 again", 10)
    complete(server.http, model="sql", prompt="Hello!\n", max_tokens=4)


def test_an_idle_shard_that_hangs_is_noticed_and_replaced(start_server):
    server = start_server("--step-watchdog", "4s")
    old = server.shard_pid()
    os.kill(old, signal.SIGSTOP)
    wait_until(lambda: not server.is_healthy(), "/health says 503 without a heart-beat", 10)
    wait_until(server.is_healthy, "/health says 200 again", 30)
    assert server.shard_pid() not in (None, old)
    complete(server.http, model="sql", prompt="Hello!\n", max_tokens=4)


def test_a_request_that_comes_while_the_shard_is_down_is_served_by_the_next_one(server, undisturbed):
    os.kill(server.shard_pid(), signal.SIGKILL)
    assert complete(server.http, **request(2))["choices"][0]["token_ids"] == undisturbed[2]


def test_a_sampled_stream_goes_on_with_the_same_draws(server):
    body = dict(model="pirate", prompt="Once upon a time", temperature=1.2, seed=77, max_tokens=300, ignore_eos=True, return_token_ids=True)
    alone = complete(server.http, **body)["choices"][0]["token_ids"]
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        def lines():
            killed = False
            for n, line in enumerate(sse_lines(answer)):
                if n > 40 and not killed:
                    os.kill(server.shard_pid(), signal.SIGKILL)
                    killed = True
                yield line
        assert Stream(lines()).check_shape().token_ids() == alone
    assert server.metric("loramux_shard_restarts_total") == 1


def test_a_stream_whose_adapters_files_are_gone_fails_alone(start_server, tmp_path):
    """The shard's memory is lost and the folder was removed or overwritten: never another content under the same name."""
    config = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
    for name, seed in (("removed", 1), ("replaced", 2), ("next", 3)):
        write_random_adapter(tmp_path / name, config, 8, seed=seed)
    server = start_server("--adapter-dir", str(tmp_path))

    async def run():
        ended = {}
        async with httpx.AsyncClient(base_url=server.base, timeout=60, trust_env=False) as client:
            tokens = dict.fromkeys(("removed", "replaced", "sql"), 0)

            async def stream(model):
                body = dict(request(0), model=model, max_tokens=1500, stream=True)
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    async for line in async_sse_lines(answer):
                        if line.startswith("data: "):
                            tokens[model] += 1
                            ended[model] = line.removeprefix("data: ")

            tasks = [asyncio.create_task(stream(model)) for model in tokens]
            await until(lambda: all(count > 20 for count in tokens.values()), "all streams run", 30)
            shutil.rmtree(tmp_path / "removed")
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                (tmp_path / "next" / file).replace(tmp_path / "replaced" / file)
            os.kill(server.shard_pid(), signal.SIGKILL)
            await asyncio.gather(*tasks)
        return ended

    ended = asyncio.run(run())
    assert ended["sql"] == "[DONE]"
    for model in ("removed", "replaced"):
        assert check_error(json.loads(ended[model]))["code"] == "adapter_load_failed", (model, ended[model])
    server.wait_idle()


def test_a_shard_that_never_comes_up_again_ends_the_server_with_an_error(server):
    """Killed each time before it commits a step: after a few restarts the orchestrator has to know."""
    killed = set()
    def ended():
        shard = server.shard_pid()
        if shard is not None and shard not in killed:
            killed.add(shard)
            os.kill(shard, signal.SIGKILL)
        return server.process.poll() is not None
    wait_until(ended, "the process ends", 60)
    assert server.process.returncode not in (0, -signal.SIGSEGV, -signal.SIGABRT)
