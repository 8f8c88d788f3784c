"""Metrics, tokens, version: the routes beside generation."""

import re
import time

from prometheus_client.parser import text_string_to_metric_families

from loramux_server import wait_until
from wire import chat, complete


def test_metrics_parse_and_have_their_names(demo):
    complete(demo.http, model="sql", prompt="Hello!\n", max_tokens=4)
    answer = demo.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    gauges = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
    counters = ["prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "request_success"]
    histograms = ["time_to_first_token_seconds", "e2e_request_latency_seconds"]
    for kind, names in (("gauge", gauges), ("counter", counters), ("histogram", histograms)):
        for name in names:
            assert families[f"vllm:{name}"].type == kind, name
    for name in gauges:
        samples = families[f"vllm:{name}"].samples
        assert len(samples) == 1 and samples[0].labels["model_name"] == "demo" and samples[0].labels["engine"] == "0"
    lora = families["vllm:lora_requests_info"].samples
    assert len(lora) == 1 and set(lora[0].labels) >= {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert int(lora[0].labels["max_lora"]) > 0
    for name in ("loramux_shard_restarts", "loramux_rejected", "loramux_adapter_requests", "loramux_arena_pages", "loramux_build_info"):
        assert name in families or name.removesuffix("_info") in families, name
    for family in families.values():
        assert family.documentation, family.name
        if family.name.startswith("vllm:"):
            assert all("adapter" not in sample.labels for sample in family.samples)


def test_counters_count(demo):
    demo.wait_idle()
    time.sleep(0.2)  # the page is made at most every 50 ms
    before = demo.metrics()
    usage = complete(demo.http, model="pirate", prompt="Hello!\n", max_tokens=7, ignore_eos=True)["usage"]
    def moved(name):
        return demo.metric(name) - before[name]
    wait_until(lambda: moved("vllm:generation_tokens_total") >= 7 and moved("vllm:request_success_total") >= 1, "tokens are counted", 5)
    assert moved("vllm:generation_tokens_total") == 7
    assert moved("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert moved("vllm:request_success_total") == 1


def test_a_thousand_names_do_not_make_a_thousand_series(demo):
    for i in range(1000):
        demo.http.post("/v1/completions", json={"model": f"stranger-{i}", "prompt": "x"})
    text = demo.http.get("/metrics").text
    assert "stranger" not in text and len(text) < 65536


def test_tokenize_and_detokenize_are_a_round_trip(demo):
    for text in ("Tell me about the sea.", "  two  spaces\n\ttab", "naïve 🌊 日本語", "<|im_end|>", ""):
        tokens = demo.http.post("/tokenize", json={"model": "demo", "prompt": text, "add_special_tokens": False}).json()
        assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
        assert demo.http.post("/detokenize", json={"model": "demo", "tokens": tokens["tokens"]}).json() == {"prompt": text}
    by_chat = demo.http.post("/tokenize", json={"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}).json()
    assert by_chat["count"] == chat(demo.http, "Hello!", model="demo", max_tokens=1)["usage"]["prompt_tokens"]
    strings = demo.http.post("/tokenize", json={"model": "demo", "prompt": "the sea", "return_token_strs": True}).json()
    assert len(strings["token_strs"]) == strings["count"]


def test_version_load_and_ping(demo):
    assert re.fullmatch(r"\d+\.\d+\.\d+", demo.http.get("/version").json()["version"])
    assert demo.http.get("/load").json()["server_load"] >= 0
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("GET", "/"), ("GET", "/health"), ("GET", "/startup"), ("GET", "/health/ready")):
        answer = demo.http.request(method, path)
        assert answer.status_code == 200, path
    assert demo.http.get("/health").content == b""
