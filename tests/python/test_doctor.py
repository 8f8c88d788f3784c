"""`loramux doctor` and `loramux warm-kernels`, on the host emulator and without a GPU."""

import glob
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from loramux_server import REPOSITORY, run_to_end

# Kept between runs: compiling every kernel for the emulator takes a minute.
EMULATOR_CACHE = str(REPOSITORY / "target/emulator-kernels")
WITHOUT_LIBRARIES = {"CUDA_HOME": "", "CUDA_PATH": "", "VIRTUAL_ENV": ""}

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def doctor(data_dir, *flags, timeout_s: float = 280.0):
    return run_to_end("doctor", *flags, timeout_s=timeout_s, env={"XDG_CACHE_HOME": data_dir})


def on_emulator(data_dir, *flags) -> tuple[int, dict]:
    """The exit code and the JSON."""
    ended = doctor(data_dir, "--device", "emulated", "--kernel-cache", EMULATOR_CACHE, "--json", *flags)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def lines(report: dict, section: str) -> dict[str, dict]:
    found = [each for each in report["sections"] if section in each["title"]]
    assert len(found) == 1, (section, [each["title"] for each in report["sections"]])
    return {line["name"]: line for line in found[0]["lines"]}


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def libraries() -> str | None:
    """A folder with NVRTC: the one that the kernels' tests use, or this Python's."""
    places = [os.environ.get("LORAMUX_CUDA_LIB_DIR", ""), *glob.glob(f"{sys.prefix}/lib/python3*/site-packages/nvidia/cu13/lib")]
    return next((place for place in places if place and glob.glob(f"{place}/libnvrtc.so.1*")), None)


