"""LoRAX's own Python client, unchanged, against our server: adapters from a directory and from a hub, merges, streams, errors."""

import json
import subprocess
from pathlib import Path

import pytest

import marker
from faults.client import FaultServer
from faults.serving import SourcedServer, write_named
from third_party import program

DRIVER = Path(__file__).parent / "clients/drive_lorax.py"
PROMPT = "Tell me about the sea."


def drive(server, *calls: dict) -> list:
    asked = {"url": server.base, "headers": server.headers, "calls": [{"prompt": PROMPT, **call} for call in calls]}
    done = subprocess.run([program("python"), str(DRIVER)], input=json.dumps(asked), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def text_of(events: list[dict]) -> str:
    return "".join(event["token"]["text"] for event in events if not event["token"]["special"])


@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_whole_streamed_and_asynchronous(demo, adapter):
    given = {"max_new_tokens": 10, **({"adapter_id": adapter, "adapter_source": "local"} if adapter else {})}
    whole, events, other, others = drive(
        demo, *({"do": do, "with": given} for do in ("generate", "stream", "async_generate", "async_stream")))
    expected = demo.http.post("/generate", json={"inputs": PROMPT, "parameters": given}).json()["generated_text"]
    assert whole["generated_text"] == other["generated_text"] == expected
    assert text_of(events) == text_of(others) == expected
    assert events[-1]["generated_text"] == expected and events[-1]["details"]["finish_reason"] in ("length", "eos_token")
    assert [t["id"] for t in whole["details"]["tokens"]] == [e["token"]["id"] for e in events]


def test_every_parameter_the_client_knows(demo):
    given = dict(do_sample=True, max_new_tokens=6, ignore_eos_token=True, repetition_penalty=1.1, return_full_text=True, seed=5,
                 stop_sequences=["zzz"], temperature=0.8, top_k=20, top_p=0.9, truncate=50, decoder_input_details=True,
                 return_k_alternatives=3, details=True)
    first, second, best = drive(demo, {"do": "generate", "with": given}, {"do": "generate", "with": given},
                                {"do": "generate", "with": {"best_of": 3, "do_sample": True, "max_new_tokens": 6}})
    assert first == second and first["generated_text"].startswith(PROMPT)
    assert first["details"]["seed"] == 5 and first["details"]["generated_tokens"] == 6
    assert first["details"]["prefill"][0]["logprob"] is None
    assert all(len(t["alternative_tokens"]) == 3 for t in first["details"]["tokens"])
    assert len(best["details"]["best_of_sequences"]) == 2


def test_merged_adapters(demo):
    merged = {"ids": ["pirate", "shout"], "weights": [0.5, 0.5], "merge_strategy": "ties", "density": 0.8, "majority_sign_method": "total"}
    whole, events, alone, plain = drive(
        demo,
        {"do": "generate", "merged": merged, "with": {"max_new_tokens": 10}},
        {"do": "stream", "merged": merged, "with": {"max_new_tokens": 10}},
        {"do": "generate", "merged": {"ids": ["pirate"], "weights": [1.0], "merge_strategy": "linear", "density": 0.0}, "with": {"max_new_tokens": 10}},
        {"do": "generate", "with": {"max_new_tokens": 10, "adapter_id": "pirate"}})
    assert "error" not in whole, whole
    assert whole["generated_text"] == events[-1]["generated_text"]
    assert alone["generated_text"] == plain["generated_text"]


def test_errors_become_the_clients_exceptions(demo):
    unknown, refused, streamed = drive(
        demo,
        {"do": "generate", "with": {"adapter_id": "nobody", "adapter_source": "local"}},
        {"do": "generate", "with": {"typical_p": 0.5}},
        {"do": "stream", "with": {"adapter_id": "nobody"}})
    assert unknown["error"] == streamed["error"] == "GenerationError" and "does not exist" in unknown["message"]
    assert refused["error"] == "ValidationError" and "typical_p" in refused["message"]


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as faults:
        yield faults


@pytest.fixture(scope="module")
def sourced(faults, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_named(root, "acme/m13")
    with SourcedServer(faults, "--adapter-root", str(root)) as server:
        server.root = root
        yield server


def first_tokens(reply: dict) -> tuple[int, ...]:
    return tuple(token["id"] for token in reply["details"]["tokens"][0]["alternative_tokens"])


@pytest.mark.parametrize("source, i", [("hub", 11), ("s3", 12), ("local", 13)])
def test_an_adapter_is_loaded_on_its_first_request(sourced, source, i):
    name = {"hub": f"acme/m{i}", "s3": f"s3://public-bucket/acme/m{i}", "local": f"{sourced.root}/acme/m{i}"}[source]
    given = {"max_new_tokens": 1, "return_k_alternatives": marker.TOP, "adapter_id": name, "adapter_source": source}
    whole, again = drive(sourced, {"do": "generate", "with": given}, {"do": "generate", "with": given})
    assert "error" not in whole, whole
    assert first_tokens(whole) == first_tokens(again) == marker.marker(i)


def test_a_private_adapter_needs_the_callers_own_token(sourced, faults):
    faults.token("hf_tenantA", ["private-a/*"])
    given = {"max_new_tokens": 1, "return_k_alternatives": marker.TOP, "adapter_id": "private-a/m14", "adapter_source": "hub"}
    before, right, wrong, none = drive(
        sourced,
        {"do": "generate", "with": given},
        {"do": "generate", "with": {**given, "api_token": "hf_tenantA"}},
        {"do": "generate", "with": {**given, "api_token": "hf_other"}},
        {"do": "generate", "with": given})
    assert "error" not in right and first_tokens(right) == marker.marker(14), right
    for refused in (before, wrong, none):
        assert refused["error"] == "GenerationError", "loaded or not: only its owner gets it"
