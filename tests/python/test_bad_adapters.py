"""Adapters that must be refused, served from a folder by --adapter-dir: exact status, code and a message that says why.

Each entry of `BAD` writes one folder. The same folder holds a good adapter, which must go on working, and must not change.
"""

import json
import os
import struct
from pathlib import Path

import pytest

from adapter_files import (adapter_config, lora_tensors, module_shapes, safetensors_bytes, with_header, write_adapter,
                           write_random_adapter)
from loramux_server import REPOSITORY, Server, run_to_end
from wire import check_error, complete

MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
QV = ("q_proj", "v_proj")
SHAPES = module_shapes(MODEL_CONFIG, QV)
RANK = 4
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
GOOD = dict(model="good", prompt="Tell me about the sea.\n", temperature=0, max_tokens=16)


def tensors() -> dict:
    return lora_tensors(SHAPES, RANK, seed=1)


def good_weights() -> bytes:
    return safetensors_bytes(tensors())


def with_config(**changes):
    return lambda d: write_adapter(d, adapter_config(RANK, QV, **changes), good_weights())


def with_config_bytes(content: bytes):
    return lambda d: write_adapter(d, content, good_weights())


def with_weights(make):
    return lambda d: write_adapter(d, adapter_config(RANK, QV), make())


def changed(change) -> bytes:
    """The good tensors after `change(tensors)`."""
    all_tensors = tensors()
    change(all_tensors)
    return safetensors_bytes(all_tensors)


def replaced(name: str, dtype: str, shape: list, content: bytes):
    return with_weights(lambda: changed(lambda t: t.__setitem__(name, (dtype, shape, content))))


def renamed(old: str, new: str):
    return with_weights(lambda: changed(lambda t: t.__setitem__(new, t.pop(old))))


def value_at_the_end(bits: int):
    def change(all_tensors):
        dtype, shape, content = all_tensors[FIRST]
        all_tensors[FIRST] = (dtype, shape, content[:-2] + struct.pack("<H", bits))
    return with_weights(lambda: changed(change))


def header(text: str | bytes, data: bytes = b""):
    raw = text if isinstance(text, bytes) else text.encode()
    return with_weights(lambda: with_header(raw, data))


def one_tensor(**members) -> str:
    return json.dumps({FIRST: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2], **members}})


def without(*files: str):
    def make(directory: Path):
        write_adapter(directory, adapter_config(RANK, QV), good_weights())
        for file in files:
            (directory / file).unlink()
    return make


def pickled(directory: Path):
    without("adapter_model.safetensors")(directory)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.")


def fifo(file: str):
    def make(directory: Path):
        without(file)(directory)
        os.mkfifo(directory / file)
    return make


def linked(file: str, target: str):
    def make(directory: Path):
        without(file)(directory)
        (directory / file).symlink_to(target)
    return make


def folder_as_file(directory: Path):
    without("adapter_model.safetensors")(directory)
    (directory / "adapter_model.safetensors").mkdir()


def other_base(directory: Path):
    write_random_adapter(directory, {**MODEL_CONFIG, "hidden_size": 128, "head_dim": 32}, RANK, QV)


def deeper_base(directory: Path):
    write_random_adapter(directory, {**MODEL_CONFIG, "num_hidden_layers": 9}, RANK, QV)


def of_rank(rank: int):
    return lambda d: write_random_adapter(d, MODEL_CONFIG, rank, ("q_proj",))


def dora(directory: Path):
    magnitude = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    write_adapter(directory, adapter_config(RANK, QV, use_dora=True),
                  changed(lambda t: t.__setitem__(magnitude, ("BF16", [192], bytes(384)))))


INVALID, UNSUPPORTED, MISMATCH = "adapter_invalid", "adapter_unsupported", "adapter_base_mismatch"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"

