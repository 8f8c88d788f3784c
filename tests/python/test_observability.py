"""What the server tells of itself: metrics, traces, the access log, times in headers."""

import json
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapter_files import write_random_adapter
from loramux_server import REPOSITORY, Server, wait_until
from otlp_receiver import Collector
from wire import chat, complete

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
CANARY = "canary-5f2e"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENGINE = {"model_name", "engine"}
# Every family of /metrics: name, type, labels. Histograms have `le` too.
FAMILIES = [
    *[(f"vllm:{name}", "gauge", ENGINE) for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc", "cpu_cache_usage_perc",
        "engine_sleep_state")],
    ("vllm:cache_config_info", "gauge", ENGINE | {"block_size", "num_gpu_blocks"}),
    ("vllm:lora_requests_info", "gauge", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
    *[(f"vllm:{name}", "counter", ENGINE) for name in (
        "prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits")],
    ("vllm:request_success", "counter", ENGINE | {"finished_reason"}),
    *[(f"vllm:{name}", "histogram", ENGINE) for name in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total")],
    ("loramux_adapter_requests", "counter", {"adapter", "outcome"}),
    ("loramux_adapter_prompt_tokens", "counter", {"adapter"}),
    ("loramux_adapter_generation_tokens", "counter", {"adapter"}),
    ("loramux_adapter_ttft_seconds", "histogram", {"adapter"}),
    ("loramux_adapter_queue_seconds", "histogram", {"adapter"}),
    ("loramux_adapters", "gauge", {"state"}),
    ("loramux_adapter_residency", "gauge", {"residency"}),
    ("loramux_adapter_load_seconds", "histogram", {"source", "phase"}),
    ("loramux_adapter_load_failures", "counter", {"source", "code"}),
    ("loramux_adapter_evictions", "counter", {"from"}),
    ("loramux_adapter_upload_bytes", "counter", set()),
    ("loramux_arena_pages", "gauge", {"use"}),
    ("loramux_step_seconds", "histogram", {"kind"}),
    ("loramux_step_tokens", "histogram", set()),
    ("loramux_steps", "counter", set()),
    ("loramux_wasted_positions", "counter", set()),
    ("loramux_grammar_mask_seconds", "histogram", set()),
    ("loramux_grammar_failures", "counter", set()),
    ("loramux_structured_requests", "counter", {"kind"}),
    ("loramux_tool_requests", "counter", {"choice"}),
    ("loramux_shard_restarts", "counter", set()),
    ("loramux_replayed_requests", "counter", set()),
    ("loramux_rejected", "counter", {"code"}),
    ("loramux_stream_stalls", "counter", set()),
    ("loramux_trace_spans", "counter", {"outcome"}),
    ("loramux_build_info", "gauge", {"version"}),
]
ONE_SERIES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def families(server) -> dict:
    return {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}


def access(server, request_id: str) -> dict:
    """The line of a request in the access log."""
    def lines():
        return [event for event in server.log_events() if event["target"] == "access" and event["request_id"] == request_id]
    found = wait_until(lines, f"a line of {request_id}")
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def collector():
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def told(data_dir, collector):
    """A server that tells everything."""
    env = {"OTEL_SERVICE_NAME": "shop", "OTEL_EXPORTER_OTLP_HEADERS": f"x-tenant={CANARY}"}
    with Server("--otlp-endpoint", collector.url, "--adapter-metrics", "full", "--adapter-metrics-names", "sql,listed",
                env=env, data_dir=data_dir) as server:
        yield server


def test_every_family_is_there_with_its_type_and_labels(told):
    complete(told.http, model="sql", prompt="Hello!\n", max_tokens=4)
    complete(told.http, model="demo", prompt="Hello!\n", max_tokens=4, structured_outputs={"regex": "[a-z]{1,3}"})
    chat(told.http, "Hello!", model="demo", max_tokens=2, tools=[TOOL])
    assert told.http.post("/v1/completions", json={"model": "nobody"}).status_code in (400, 404)
    told.wait_idle()
    time.sleep(0.1)  # the page is made at most every 50 ms
    found = families(told)
    for name, kind, labels in FAMILIES:
        assert name in found, f"{name} is missing"
        family = found[name]
        assert family.type == kind and family.documentation, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, sample
    known = {name for name, _, _ in FAMILIES} | {"loramux_step_tokens"}
    assert {name for name in found if name not in known} == set(), "a family that nobody describes"
    for name in ONE_SERIES:
        assert len(found[f"vllm:{name}"].samples) == 1
    value = {(sample.name, *sorted(sample.labels.items())): sample.value for family in found.values() for sample in family.samples}
    assert value["loramux_structured_requests_total", ("kind", "regex")] == 1
    assert value["loramux_tool_requests_total", ("choice", "auto")] == 1
    assert value["loramux_grammar_mask_seconds_count",] >= 1
    assert value["loramux_adapter_ttft_seconds_count", ("adapter", "sql")] == 1
    assert value["loramux_adapter_prompt_tokens_total", ("adapter", "listed")] == 0
    steps = sum(value["loramux_step_seconds_count", ("kind", kind)] for kind in ("prefill", "decode", "mixed"))
    assert steps == value["loramux_step_tokens_count",] == value["loramux_steps_total",]


def test_lorax_names_are_there_for_who_asks(start_server, demo):
    assert not any(name.startswith("lorax_") for name in families(demo))
    server = start_server("--lorax-metrics")
    complete(server.http, model="sql", prompt="Hello!\n", max_tokens=3, ignore_eos=True)
    server.wait_idle()
    time.sleep(0.1)
    found = families(server)
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration", "mean_time_per_token_duration",
                 "input_length", "generated_tokens", "max_new_tokens"):
        values = {sample.name: sample.value for sample in found[f"lorax_request_{name}"].samples}
        assert values[f"lorax_request_{name}_count"] == 1, name
    lines = server.http.get("/metrics").text.splitlines()
    values = ("request_count 1", "request_success 1", "request_failure 0", "queue_length 0", "batch_current_size 0")
    assert [value for value in values if f"lorax_{value}" not in lines] == []


