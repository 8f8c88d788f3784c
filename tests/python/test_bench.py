"""`loramux bench` and the adapter maker that docs/performance.md uses do what they say."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from loramux_server import REPOSITORY, binary, children, environment, wait_until
from wire import complete

HERE = Path(__file__).parent
DEMO_CONFIG = REPOSITORY / "models/demo/base"
SMALL = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "10-20", "--output-tokens", "8", "--repeats", "2", "--warmup", "1")


def bench(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([str(binary()), "bench", *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment(None),
                          stdin=subprocess.DEVNULL)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=120)


def check_record(record: dict, workloads: list[str], rounds: int):
    """What docs/benchmarking.md says about the JSON."""
    assert set(record) == {"schema", "name", "client_version", "started_unix_s", "command", "seed", "repeats", "machine", "server", "results",
                           "stopped"}
    assert (record["schema"], record["repeats"], record["stopped"]) == ("loramux-bench/1", rounds, None)
    assert set(record["machine"]) == {"cpu", "cpus", "instruction_sets", "memory_bytes", "os"}
    assert record["machine"]["cpus"] >= 1 and record["machine"]["memory_bytes"] > 1 << 28
    assert set(record["server"]) == {"url", "version", "commit", "base_model", "adapters", "command", "start_to_ready_s", "ready_rss_bytes",
                                     "end_rss_bytes"}
    assert [result["workload"]["label"] for result in record["results"]] == workloads
    figures = {"wall_s", "output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "intruder",
               "client_cpu_s", "server_cpu_s", "server_rss_bytes"}
    for result in record["results"]:
        assert set(result) == {"workload", "rounds", "median", "against_base"}
        assert set(result["workload"]) == {"label", "name", "popularity", "concurrency", "rate_per_s", "requests", "prompt_tokens",
                                           "output_tokens", "prefix_tokens", "intruder_tokens"}
        assert len(result["rounds"]) == rounds and set(result["median"]) == figures
        for one in result["rounds"]:
            assert set(one) == figures | {"requests", "failed", "output_tokens", "prompt_tokens", "errors"}
            assert (one["failed"], one["errors"]) == (0, [])
            assert one["requests"] == result["workload"]["requests"]
            # wall_s is rounded to 0.1 ms, of which a round of the demo has 40.
            assert one["output_tokens_per_s"] == pytest.approx(one["output_tokens"] / one["wall_s"], rel=0.01 + 1e-4 / one["wall_s"])
            assert 0 < one["ttft_ms"]["p50"] <= one["ttft_ms"]["p90"] <= one["ttft_ms"]["p99"] <= one["e2e_ms"]["p99"]
            assert one["client_cpu_s"] > 0


def test_a_server_of_its_own_is_started_measured_and_ended(tmp_path):
    out, plot = tmp_path / "run.json", tmp_path / "run.svg"
    ended = bench("--adapters", "3", "--rank", "5", "--workloads", "base,one,distinct,zipf:label=pop,prefill:prompt=64:c=2:requests=4",
                  *SMALL, "--json", str(out), "--plot", str(plot), "--", "--max-num-seqs", "8", "--api-key", "s3cret")
    assert ended.returncode == 1 and "key" in ended.stderr, "the server wants a key that the client was not given"
    ended = bench("--adapters", "3", "--rank", "5", "--workloads", "base,one,distinct,zipf:label=pop,prefill:prompt=64:c=2:requests=4",
                  *SMALL, "--json", str(out), "--plot", str(plot), "--api-key", "s3cret", "--", "--max-num-seqs", "8", "--api-key", "s3cret")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    text = out.read_text()
    assert "s3cret" not in text and "s3cret" not in ended.stdout
    record = json.loads(text)
    labels = ["base", "one", "distinct", "pop", "prefill:prompt=64:c=2:requests=4"]
    check_record(record, labels, rounds=2)
    server = record["server"]
    assert (server["base_model"], server["adapters"]) == ("demo", 3)
    assert 0 < server["start_to_ready_s"] < 60 and server["ready_rss_bytes"] > 10 << 20
    assert "--max-num-seqs" in server["command"] and "***" in server["command"]
    by_label = {result["workload"]["label"]: result for result in record["results"]}
    assert by_label["base"]["rounds"][0]["output_tokens"] == 48 and 60 <= by_label["base"]["rounds"][0]["prompt_tokens"] <= 120
    assert by_label["base"]["rounds"][0]["prompt_tokens"] == by_label["one"]["rounds"][0]["prompt_tokens"]
    assert by_label["base"]["against_base"] is None and by_label["prefill:prompt=64:c=2:requests=4"]["median"]["itl_ms"] is not None
    assert by_label["one"]["against_base"]["label"] == "base"
    ratio = by_label["one"]["median"]["output_tokens_per_s"] / by_label["base"]["median"]["output_tokens_per_s"]
    assert by_label["one"]["against_base"]["output_tokens_per_s"] == pytest.approx(ratio, rel=0.01)
    assert all(one["server_cpu_s"] is not None for one in by_label["base"]["rounds"])
    assert sum(one["server_cpu_s"] for result in record["results"] for one in result["rounds"]) > 0

    lines = ended.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("1 x", "2 x")) and " x " not in line) <= 100, ended.stdout
    for label in labels[:4]:
        assert re.search(rf"^{label} ", ended.stdout, re.M), ended.stdout
    assert "start to ready" in ended.stdout and "of one processor" in ended.stdout
    root = ET.parse(plot).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"base", "distinct", "pop"} <= {(text or "").strip() for text in shown}


def test_a_running_server_is_measured_with_the_adapters_it_lists(demo, tmp_path):
    out = tmp_path / "run.json"
    ended = bench("--url", f"{demo.base}/v1", "--server-pid", str(demo.pid), "--name", "other", *SMALL, "--json", str(out),
                  "--workloads", "base,uniform,skewed,identical,base:rate=50:label=open")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    record = json.loads(out.read_text())
    check_record(record, ["base", "uniform", "skewed", "identical", "open"], rounds=2)
    assert record["name"] == "other" and record["server"]["adapters"] >= 5
    assert record["server"]["start_to_ready_s"] is None and record["server"]["ready_rss_bytes"] > 0
    assert record["results"][4]["workload"]["rate_per_s"] == 50
    again = bench("--url", demo.base, "--models", "sql,pirate", "--workloads", "distinct", *SMALL, "--json", str(out))
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text())["server"]["adapters"] == 2


def test_long_prompts_among_streams_and_shared_prefixes_are_told_apart(demo, tmp_path):
    out = tmp_path / "run.json"
    ended = bench("--url", demo.base, "--repeats", "1", "--json", str(out), "--workloads",
                  "long-prefill-intruder:c=3:requests=3:prompt=8:output=96:intruder=120,shared-prefix:prompt=100:prefix=90:output=4:requests=4")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    intruder, shared = json.loads(out.read_text())["results"]
    measured = intruder["median"]["intruder"]
    assert measured["ttft_ms"] > 0 and measured["beside_ms"]["p99"] > 0 and measured["without_ms"]["p50"] > 0
    assert "long prompt: first token after" in ended.stdout
    assert shared["rounds"][0]["prompt_tokens"] == 400


def test_more_adapters_than_slots_churn(tmp_path):
    ended = bench("--adapters", "4", "--workloads", "churn", "--repeats", "1")
    assert ended.returncode == 1 and "--max-loras" in ended.stderr
    ended = bench("--adapters", "4", "--workloads", "churn:c=2:requests=8:output=2", "--repeats", "1", "--", "--max-loras", "2")
    assert ended.returncode == 0, ended.stderr


def test_a_report_puts_servers_side_by_side(demo, tmp_path):
    files = []
    for name, extra in (("ours", ()), ("theirs", ("--concurrency", "1")), ("ours", ("--seed", "7"))):
        files.append(tmp_path / f"{len(files)}.json")
        ended = bench("--url", demo.base, "--name", name, "--workloads", "base", "--repeats", "1", "--requests", "3",
                      "--output-tokens", "6", *extra, *(() if "--concurrency" in extra else ("--concurrency", "1")),
                      "--json", str(files[-1]))
        assert ended.returncode == 0, ended.stderr
    document, plot = tmp_path / "page.md", tmp_path / "page.svg"
    document.write_text("before\n<!-- loramux bench report -->\nold\n<!-- end of report -->\nafter\n")
    ended = bench("report", *map(str, files), "--markdown", str(document), "--plot", str(plot))
    assert ended.returncode == 0, ended.stderr
    page = document.read_text()
    assert page.startswith("before\n<!-- loramux bench report -->\n") and page.endswith("<!-- end of report -->\nafter\n")
    assert "old" not in page and re.search(r"\| base \| \d+\.\d\d x theirs \|", page), page
    assert re.search(r"\| ours \| 2 \|", page) and re.search(r"\| theirs \| 1 \|", page), page
    assert ET.parse(plot).getroot().tag.endswith("svg")
    document.write_text("somebody's text")
    ended = bench("report", *map(str, files), "--markdown", str(document))
    assert ended.returncode == 1 and document.read_text() == "somebody's text"
    assert bench("report", str(files[0])).stdout.startswith("Machine: ")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    ended = bench("report", str(wrong))
    assert ended.returncode == 1 and "wrong.json: not a record" in ended.stderr


class Scripted(http.server.BaseHTTPRequestHandler):
    """A server that goes wrong as its path says."""

    protocol_version = "HTTP/1.1"
    answers: dict = {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, "application/json", b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status, content_type, content = self.server.answer(self.server.bodies)
        self.reply(status, content_type, content)

    def reply(self, status, content_type, content):
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def scripted():
    """A function that starts a server whose completions are what `answer(bodies)` gives."""
    started = []

    def start(answer):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.daemon_threads = True
        server.bodies, server.answer = [], answer
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def stream(*chunks: dict | str) -> bytes:
    return "".join(f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks).encode()


def text(piece: str) -> dict:
    return {"choices": [{"index": 0, "text": piece}]}


def test_servers_that_send_no_token_ids_are_counted_by_usage(scripted, tmp_path):
    def answer(bodies):
        usage = {"choices": [], "usage": {"completion_tokens": bodies[-1]["max_tokens"]}}
        return 200, "text/event-stream", stream(text("a"), text("bc"), usage, "[DONE]")

    server, url = scripted(answer)
    out = tmp_path / "run.json"
    ended = bench("--url", url, "--lora-ids", "0..2", "--workloads", "distinct", *SMALL, "--extra-body", '{"ignore_eos": null, "n_probs": 0}',
                  "--json", str(out))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert json.loads(out.read_text())["results"][0]["rounds"][0]["output_tokens"] == 48
    loras = {tuple(entry["scale"] for entry in body["lora"]) for body in server.bodies}
    assert loras == {(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    assert all("ignore_eos" not in body and body["n_probs"] == 0 and body["model"] == "m" for body in server.bodies)


class Paced(http.server.BaseHTTPRequestHandler):
    """Sends its first token after 80 ms and each of the others 20 ms after the one before."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        content = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        tokens = json.loads(self.rfile.read(int(self.headers["content-length"])))["max_tokens"]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for index in range(tokens):
            time.sleep(0.08 if index == 0 else 0.02)
            self.chunk(stream(text("a")))
        self.chunk(stream("[DONE]"))
        self.chunk(b"")

    def chunk(self, content: bytes):
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()


