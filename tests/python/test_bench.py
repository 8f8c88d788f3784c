"""The benchmark and the adapter maker that docs/performance.md uses do what they say."""

import json
import subprocess
import sys
from pathlib import Path

from loramux_server import REPOSITORY
from wire import complete

HERE = Path(__file__).parent
DEMO_CONFIG = REPOSITORY / "models/demo/base"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=120)


def test_the_benchmark_counts_what_it_asked_for(demo):
    ended = run("bench.py", "--url", demo.base, "--model", "demo,sql,pirate", "--requests", "12", "--concurrency", "4", "--prompt-tokens", "10",
                "--max-tokens", "8", "--json")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    report = json.loads(ended.stdout)
    assert (report["requests"], report["failures"], report["models"]) == (12, 0, 3)
    assert report["output_tokens_per_s"] > 0 and 0 < report["ttft_ms_p50"] <= report["ttft_ms_p99"]
    assert 0 < report["itl_ms_p50"] <= report["itl_ms_p99"]


def test_the_benchmark_says_when_requests_fail(demo):
    ended = run("bench.py", "--url", demo.base, "--model", "nobody", "--requests", "2", "--no-warm")
    assert ended.returncode == 1 and "nobody" in ended.stdout


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