# name -> (what writes it, code, words that the message must hold)
BAD = {
    "config-missing": (without("adapter_config.json"), INVALID, ["adapter_config.json"]),
    "weights-missing": (without("adapter_model.safetensors"), INVALID, ["adapter_model.safetensors"]),
    "empty-folder": (without("adapter_config.json", "adapter_model.safetensors"), INVALID, ["adapter_config.json"]),
    "pickle": (pickled, UNSUPPORTED, ["adapter_model.bin"]),
    "config-not-json": (with_config_bytes(b"{'r': 4}"), INVALID, ["adapter_config.json"]),
    "config-empty": (with_config_bytes(b""), INVALID, ["adapter_config.json"]),
    "config-array": (with_config_bytes(b"[]"), INVALID, ["adapter_config.json"]),
    "config-duplicate-key": (with_config_bytes(b'{"r": 4, "r": 8}'), INVALID, ["adapter_config.json"]),
    "config-nan": (with_config_bytes(json.dumps(adapter_config(RANK, QV, lora_alpha=float("nan"))).encode()), INVALID, []),
    "config-deep": (with_config_bytes(b'{"r":' + b"[" * 5000 + b"]" * 5000 + b"}"), INVALID, []),
    "config-huge": (with_config_bytes(b'{"a":"' + b"x" * 70000 + b'"}'), "adapter_too_large", ["65536"]),
    "config-not-utf8": (with_config_bytes(b'{"r": "\xff"}'), INVALID, []),
    "r-missing": (with_config(r="$absent"), INVALID, ["`r`"]),
    "r-0": (with_config(r=0), INVALID, ["`r`", "0"]),
    "r-negative": (with_config(r=-4), INVALID, ["`r`", "-4"]),
    "r-float": (with_config(r=4.5), INVALID, ["`r`", "4.5"]),
    "r-text": (with_config(r="4"), INVALID, ["`r`"]),
    "r-huge": (with_config(r=10**9), "adapter_rank_limit", ["1000000000", "512", "--max-lora-rank"]),
    "r-513": (of_rank(513), "adapter_rank_limit", ["513", "512", "--max-lora-rank"]),
    "r-other-than-the-tensors": (with_config(r=8), INVALID, ["rank 8"]),
    "rank-pattern-other": (with_config(rank_pattern={"layers.0.self_attn.q_proj": 2}), INVALID, ["rank 2"]),
    "rank-pattern-bomb": (with_config(rank_pattern={"(((a{500}){500}){500})": 2}), INVALID, ["rank_pattern"]),
    "rank-pattern-many": (with_config(rank_pattern={f"m{i}": 2 for i in range(257)}), INVALID, ["rank_pattern", "257"]),
    "alpha-missing": (with_config(lora_alpha="$absent"), INVALID, ["`lora_alpha`"]),
    "alpha-text": (with_config(lora_alpha="16"), INVALID, ["`lora_alpha`"]),
    "alpha-huge": (with_config(lora_alpha=1e30), INVALID, ["`lora_alpha`"]),
    "peft-type-missing": (with_config(peft_type="$absent"), INVALID, ["peft_type"]),
    "peft-type-other": (with_config(peft_type="IA3"), UNSUPPORTED, ["IA3"]),
    "task-other": (with_config(task_type="SEQ_CLS"), UNSUPPORTED, ["SEQ_CLS"]),
    "dora-half": (dora, INVALID, ["lora_magnitude_vector", "missing"]),
    "dora-in-the-file-alone": (replaced(MAGNITUDE, "BF16", [192], bytes(384)), INVALID, ["lora_magnitude_vector", "does not target"]),
    "bias-tensor": (replaced("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "BF16", [192], bytes(384)),
                    INVALID, ["base_layer.bias", "does not target"]),
    "lora-bias-missing": (with_config(lora_bias=True), INVALID, ["lora_B.bias", "missing"]),
    "modules-to-save-missing": (with_config(modules_to_save=["lm_head"]), INVALID, ["lm_head.weight", "missing"]),
    "modules-to-save-other": (with_config(modules_to_save=["norm"]), UNSUPPORTED, ["modules_to_save", "norm"]),
    "lm-head-target": (with_config(target_modules=["q_proj", "v_proj", "lm_head"]), INVALID, ["lm_head.lora_A.weight", "missing"]),
    "lm-head-tensor": (replaced("base_model.model.lm_head.lora_A.weight", "BF16", [4, 192], bytes(1536)), INVALID, ["lm_head.lora_A", "does not target"]),
    "embed-tensor": (replaced("base_model.model.model.embed_tokens.lora_embedding_A", "BF16", [4, 2048], bytes(16384)), INVALID,
                     ["lora_embedding_A", "does not target"]),
    "pissa": (with_config(init_lora_weights="pissa"), UNSUPPORTED, ["pissa"]),
    "unknown-field-set": (with_config(an_idea_of_2031={"on": True}), UNSUPPORTED, ["an_idea_of_2031"]),
    "targets-missing": (with_config(target_modules=[]), INVALID, ["target_modules"]),
    "targets-nothing": (with_config(target_modules=["c_attn"]), INVALID, ["q_proj"]),
    "targets-fewer-than-the-file": (with_config(target_modules=["q_proj"]), INVALID, ["v_proj"]),
    "targets-more-than-the-file": (with_config(target_modules=["q_proj", "v_proj", "o_proj"]), INVALID, ["o_proj", "missing"]),
    "unmatched-module": (renamed(FIRST, FIRST.replace("q_proj", "qkv")), MISMATCH, ["qkv"]),
    "unmatched-layer": (deeper_base, MISMATCH, ["layers.6"]),
    "unnamed-tensor": (replaced("strange", "BF16", [1, 1], bytes(2)), INVALID, ["strange"]),
    "half-a-pair": (with_weights(lambda: changed(lambda t: t.pop(FIRST))), INVALID, [FIRST]),
    "other-base": (other_base, MISMATCH, ["128", "192"]),
    "transposed": (replaced(FIRST, "BF16", [192, RANK], bytes(192 * RANK * 2)), MISMATCH, [FIRST]),
    "one-dimension": (replaced(FIRST, "BF16", [192 * RANK], bytes(192 * RANK * 2)), INVALID, [FIRST]),
    "three-dimensions": (replaced(FIRST, "BF16", [1, RANK, 192], bytes(192 * RANK * 2)), "ANY", []),
    "integers": (replaced(FIRST, "I16", [RANK, 192], bytes(192 * RANK * 2)), UNSUPPORTED, [FIRST]),
    "float8": (replaced(FIRST, "F8_E4M3", [RANK, 192], bytes(192 * RANK)), UNSUPPORTED, [FIRST]),
    "nan": (value_at_the_end(0x7FC0), INVALID, [FIRST, "NaN"]),
    "infinity": (value_at_the_end(0x7F80), INVALID, [FIRST, "inf"]),
    "minus-infinity": (value_at_the_end(0xFF80), INVALID, [FIRST, "-inf"]),
    "file-empty": (with_weights(lambda: b""), INVALID, []),
    "file-7-bytes": (with_weights(lambda: b"1234567"), INVALID, []),
    "file-truncated": (with_weights(lambda: good_weights()[:-100]), INVALID, []),
    "file-truncated-in-the-header": (with_weights(lambda: good_weights()[:200]), INVALID, []),
    "file-with-trailing-bytes": (with_weights(lambda: good_weights() + b"more"), INVALID, []),
    "file-of-html": (with_weights(lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"), "ANY", []),
    "header-length-u64-max": (with_weights(lambda: b"\xff" * 8 + good_weights()[8:]), "ANY", []),
    "header-length-20-mib": (with_weights(lambda: struct.pack("<Q", 20 << 20) + b"{" + b" " * (20 << 20)), "adapter_too_large", []),
    "header-no-json": (header("not json"), INVALID, []),
    "header-array": (header("[]"), INVALID, []),
    "header-deep": (header("[" * 100_000), INVALID, []),
    "header-duplicate-key": (header('{"a":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]},"a":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]}}',
                                    b"xx"), INVALID, []),
    "header-of-65537-tensors": (header(json.dumps({f"t{i}": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for i in range(65537)})),
                                "adapter_too_large", ["65537", "65536"]),
    "header-shape-overflow": (header(one_tensor(shape=[2**62, 2**62]), b"xx"), INVALID, []),
    "header-shape-negative": (header(one_tensor(shape=[-1, -2]), b"xx"), INVALID, []),
    "header-shape-of-text": (header(one_tensor(shape=["1", "1"]), b"xx"), INVALID, []),
    "header-offsets-past-the-end": (header(one_tensor(shape=[1, 100], data_offsets=[0, 200]), b"xx"), INVALID, []),
    "header-offsets-backwards": (header(one_tensor(data_offsets=[2, 0]), b"xx"), INVALID, []),
    "header-offsets-other-than-the-shape": (header(one_tensor(shape=[1, 2]), b"xx"), INVALID, []),
    "header-offsets-overlap": (header(json.dumps({name: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]} for name in "ab"}), b"xx"),
                               INVALID, []),
    "header-hole": (header(one_tensor(data_offsets=[2, 4]), b"xxxx"), INVALID, []),
    "header-empty": (header("{}"), INVALID, []),
    "config-fifo": (fifo("adapter_config.json"), INVALID, ["adapter_config.json"]),
    "weights-fifo": (fifo("adapter_model.safetensors"), INVALID, ["adapter_model.safetensors"]),
    "weights-folder": (folder_as_file, INVALID, ["adapter_model.safetensors"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    for name, (make, _, _) in BAD.items():
        (root / name).mkdir()
        make(root / name)
    write_random_adapter(root / "good", MODEL_CONFIG, 8)
    write_random_adapter(root / "good-512", MODEL_CONFIG, 512, ("q_proj",), gain=8)
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "file").write_text("no folder")
    (root.parent / "outside").mkdir(exist_ok=True)
    write_random_adapter(root.parent / "outside" / "hidden", MODEL_CONFIG, 4)
    (root / "leads-outside").symlink_to(root.parent / "outside" / "hidden")
    linked("adapter_model.safetensors", "/dev/zero")(root / "device")
    (root / ".hidden").symlink_to(root.parent / "outside" / "hidden")
    return root


@pytest.fixture(scope="module")
def server(folder, data_dir):
    with Server("--adapter-dir", str(folder), data_dir=data_dir) as server:
        yield server


@pytest.fixture(scope="module")
def good_text(server):
    return complete(server.http, **GOOD)["choices"][0]["text"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_by_name(server, good_text, name):
    _, code, words = BAD[name]
    answer = server.http.post("/v1/completions", json={**GOOD, "model": name}, timeout=20)
    error = check_error(answer.json())
    assert answer.status_code == 422, error
    assert code in (error["code"], "ANY"), error
    assert error["message"].startswith(f"adapter `{name}`: "), error
    for word in words:
        assert word in error["message"], (word, error["message"])
    assert len(error["message"]) < 2000 and not error["retryable"]
    assert complete(server.http, **GOOD)["choices"][0]["text"] == good_text


def test_a_bad_adapter_in_a_composition_is_refused_by_its_own_name(server, good_text):
    body = {**GOOD, "model": "demo", "compose": [{"adapter": "good", "weight": 0.5}, {"adapter": "nan", "weight": 0.5}]}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 422 and check_error(answer.json())["message"].startswith("adapter `nan`: ")


@pytest.mark.parametrize("name", ["nowhere", "dangling", "file", "..", ".", "../outside/hidden", "outside/hidden", "leads-outside", "device",
                                  ".hidden", "good/", "good/adapter_config.json", "%2e%2e", "good\x00", "GOOD"])
def test_a_name_that_is_no_adapter_folder_is_not_found(server, name):
    answer = server.http.post("/v1/completions", json={**GOOD, "model": name})
    assert answer.status_code == 404
    assert check_error(answer.json())["code"] == "model_not_found"


def test_a_stream_is_refused_with_a_status_too(server):
    answer = server.http.post("/v1/completions", json={**GOOD, "model": "nan", "stream": True})
    assert answer.status_code == 422 and check_error(answer.json())["code"] == INVALID


def test_the_largest_rank_is_served(server):
    text = complete(server.http, **{**GOOD, "model": "good-512"})["choices"][0]["text"]
    assert text != complete(server.http, **{**GOOD, "model": "demo"})["choices"][0]["text"]


def test_bad_adapters_are_not_listed_and_cost_nothing(server, good_text):
    names = {card["id"] for card in server.http.get("/v1/models").json()["data"]}
    assert not names & set(BAD), "listed only once usable"
    assert server.metric("loramux_shard_restarts_total") == 0


def test_an_adapter_named_on_the_command_line_must_exist(tmp_path):
    ended = run_to_end("--port", "0", "--adapter", f"x={tmp_path}/nowhere")
    assert ended.returncode == 1 and "no such directory" in ended.stderr and str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr and "panicked" not in ended.stderr