def test_times_are_those_of_a_server_whose_times_are_known(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Paced)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path / "run.json"
    try:
        ended = bench("--url", f"http://127.0.0.1:{server.server_port}", "--workloads", "base", "--concurrency", "2", "--requests", "6",
                      "--output-tokens", "11", "--repeats", "1", "--json", str(out))
    finally:
        server.shutdown()
        server.server_close()
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(out.read_text())["results"][0]["median"]
    # A busy machine only adds to a time; so the lower bounds are strict and the upper ones are not.
    assert 80 <= figures["ttft_ms"]["p50"] < 130, figures
    assert 19.5 <= figures["itl_ms"]["p50"] < 40 and 20 <= figures["tpot_ms"]["p50"] < 40, figures
    assert 280 <= figures["e2e_ms"]["p50"] < 560, figures
    assert 3 * 0.28 <= figures["wall_s"] < 3 * 0.56, figures
    assert figures["output_tokens_per_s"] == pytest.approx(66 / figures["wall_s"], rel=0.01)


def test_no_run_repeats_the_prompts_of_another_unless_it_is_told_to(scripted):
    def answer(bodies):
        usage = {"choices": [], "usage": {"completion_tokens": bodies[-1]["max_tokens"]}}
        return 200, "text/event-stream", stream(text("a"), usage, "[DONE]")

    def prompts(*flags: str) -> set[tuple]:
        server, url = scripted(answer)
        ended = bench("--url", url, "--workloads", "base,base:label=again", *SMALL, *flags)
        assert ended.returncode == 0, ended.stderr
        found = [tuple(body["prompt"][:8]) for body in server.bodies[1:]]  # the first request looks whether the server answers
        assert len(found) == len(set(found)) == 2 * (1 + 2 * 6)
        return set(found)

    assert not prompts() & prompts()
    assert prompts("--seed", "5") == prompts("--seed", "5")


