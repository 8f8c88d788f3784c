"""Adapters with more than pairs of linear modules, over the API: served on the CPU as their files say, on a device where its
kernels can, else refused with the device's and the feature's name. What they compute is compared with PEFT in
`models/tests/peft_features.rs`."""

import json
import shutil
import struct

import numpy as np
import pytest

from adapter_files import safetensors_bytes, write_adapter
from loramux_server import REPOSITORY, Server
from wire import complete

LIMITS = ["--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--arena-bytes", "64MiB",
          "--host-adapter-memory", "64MiB"]
DEMO = REPOSITORY / "models/demo"
PROMPT = "What is a dragon?\n"
# The CPU keeps activations in f32, a device in bfloat16.
TOLERANCE = 0.15


def read_safetensors(path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body, out = json.loads(data[8:8 + size]), data[8 + size:], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        piece = body[entry["data_offsets"][0]:entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(piece, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(piece, {"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
        out[name] = values.reshape(entry["shape"])
    return out


def write(directory, config: dict, tensors: dict[str, np.ndarray]):
    stored = {name: ("F32", list(values.shape), values.astype(np.float32).tobytes()) for name, values in tensors.items()}
    write_adapter(directory, config, safetensors_bytes(stored))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """`pirate` with one feature more, each under its name."""
    root = tmp_path_factory.mktemp("features")
    source = DEMO / "adapters/pirate"
    config, pairs = json.loads((source / "adapter_config.json").read_text()), read_safetensors(source / "adapter_model.safetensors")
    base = read_safetensors(DEMO / "base/model.safetensors")
    scale, rng = config["lora_alpha"] / config["r"], np.random.default_rng(1)
    vocab, hidden = base["model.embed_tokens.weight"].shape
    rank, linear = config["r"], config["target_modules"]
    dora, biased = dict(pairs), dict(pairs)
    for name in [name for name in pairs if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = pairs[name], pairs[module + ".lora_B.weight"]
        weight = base[module.removeprefix("base_model.model.") + ".weight"] + scale * b @ a
        dora[module + ".lora_magnitude_vector"] = np.linalg.norm(weight, axis=1) * (1 + 0.2 * rng.standard_normal(len(weight)))
        biased[module + ".lora_B.bias"] = 0.3 * rng.standard_normal(len(b))
    write(root / "dora", dict(config, use_dora=True), dora)
    write(root / "lora-bias", dict(config, lora_bias=True), biased)
    head = {"base_model.model.lm_head.lora_A.weight": 0.2 * rng.standard_normal((rank, hidden)),
            "base_model.model.lm_head.lora_B.weight": 0.2 * rng.standard_normal((vocab, rank))}
    write(root / "head", dict(config, target_modules=[*linear, "lm_head"]), pairs | head)
    embed = {"base_model.model.model.embed_tokens.lora_embedding_A": 0.05 * rng.standard_normal((rank, vocab)),
             "base_model.model.model.embed_tokens.lora_embedding_B": 0.05 * rng.standard_normal((hidden, rank))}
    write(root / "embed", dict(config, target_modules=[*linear, "embed_tokens"]), pairs | embed)
    # The head of the base but for one token, which becomes the answer to everything.
    saved = base["model.embed_tokens.weight"].copy()
    saved[777] *= 60.0
    write(root / "saved", dict(config, modules_to_save=["lm_head"]), pairs | {"base_model.model.lm_head.weight": saved})
    return root


@pytest.fixture(scope="module")
def cpu(data_dir, adapters):
    with Server("--device", "cpu", "--adapter-dir", str(adapters), *LIMITS, data_dir=data_dir) as server:
        yield server


@pytest.fixture(scope="module")
def device(data_dir, adapters):
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    flags = ["--device", "emulated", "--kernel-cache-dir", str(REPOSITORY / "target/emulator-kernels"), "--adapter-dir", str(adapters)]
    with Server(*flags, *LIMITS, data_dir=data_dir, start_timeout_s=280.0) as server:
        yield server


def ask(server, model, **body) -> dict:
    return complete(server.http, model=model, prompt=PROMPT, temperature=0, max_tokens=6, ignore_eos=True, return_token_ids=True,
                    **body)["choices"][0]


def test_every_feature_changes_what_is_said_and_zero_scale_is_the_base(cpu):
    base, plain = ask(cpu, "demo", logprobs=1), ask(cpu, "pirate", logprobs=1)
    for model in ["dora", "lora-bias", "head", "embed", "saved"]:
        found = ask(cpu, model, logprobs=1)
        assert found["logprobs"]["token_logprobs"] != plain["logprobs"]["token_logprobs"], model
        assert ask(cpu, model, logprobs=1, adapter_scale=0)["token_ids"] == base["token_ids"], model
    assert 777 in ask(cpu, "saved")["token_ids"] or ask(cpu, "saved")["token_ids"] != plain["token_ids"]


@pytest.mark.parametrize("model", ["dora", "lora-bias"])
def test_a_device_gives_the_tokens_of_the_cpu(device, cpu, model):
    for body in ({}, {"adapter_scale": 0.5}):
        found, expected = ask(device, model, logprobs=2, **body), ask(cpu, model, logprobs=2, **body)
        same = next((at for at, (a, b) in enumerate(zip(found["token_ids"], expected["token_ids"])) if a != b), 6)
        assert same >= 1
        for a, b in zip(found["logprobs"]["token_logprobs"][:same], expected["logprobs"]["token_logprobs"]):
            assert abs(a - b) < TOLERANCE, (model, body, found, expected)


@pytest.mark.parametrize("model, feature", [("head", "lm_head"), ("embed", "embed_tokens"), ("saved", "modules_to_save")])
def test_a_device_names_what_it_lacks(device, model, feature):
    answer = device.http.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 1})
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["code"] == "adapter_unsupported", answer.text
    assert feature in error["message"] and "not served on" in error["message"]