def test_the_cpu_is_well(data_dir):
    ended = doctor(data_dir, "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    assert "The CPU serves." in ended.stdout
    assert "alone and in a batch, the same" in ended.stdout


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_what_to_do(data_dir):
    looked_for = doctor(data_dir, "--json")
    assert looked_for.returncode == 0, looked_for.stderr
    report = json.loads(looked_for.stdout)
    assert report["ok"] and "serves on the CPU" in report["verdict"]
    gpu = lines(report, "device")["gpu"]
    assert gpu["status"] == "warning" and "libcuda.so" in gpu["text"]
    # Asked for by name, its absence is a failure.
    asked_for = doctor(data_dir, "--device", "cuda")
    assert asked_for.returncode == 1
    assert "FAILED" in asked_for.stdout and "--gpus all" in asked_for.stdout


@needs_emulator
def test_every_op_is_checked_on_the_emulator(data_dir, tmp_path):
    out = tmp_path / "report.json"
    code, report = on_emulator(data_dir, "--out", str(out))
    assert code == 0, report
    assert json.loads(out.read_text()) == report
    ops = lines(report, "ops")
    assert len(ops) >= 12 and all(op["status"] == "ok" and op["cases"] > 0 for op in ops.values())
    assert {"attn_decode", "attn_prefill", "lora_shrink", "lora_expand", "sampler"} <= set(ops)
    programs = lines(report, "kernels")["programs"]
    assert programs["loaded"] == programs["programs"] > 10
    assert report["is_emulated"] and "no GPU's speed" in lines(report, "speed")["copy"]["text"]


@needs_emulator
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_agrees_with_the_cpu_and_no_adapter_is_mistaken(data_dir, dtype):
    code, report = on_emulator(data_dir, "--full", "--only", "model,churn", "--switches", "40", "--dtype", dtype)
    assert code == 0, report
    model = lines(report, "built-in model")
    for name in ("prompt at once", "decode", "decode, adapters mixed", "adapters composed", "long text"):
        assert model[name]["positions"] > 0 and 0 < model[name]["rms"] <= model["compared"]["rms_max"], (name, model[name])
    assert model["greedy, steps in flight"]["equal"] > 20
    churn = lines(report, "changing places")["switches"]
    assert churn["wrong"] == 0 and churn["switches"] >= 40
    assert churn["answers"] - churn["base_answers"] > 20


@needs_emulator
@pytest.mark.parametrize("tier", ["A", "B"])
def test_the_benchmarks_run_and_do_not_pass_the_emulator_off_as_a_gpu(data_dir, tmp_path, tier):
    out = tmp_path / "bench.json"
    ended = doctor(data_dir, "--device", "emulated", "--kernel-cache", EMULATOR_CACHE, "--bench", tier, "--out", str(out),
                   "--commit", "abc123")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no GPU's speed" in ended.stdout
    report = json.loads(out.read_text())
    assert report["is_emulated"] and report["setup"]["commit"] == "abc123" and report["setup"]["model_shape"] == "tiny"
    rows = [line for section in report["sections"] for line in section["lines"] if line["status"] == "info" and "p50_us" in line]
    assert len(rows) > 3 and all(row["p50_us"] > 0 for row in rows)
    if tier == "B":
        with_adapter = [row for row in rows if row.get("adapters")]
        assert with_adapter and all(row["ratio_to_base"] > 0 for row in with_adapter)
        assert any(row.get("graph_nodes", 0) > 10 for row in rows)


def test_warm_kernels_says_what_is_missing(tmp_path):
    for flags, want in [((), "--model-id PATH, or --shape NAME"), (("--shape", "nothing"), "known are")]:
        ended = run_to_end("warm-kernels", "--arch", "sm_90a", *flags)
        assert ended.returncode == 1 and want in ended.stderr
    ended = run_to_end("warm-kernels", "--arch", "sm_90a", "--model-id", str(tmp_path / "nowhere"))
    assert ended.returncode == 1 and "nowhere" in ended.stderr


def test_warm_kernels_compiles_once(tmp_path):
    folder = libraries()
    if folder is None:
        ended = run_to_end("warm-kernels", "--arch", "sm_90a", "--shape", "demo", env=WITHOUT_LIBRARIES)
        if ended.returncode != 0:
            assert "libnvrtc.so was not found; looked in" in ended.stderr and "--cuda-libraries" in ended.stderr
        pytest.skip("NVRTC is not installed here")
    cache = tmp_path / "kernels"

    def warm(*flags):
        return run_to_end("warm-kernels", "--arch", "sm_80,sm_90a", "--kernel-cache", str(cache), "--cuda-libraries", folder, *flags,
                          timeout_s=280)
    first = warm("--shape", "demo")
    assert first.returncode == 0, first.stderr
    files = {path.name for path in cache.iterdir()}
    assert f"{len(files)} compiled, 0 were there already" in first.stdout and len(files) > 20
    # The same widths from a config.json: nothing to compile, not one file more.
    second = warm("--model-id", str(REPOSITORY / "models/demo/base"))
    assert f"0 compiled, {len(files)} were there already" in second.stdout
    assert {path.name for path in cache.iterdir()} == files
    # A damaged file is compiled again; another 16-bit type is another program, where the type matters.
    damaged = next(cache.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "1 compiled" in warm("--shape", "demo").stdout
    other = warm("--shape", "demo", "--dtype", "float16")
    assert other.returncode == 0 and "0 compiled" not in other.stdout


def test_a_cache_that_cannot_be_written_is_an_error_for_warm_kernels(tmp_path):
    folder = libraries()
    if folder is None:
        pytest.skip("NVRTC is not installed here")
    (tmp_path / "file").write_text("")
    ended = run_to_end("warm-kernels", "--arch", "sm_90a", "--shape", "demo", "--kernel-cache", str(tmp_path / "file/below"),
                       "--cuda-libraries", folder, timeout_s=280)
    assert ended.returncode == 1 and "compiled kernels are not kept" in ended.stderr


def test_the_gpu_suite_reports_a_missing_gpu(tmp_path):
    import subprocess
    from loramux_server import binary, clean_environment
    if has_gpu():
        pytest.skip("this machine has a GPU")
    script = REPOSITORY / "tests/gpu/run.sh"
    ended = subprocess.run(["bash", str(script), str(binary()), str(tmp_path), "--only", "doctor"], capture_output=True, text=True,
                           timeout=120, env={**clean_environment(), "XDG_CACHE_HOME": str(tmp_path)})
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "doctor" in ended.stdout and "FAILED" in ended.stdout
    assert json.loads(Path(tmp_path / "doctor.json").read_text())["ok"] is False
