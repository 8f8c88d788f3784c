"""Adapters that come and go in a host memory too small for them, while their files change."""

import concurrent.futures
import os
import random
import shutil
import time

from loramux_server import REPOSITORY


def test_a_small_host_memory_costs_time_and_nothing_else(start_server, tmp_path):
    """12 names, 2 contents, room for about one: contents are dropped and read again all the time, and no shard dies of it."""
    for i in range(6):
        for adapter in ("pirate", "haiku"):
            shutil.copytree(REPOSITORY / "models/demo/adapters" / adapter, tmp_path / f"{adapter}{i}")
    server = start_server("--adapter-dir", str(tmp_path), "--host-adapter-memory", "300KiB")

    def ask(model: str, prompt: str, max_tokens: int) -> str:
        answer = server.http.post("/v1/completions", json=dict(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    question = "Tell me about the sea.\n"
    alone = {name: ask(f"{name}0", question, 16) for name in ("pirate", "haiku")}

    def worker(seed: int) -> int:
        rng, asked, until = random.Random(seed), 0, time.monotonic() + 4
        while time.monotonic() < until:
            kind, i = rng.choice(("pirate", "haiku")), rng.randrange(6)
            if rng.random() < 0.3:
                os.utime(tmp_path / f"{kind}{i}" / "adapter_config.json")
            if rng.random() < 0.3:
                ask("demo", "the sea and the moon " * 300, 2)
            else:
                assert ask(f"{kind}{i}", question, 16) == alone[kind], (seed, asked)
            asked += 1
        return asked

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(worker, range(6))) > 20
    both = [{"adapter": "pirate0", "weight": 0.5}, {"adapter": "haiku0", "weight": 0.5}]
    answer = server.http.post("/v1/completions", json=dict(model="demo", prompt=question, max_tokens=8, compose=both), timeout=20)
    assert answer.status_code == 200, answer.text
    assert server.metric("loramux_shard_restarts_total") == 0
