"""Adapters that come, change, and push each other out."""

import asyncio
import json

import httpx

from adapter_files import write_random_adapter
from background import Background
from loramux_server import REPOSITORY, wait_until
from wire import check_error, complete

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())


def test_an_overwritten_adapter_serves_new_requests_while_running_ones_keep_the_old(start_server, tmp_path):
    folder = tmp_path / "loras"
    write_random_adapter(folder / "moving", MODEL_CONFIG, 8, seed=1)
    write_random_adapter(tmp_path / "next", MODEL_CONFIG, 16, seed=2)
    server = start_server("--adapter-dir", str(folder))
    body = dict(model="moving", prompt="Tell me about the sea.\n", temperature=0, max_tokens=1500, ignore_eos=True, return_token_ids=True)
    old = complete(server.http, **body)["choices"][0]["token_ids"]
    short = {**body, "max_tokens": 24}

    background = Background(server, **{**body}).wait_running()
    replace_adapter(folder / "moving", tmp_path / "next")
    new = complete(server.http, **short)["choices"][0]["token_ids"]
    assert background.events < 1490, "the old stream still runs"
    assert new != old[:24]
    assert background.result().check_shape().token_ids() == old
    write_random_adapter(tmp_path / "again", MODEL_CONFIG, 16, seed=2)
    direct = start_server("--adapter", f"moving={tmp_path / 'again'}")
    assert complete(direct.http, **short)["choices"][0]["token_ids"] == new


def replace_adapter(directory, source):
    """As a careful deployment does: both files are replaced by rename."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (source / name).replace(directory / name)


def test_an_adapter_added_to_the_folder_is_found_and_a_removed_one_is_not(start_server, tmp_path):
    server = start_server("--adapter-dir", str(tmp_path))
    body = dict(model="late", prompt="x", max_tokens=4)
    assert server.http.post("/v1/completions", json=body).status_code == 404
    write_random_adapter(tmp_path / "late", MODEL_CONFIG, 8)
    complete(server.http, **body)
    assert "late" in {card["id"] for card in server.http.get("/v1/models").json()["data"]}


def test_who_does_not_want_to_wait_for_a_cold_adapter_is_told_to_come_back(start_server, tmp_path):
    write_random_adapter(tmp_path / "cold", MODEL_CONFIG, 64)
    server = start_server("--adapter-dir", str(tmp_path))
    body = dict(model="cold", prompt="x", max_tokens=1, adapter_wait="fail")
    answer = server.http.post("/v1/completions", json=body)
    error = check_error(answer.json())
    assert answer.status_code == 503 and error["code"] == "adapter_loading" and error["retryable"]
    assert int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: server.http.post("/v1/completions", json=body).status_code == 200, "the load that was begun goes on")


def test_more_adapters_than_fit_take_turns(start_server, tmp_path):
    """40 adapters, room for 4 at once: each still gives what it gives alone."""
    for i in range(40):
        write_random_adapter(tmp_path / f"a{i}", MODEL_CONFIG, [4, 16, 40][i % 3], seed=i, gain=2)
    server = start_server("--adapter-dir", str(tmp_path), "--max-loras", "4")
    def body(i: int) -> dict:
        return dict(model=f"a{i}", prompt="Tell me about the sea.\n", temperature=0, max_tokens=12, ignore_eos=True, return_token_ids=True)
    alone = [complete(server.http, **body(i))["choices"][0]["token_ids"] for i in range(40)]
    assert len({tuple(ids) for ids in alone}) == 40

    async def twice():
        async with httpx.AsyncClient(base_url=server.base, timeout=120, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body(i % 40)) for i in range(80)))
            return [answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text for answer in answers]

    assert asyncio.run(twice()) == alone * 2


def test_adapters_and_prompts_that_push_each_other_out_lose_nothing(start_server, tmp_path):
    """An arena of four pages, six adapters of two each: what KV was written over is whole again when it comes back."""
    for i in range(6):
        write_random_adapter(tmp_path / f"a{i}", MODEL_CONFIG, 64, seed=i, gain=2)
    server = start_server("--adapter-dir", str(tmp_path), "--arena-bytes", "8MiB")
    assert sum(value for name, value in server.metrics().items() if name.startswith("loramux_arena_pages")) == 4
    def tokens(model: str, words: str, count: int = 12) -> list[int]:
        body = dict(model=model, prompt=words, temperature=0, max_tokens=count, ignore_eos=True, return_token_ids=True)
        return complete(server.http, **body)["choices"][0]["token_ids"]
    alone = [tokens(f"a{i}", "Tell me about the sea.\n") for i in range(6)]
    assert len({tuple(ids) for ids in alone}) == 6
    for turn in range(3):
        for i in (turn, turn + 3, (turn + 1) % 6):
            tokens("demo", f"{turn} {i} " + "the sea and the moon " * 300, 100)
            assert tokens(f"a{i}", "Tell me about the sea.\n") == alone[i], f"a{i} in turn {turn}"
