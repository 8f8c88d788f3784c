"""`/v1/embeddings`: against transformers and PEFT, with the real client, and beside generations."""

import asyncio
import base64
import json
import math
import os
import struct
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from loramux_server import Server

GOLDEN = json.loads((Path(__file__).parent / "golden_embeddings.json").read_text())
REAL = os.environ.get("LORAMUX_REAL_MODEL_DIR"), os.environ.get("LORAMUX_REAL_ADAPTERS_DIR")
# Activations of the CPU path are f32; weights and KV are rounded in bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def embed(server: Server, body: dict) -> dict:
    answer = server.http.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def length(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


@pytest.mark.skipif(not all(REAL), reason="real-model parity: LORAMUX_REAL_MODEL_DIR, LORAMUX_REAL_ADAPTERS_DIR are not set")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_to_transformers_and_peft(data_dir, dtype):
    model, adapters = REAL
    names = {case["adapter"] for case in GOLDEN["cases"]} - {None}
    flags = [flag for name in names for flag in ("--adapter", f"{name}={adapters}/{name}")]
    with Server("--model-id", model, "--served-model-name", "base", "--dtype", dtype, *flags, data_dir=data_dir) as server:
        for pooling in ("mean", "last"):
            for adapter in (None, *names):
                cases = [case for case in GOLDEN["cases"] if (case["adapter"], case["pooling"]) == (adapter, pooling)]
                body = {"model": adapter or "base", "input": [case["text"] for case in cases], "pooling": pooling}
                reply = embed(server, body)
                assert reply["usage"]["prompt_tokens"] == sum(case["tokens"] for case in cases)
                raw = embed(server, {**body, "normalize": False})
                for case, datum, plain in zip(cases, reply["data"], raw["data"], strict=True):
                    values = datum["embedding"]
                    assert len(values) == GOLDEN["dimensions"] and abs(length(values) - 1) < 1e-5
                    worst = max(abs(ours - theirs) for ours, theirs in zip(values, case["values"]))
                    assert worst <= TOLERANCE[dtype], f"{adapter} {pooling} {case['text'][:20]!r}: {worst}"
                    assert abs(length(plain["embedding"]) / case["length"] - 1) <= TOLERANCE[dtype]


def test_the_clients_call(demo):
    """The client asks for base64 unless told otherwise."""
    with OpenAI(base_url=f"{demo.base}/v1", api_key="EMPTY") as client:
        ours = client.embeddings.create(model="demo", input=["Hello there", "Another text"])
        floats = client.embeddings.create(model="demo", input=["Hello there", "Another text"], encoding_format="float")
        assert [datum.index for datum in ours.data] == [0, 1]
        for one, other in zip(ours.data, floats.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, abs=1e-7) and abs(length(one.embedding) - 1) < 1e-5
        assert ours.usage.prompt_tokens == ours.usage.total_tokens > 0
        ids = demo.http.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"]
        assert client.embeddings.create(model="demo", input=ids).data[0].embedding == ours.data[0].embedding
        short = client.embeddings.create(model="demo", input="Hello there", dimensions=8).data[0].embedding
        assert len(short) == 8 and abs(length(short) - 1) < 1e-5
        assert short[0] / short[1] == pytest.approx(ours.data[0].embedding[0] / ours.data[0].embedding[1], rel=1e-4)
    reply = embed(demo, {"input": "Hello there", "encoding_format": "base64"})
    raw = base64.b64decode(reply["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(ours.data[0].embedding, abs=0)


def test_an_adapter_changes_the_embedding_and_is_named(demo):
    names = [card["id"] for card in demo.http.get("/v1/models").json()["data"] if "parent" in card]
    base = embed(demo, {"input": "SELECT"})["data"][0]["embedding"]
    for name in names[:2]:
        answer = demo.http.post("/v1/embeddings", json={"model": name, "input": "SELECT"})
        assert answer.json()["data"][0]["embedding"] != base and answer.json()["model"] == name
        assert answer.headers["x-adapter-id"] == name
    none = embed(demo, {"model": names[0], "adapter_scale": 0, "input": "SELECT"})
    assert none["data"][0]["embedding"] == pytest.approx(base, abs=1e-6)


@pytest.mark.timeout(180)
def test_what_is_beside_it_changes_no_bit(demo):
    """64 inputs, short and long, base and adapters, in one batch with streams that generate; each equals its solo run."""
    names = [card["id"] for card in demo.http.get("/v1/models").json()["data"]]
    bodies = [{"model": names[i % len(names)], "pooling": ("mean", "last")[i % 2], "normalize": i % 3 > 0, "encoding_format": "base64",
               "input": f"Text {i}. " * (1 + 7 * (i % 9))} for i in range(64)]
    alone = [embed(demo, body)["data"] for body in bodies]
    prompts = [{"model": names[i % len(names)], "prompt": f"Story {i}:", "max_tokens": 40, "temperature": 0} for i in range(16)]
    texts = [demo.http.post("/v1/completions", json=prompt).json()["choices"][0]["text"] for prompt in prompts]

    async def together():
        async with httpx.AsyncClient(base_url=demo.base, timeout=120) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=prompt) for prompt in prompts),
                                           *(client.post("/v1/embeddings", json=body) for body in bodies))
        return [answer.raise_for_status().json() for answer in answers]

    answers = asyncio.run(together())
    assert [answer["choices"][0]["text"] for answer in answers[:16]] == texts
    assert [answer["data"] for answer in answers[16:]] == alone
