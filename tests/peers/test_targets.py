"""targets.py on a made-up run: `pytest tests/peers/test_targets.py`."""

import targets


def cell(tok_s: float, ttft: float = 100.0, gap: float | None = 10.0) -> dict:
    return {"output_tokens_per_s": tok_s, "total_tokens_per_s": 3 * tok_s, "ttft_ms": {"p50": ttft}, "itl_ms": gap and {"p50": gap}}


def run(**tok_s: dict[str, list[float]]) -> dict:
    servers = [("loramux", "loramux", 1.0, 900), ("vllm base", "vllm", 20.0, 3000), ("vllm lora", "vllm", 30.0, 4000),
               ("llama.cpp lora", "llama.cpp", 1, 500)]
    rounds = [{"workload": workload.replace("_", "-"), "server": server, "others_busy": 0.5, "round": cell(value)}
              for workload, by_server in tok_s.items() for server, values in by_server.items() for value in values]
    return {"machine": {"read_gb_s": 80.0}, "rounds": rounds,
            "servers": [{"name": name, "peer": peer, "start_to_ready_s": [start], "memory": {"rss": rss, "pss": rss}, "idle_cpu": 0.0}
                        for name, peer, start, rss in servers]}


def line(text: str, beginning: str) -> list[str]:
    [found] = [line for line in text.splitlines() if line.startswith(f"| {beginning}")]
    return [field.strip() for field in found.split("|")[1:-1]]


def test_the_median_of_the_rounds_counts():
    results = targets.Results(run(base={"loramux": [100, 900, 200]}))
    assert results.get("base").output_tok_s == 200


def test_the_better_instance_of_a_peer_is_the_one_to_beat():
    text = targets.report(run(base={"loramux": [120], "vllm base": [100], "vllm lora": [60], "llama.cpp lora": [90]}))
    assert line(text, "base at 16, against the best peer")[1:4] == ["1.2", ">= 1.2", "pass"]


def test_prefill_is_held_against_vllm_alone():
    text = targets.report(run(prefill_1024={"loramux": [100], "vllm base": [125], "llama.cpp lora": [999]}))
    assert line(text, "prefill of 1024 x 4")[1:4] == ["0.8", ">= 1", "MISS"]


def test_the_memory_limit_is_the_weights_at_the_read_bandwidth():
    text = targets.report(run(base_1={"loramux": [90]}))
    measured = float(line(text, "base at 1, of the memory limit")[1])
    assert abs(measured - 100 / (80e9 / targets.WEIGHT_BYTES)) < 0.001


def test_a_round_is_held_against_the_bandwidth_measured_beside_it():
    made = run(base_1={"loramux": [90, 91, 92]})
    for entry, read in zip(made["rounds"], (40.0, 64.0, None)):
        entry["read_gb_s"] = read
    shares = sorted(100 / (read * 1e9 / targets.WEIGHT_BYTES) for read in (40.0, 64.0, 80.0))
    found = line(targets.report(made), "base at 1, of the memory limit")
    assert abs(float(found[1]) - shares[1]) < 0.001 and "40.0, 64.0, 80.0" in found[4]


def test_what_was_not_measured_is_neither_reached_nor_missed():
    text = targets.report(run(base={"loramux": [120]}))
    assert line(text, "16 distinct adapters, against the best peer")[1:4] == ["not measured", ">= 4", "-"]


def test_memory_and_start():
    text = targets.report(run(base={"loramux": [120]}))
    assert line(text, "resident memory")[1:4] == ["0.3", "<= 0.333333", "pass"]
    assert line(text, "start to ready")[3] == "pass"