def test_failures_are_counted_by_kind_and_said(scripted):
    def short_after_the_warm_up(bodies):
        if len(bodies) > 2 and len(bodies) % 2:
            return 200, "text/event-stream", stream(text("a"), {"choices": [], "usage": {"completion_tokens": 1}}, "[DONE]")
        usage = {"choices": [], "usage": {"completion_tokens": bodies[-1]["max_tokens"]}}
        return 200, "text/event-stream", stream(text("a"), usage, "[DONE]")

    _, url = scripted(short_after_the_warm_up)
    ended = bench("--url", url, "--workloads", "base", *SMALL)
    assert ended.returncode == 1
    assert "failed (token_count): 1 tokens instead of 8" in ended.stdout, ended.stdout

    cases = [
        ((404, "application/json", b'{"error": {"message": "no such model"}}'), "404: no such model"),
        ((200, "application/json", b'{"choices": [{"text": "a"}]}'), "no server-sent events"),
        ((200, "text/event-stream", stream(text("a"), {"error": {"message": "out of memory"}}, "[DONE]")), "out of memory"),
        ((200, "text/event-stream", b""), "no server-sent events"),
    ]
    for answer, want in cases:
        _, url = scripted(lambda _, answer=answer: answer)
        ended = bench("--url", url, "--workloads", "base", *SMALL)
        assert ended.returncode == 1 and want in ended.stderr, (want, ended.stderr)
        assert "the first request of `m` failed" in ended.stderr