@pytest.mark.parametrize("level", ["off", "counters"])
def test_the_level_of_metrics_by_adapter(start_server, level):
    server = start_server("--adapter-metrics", level)
    complete(server.http, model="sql", prompt="Hello!\n", max_tokens=2)
    found = families(server)
    assert ("loramux_adapter_requests" in found) == (level == "counters")
    assert "loramux_adapter_ttft_seconds" not in found


def test_a_page_with_ten_thousand_adapters_is_small_and_quick(start_server, tmp_path):
    """Of one folder: what is registered costs a name, not a file."""
    write_random_adapter(tmp_path / "one", MODEL_CONFIG, rank=2)
    flags = [part for i in range(10_000) for part in ("--adapter", f"a{i:05}={tmp_path / 'one'}")]
    (tmp_path / "c.toml").write_text("adapter = [" + ",".join(f'"{flag}"' for flag in flags[1::2]) + "]\n")
    server = start_server("--config", str(tmp_path / "c.toml"), start_timeout_s=240)
    times = []
    for _ in range(30):
        time.sleep(0.06)  # each is made anew
        begin = time.perf_counter()
        answer = server.http.get("/metrics")
        times.append(time.perf_counter() - begin)
        assert len(answer.text) < 65536
    # With the way there and back, which alone takes most of it here.
    assert min(times) < 0.01


def test_a_request_is_a_tree_of_spans_below_the_caller_s(told, collector):
    before = time.time_ns()
    answer = told.http.post("/v1/chat/completions", headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "tree-1"}, json={
        "model": "sql", "messages": [{"role": "user", "content": f"Say {CANARY}!"}], "max_tokens": 8, "ignore_eos": True})
    after = time.time_ns()
    assert answer.status_code == 200
    spans = wait_until(lambda: collector.of("tree-1"), "spans", 20)
    root = next(span for span in spans if span.name == "request")
    assert sorted(span.name for span in spans) == ["adapter_load", "decode", "prefill", "queue", "request"]
    assert (root.trace_id, root.parent_id, root.kind) == (TRACE, PARENT, 2)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{root.span_id}-01"
    assert root.resource["service.name"] == "shop"
    by_name = {span.name: span for span in spans}
    assert all(span.parent_id == root.span_id and span.trace_id == TRACE for span in spans if span is not root)
    slack = 50_000_000  # clocks of two processes
    assert before - slack <= root.start_ns <= root.end_ns <= after + slack
    for span in spans:
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns
    queue, prefill, decode = (by_name[name] for name in ("queue", "prefill", "decode"))
    assert by_name["adapter_load"].end_ns <= queue.start_ns
    assert queue.end_ns == prefill.start_ns and prefill.end_ns == decode.start_ns
    usage = answer.json()["usage"]
    expected = {"http.route": "/v1/chat/completions", "http.response.status_code": 200, "gen_ai.operation.name": "chat",
                "gen_ai.request.model": "sql", "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 8}
    assert {name: root.attributes[name] for name in expected} == expected
    assert by_name["adapter_load"].attributes["loramux.adapter.name"] == "sql"
    path, headers = collector.requests[-1]
    assert path == "/v1/traces" and headers["x-tenant"] == CANARY
    assert not any(CANARY in str(span.attributes) for span in collector.spans)
    assert access(told, "tree-1")["trace_id"] == TRACE


def test_a_caller_that_does_not_sample_is_not_traced(told, collector):
    ids = {"x-request-id": "not-sampled", "traceparent": f"00-{TRACE}-{PARENT}-00"}
    told.http.post("/v1/completions", headers=ids, json={"model": "demo", "prompt": "x", "max_tokens": 1})
    told.http.post("/v1/completions", headers={"x-request-id": "sampled"}, json={"model": "demo", "prompt": "x", "max_tokens": 1})
    wait_until(lambda: collector.of("sampled"), "the later one's spans", 20)
    assert collector.of("not-sampled") == []


def test_failures_and_private_names_in_traces(told, collector):
    told.http.post("/v1/completions", headers={"x-request-id": "wrong"}, json={"model": CANARY, "prompt": "x"})
    root, = wait_until(lambda: collector.of("wrong"), "spans", 20)
    assert root.attributes["error.type"] == "model_not_found" and not root.is_error
    assert CANARY not in str(root.attributes) + told.log()


def test_a_collector_that_hangs_or_is_away_costs_nothing(start_server):
    with Collector(hangs=True) as hanging:
        for url in (hanging.url, "http://127.0.0.1:9"):
            server = start_server("--otlp-endpoint", url)
            for _ in range(20):
                complete(server.http, model="demo", prompt="x", max_tokens=1)
            def dropped():
                return {s.labels["outcome"]: s.value for s in families(server)["loramux_trace_spans"].samples}["dropped"]
            wait_until(lambda: dropped() >= 60, "spans are counted as lost", 30)
            complete(server.http, model="demo", prompt="x", max_tokens=1)
            warnings = [event for event in server.log_events() if event["level"] == "WARN" and "collector" in event["message"]]
            assert len(warnings) == 1
            server.terminate()
            assert server.wait_exit(15) == 0


def test_the_access_log_has_a_line_of_each_request_and_no_secret(start_server):
    server = start_server(api_key=f"key-{CANARY}")
    def ids(name):
        return {"x-request-id": name}
    answer = server.http.post("/v1/completions", headers=ids("good"), json={
        "model": "sql", "prompt": CANARY, "max_tokens": 5, "ignore_eos": True, "user": CANARY})
    line = access(server, "good")
    usage = answer.json()["usage"]
    assert (line["method"], line["route"], line["status"], line["model"]) == ("POST", "/v1/completions", 200, "sql")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 5)
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["ms"] and "code" not in line and "client_closed" not in line
    server.http.post("/v1/completions", headers=ids("bad"), json={"model": CANARY, "prompt": "x"})
    assert access(server, "bad") | {"status": 404, "code": "model_not_found"} == access(server, "bad")
    server.http.get(f"/{CANARY}?{CANARY}", headers=ids("nowhere"))
    assert access(server, "nowhere")["route"] == "none"
    server.http.get("/v1/models", headers=ids("keyless") | {"authorization": f"Bearer {CANARY}"})
    assert access(server, "keyless")["code"] == "invalid_api_key"
    server.http.get("/health", headers=ids("probe"))
    with server.http.stream("POST", "/v1/completions", headers=ids("left"), json={
            "model": "demo", "prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True}) as stream:
        next(stream.iter_lines())
    line = access(server, "left")
    assert line["client_closed"] is True and 0 < line["completion_tokens"] < 1900
    with server.http.stream("POST", "/v1/completions", headers=ids("streamed"), json={
            "model": "demo", "prompt": "x", "max_tokens": 6, "ignore_eos": True, "stream": True}) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    line = access(server, "streamed")
    assert line["completion_tokens"] == 6 and "client_closed" not in line
    assert "probe" not in server.log() and CANARY not in server.log()


@pytest.mark.parametrize("which", ["off", "errors"])
def test_the_access_log_can_be_less(start_server, which):
    server = start_server("--access-log", which)
    server.http.get("/v1/models", headers={"x-request-id": "good"})
    server.http.get("/nowhere", headers={"x-request-id": "bad"})
    if which == "errors":
        access(server, "bad")
    lines = [event["request_id"] for event in server.log_events() if event["target"] == "access"]
    assert lines == (["bad"] if which == "errors" else [])


def test_times_are_in_the_headers_of_replies(demo):
    bodies = {
        "/v1/completions": {"prompt": "x", "max_tokens": 8, "ignore_eos": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "ignore_eos": True},
        "/v1/responses": {"input": "x", "max_output_tokens": 8, "ignore_eos": True},
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "ignore_eos": True},
    }
    for route, body in bodies.items():
        headers = demo.http.post(route, json={"model": "demo", **body}).headers
        ms = {name: int(headers[f"x-{name}"]) for name in (
            "total-time", "validation-time", "queue-time", "inference-time", "time-to-first-token", "time-per-token", "time-per-output-token")}
        assert ms["validation-time"] + ms["queue-time"] + ms["inference-time"] <= ms["total-time"] + 2, (route, ms)
        assert ms["time-to-first-token"] <= ms["total-time"]
        assert re.fullmatch(r"validation;dur=\d+, queue;dur=\d+, inference;dur=\d+, total;dur=\d+", headers["server-timing"])
        assert "traceresponse" not in headers
    with demo.http.stream("POST", "/v1/completions", json={"model": "demo", "stream": True, **bodies["/v1/completions"]}) as stream:
        assert int(stream.headers["x-queue-time"]) >= 0 and "x-total-time" not in stream.headers
        stream.read()
    assert "x-queue-time" not in demo.http.get("/v1/models").headers


def test_lines_of_a_request_carry_its_ids(start_server):
    server = start_server("--log-level", "info,access=off")
    ids = {"x-request-id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-timeout": "0.001"}
    body = {"model": "demo", "prompt": "x", "max_tokens": 1900, "ignore_eos": True}
    assert server.http.post("/v1/completions", headers=ids, json=body).status_code == 504
    def lines():
        return [event for event in server.log_events() if event.get("code") == "deadline_exceeded"]
    line, = wait_until(lines, "the line of the failure")
    assert (line["span"]["request_id"], line["span"]["trace_id"]) == ("mine", TRACE)
    assert not [event for event in server.log_events() if event["target"] == "access"]


def test_every_metric_of_the_documentation_exists(told):
    text = (REPOSITORY / "docs/observability.md").read_text()
    named = set(re.findall(r"\b(?:vllm:|loramux_)[a-z0-9_]+", text)) - {"loramux_router"}
    found = families(told)
    samples = {sample.name for family in found.values() for sample in family.samples} | set(found)
    samples |= {f"{name}_total" for name, family in found.items() if family.type == "counter"}
    assert named and {name for name in named if name not in samples} == set()