def test_mistakes_are_said_before_anything_runs(tmp_path):
    for arguments, want in [
        (("--url", "http://127.0.0.1:1"), "does not answer"),
        (("--url", "nonsense"), "must be http://host:port"),
        (("--workloads", "bose"), "known: base, one"),
        (("--workloads", "base,base"), "two are called `base`"),
        (("--json", str(tmp_path / "no/such/folder.json")), "cannot write"),
        (("--extra-body", "[]"), "must be a JSON object"),
        (("--workloads", "base", "--", "--model-id", "/nonexistent"), "no such file"),
        (("--adapters", "2", "--", "--model-id", "/nonexistent"), "no file or folder"),
        (("--", "--log-format", "text"), "leave it out"),
        (("--", "--no-such-flag"), "no-such-flag"),
    ]:
        ended = bench(*arguments)
        assert ended.returncode == 1 and want in ended.stderr, (arguments, ended.stderr)
        assert ended.stdout == ""
    assert bench("--help").stdout.count("loramux bench") > 5


def test_a_server_that_dies_ends_the_run_with_what_was_measured(start_server, tmp_path):
    server = start_server()
    out = tmp_path / "run.json"
    process = subprocess.Popen([str(binary()), "bench", "--url", server.base, "--workloads", "base", "--repeats", "1000", "--requests", "4",
                                "--output-tokens", "8", "--json", str(out)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(None))
    try:
        for line in process.stderr:
            if "round 2/" in line:
                break
        server.close()
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Stopped before the end" in stdout, stdout
    record = json.loads(out.read_text())
    assert len(record["results"][0]["rounds"]) >= 2 and record["results"][0]["median"]["output_tokens_per_s"] > 0


def test_an_interrupt_prints_what_was_measured_and_leaves_no_server(tmp_path):
    process = subprocess.Popen([str(binary()), "bench", "--workloads", "base", "--repeats", "1000", "--requests", "4", "--output-tokens", "8"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(None))
    try:
        for line in process.stderr:
            if "round 1/" in line:
                break
        started = children(process.pid)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in stdout and re.search(r"^base +\d", stdout, re.M), stdout
    assert len(started) == 1
    wait_until(lambda: not os.path.exists(f"/proc/{started[0]}"), "the server has ended")


def test_a_killed_benchmark_leaves_no_server():
    process = subprocess.Popen([str(binary()), "bench", "--workloads", "base", "--repeats", "1000", "--requests", "4", "--output-tokens", "8"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(None))
    for line in process.stderr:
        if "round 1/" in line:
            break
    started = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert len(started) == 1
    wait_until(lambda: not os.path.exists(f"/proc/{started[0]}"), "the server has ended", timeout_s=30)


def test_made_adapters_are_served_and_unlike_each_other(start_server, tmp_path):
    ended = run("make_adapters.py", str(DEMO_CONFIG), str(tmp_path), "--n", "6", "--ranks", "4,17,64", "--prefix", "x")
    assert ended.returncode == 0, ended.stderr
    server = start_server("--adapter-dir", str(tmp_path))
    texts = {complete(server.http, model=model, prompt="Tell me about the sea.\n", temperature=0, max_tokens=16)["choices"][0]["text"]
             for model in ["demo", *(f"x{i}" for i in range(6))]}
    assert len(texts) == 7
    again = tmp_path / "again"
    run("make_adapters.py", str(DEMO_CONFIG), str(again), "--n", "6", "--ranks", "4,17,64", "--prefix", "x")
    for i in range(6):
        assert (tmp_path / f"x{i}/adapter_model.safetensors").read_bytes() == (again / f"x{i}/adapter_model.safetensors").read_bytes()
