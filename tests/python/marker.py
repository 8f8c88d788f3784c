"""Marker adapters: adapter i makes the demo model answer marker i, whatever the prompt.

The LoRA sits on the last layer's MLP alone. Its first rows of gate_proj and up_proj read fixed directions a_1..a_4 of the input, once
with each sign; `silu(z) z + silu(-z)(-z) = z^2` is never negative, so down_proj may add `K d_i` with a large positive K to every
position. The final norm takes the size away, and the logits are those of `d_i` alone: known here, without running the model.

The marker is the order of the three likeliest tokens, read from `logprobs` of the first token; `d_i` comes from the seed i, and seeds
whose order is not clear, or starts with an end token, are passed over. A few KB a file, and no two of 10,000 markers are equal.
"""

import functools
import json
import math
import struct

import numpy as np

from adapter_files import adapter_config, safetensors_bytes
from loramux_server import REPOSITORY

BASE = REPOSITORY / "models/demo/base"
RANK = 4
READ_GAIN = 60.0  # of gate and up: z = READ_GAIN * (a . x)
ADD_GAIN = 1000.0  # of down_proj: the base's own columns of these units must not show beside `d_i`
TOP = 3
MARGIN = 0.05  # nats between neighbours in the order; far more than 16-bit weights move it
END_TOKENS = {0, 1, 2}
CONFIG = json.loads((BASE / "config.json").read_text())
HIDDEN, INNER, LAST = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"] - 1


def _base_tensor(name: str) -> np.ndarray:
    """A tensor of the demo model as f32."""
    content = (BASE / "model.safetensors").read_bytes()
    length = struct.unpack_from("<Q", content)[0]
    entry = json.loads(content[8 : 8 + length])[name]
    start, end = (8 + length + at for at in entry["data_offsets"])
    assert entry["dtype"] == "BF16", entry
    numbers = np.frombuffer(content[start:end], "<u2").astype("<u4") << 16
    return numbers.view("<f4").reshape(entry["shape"])


@functools.cache
def _readout() -> np.ndarray:
    """[vocab, hidden]: logits of a direction behind the final norm."""
    return _base_tensor("model.embed_tokens.weight") * _base_tensor("model.norm.weight")


def _candidate(seed: int) -> np.ndarray:
    direction = np.random.default_rng(seed).standard_normal(HIDDEN).astype("<f2")
    return direction


def _logits(direction: np.ndarray) -> np.ndarray:
    wide = direction.astype("<f4")
    return _readout() @ (wide / math.sqrt(float(np.mean(wide * wide))))


@functools.cache
def _marker_and_direction(i: int) -> tuple[tuple[int, ...], np.ndarray]:
    for attempt in range(1000):
        direction = _candidate(i * 1000 + attempt)
        logits = _logits(direction)
        order = np.argpartition(-logits, TOP + 1)[: TOP + 1]
        order = order[np.argsort(-logits[order])]
        if np.min(-np.diff(logits[order])) > MARGIN and not END_TOKENS & {int(token) for token in order}:
            return tuple(int(token) for token in order[:TOP]), direction
    raise AssertionError(f"no clear marker for adapter {i}")


def marker(i: int) -> tuple[int, ...]:
    """The three likeliest tokens under adapter i, likeliest first."""
    return _marker_and_direction(i)[0]


def read_marker(reply: dict) -> tuple[int, ...]:
    """The marker in a completion that was asked with `ASK`."""
    top = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    order = sorted(top, key=top.get, reverse=True)[:TOP]
    return tuple(int(token.removeprefix("token_id:").removeprefix("token:")) for token in order)


# What a request must say so that `read_marker` can read its reply.
ASK = {"max_tokens": 1, "temperature": 0, "logprobs": TOP, "return_tokens_as_token_ids": True}


@functools.cache
def _shared() -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors that all marker adapters have: what makes the units whose sum is never negative."""
    read = np.random.default_rng(12345).standard_normal((RANK, HIDDEN))
    read = (read / np.linalg.norm(read, axis=1, keepdims=True)).astype("<f2")
    units = np.zeros((INNER, RANK), "<f2")
    add = np.zeros((1, INNER), "<f2")
    for row in range(RANK):
        units[2 * row, row], units[2 * row + 1, row] = READ_GAIN, -READ_GAIN
        add[0, 2 * row] = add[0, 2 * row + 1] = ADD_GAIN
    prefix = f"base_model.model.model.layers.{LAST}.mlp"
    tensors = {f"{prefix}.{name}_proj.lora_A.weight": ("F16", [RANK, HIDDEN], read.tobytes()) for name in ("gate", "up")}
    tensors |= {f"{prefix}.{name}_proj.lora_B.weight": ("F16", [INNER, RANK], units.tobytes()) for name in ("gate", "up")}
    tensors[f"{prefix}.down_proj.lora_A.weight"] = ("F16", [1, INNER], add.tobytes())
    return tensors


def config_bytes() -> bytes:
    """adapter_config.json; the same for all."""
    modules = [f"layers.{LAST}.mlp.{name}_proj" for name in ("gate", "up", "down")]
    config = adapter_config(RANK, modules, lora_alpha=RANK, rank_pattern={"down_proj": 1}, alpha_pattern={"down_proj": 1})
    return json.dumps(config, indent=1).encode()


def weights_bytes(i: int) -> bytes:
    """adapter_model.safetensors of adapter i."""
    prefix = f"base_model.model.model.layers.{LAST}.mlp"
    direction = _marker_and_direction(i)[1]
    return safetensors_bytes({**_shared(), f"{prefix}.down_proj.lora_B.weight": ("F16", [HIDDEN, 1], direction.tobytes())})


def files(i: int) -> dict[str, bytes]:
    """Both files of adapter i."""
    return {"adapter_config.json": config_bytes(), "adapter_model.safetensors": weights_bytes(i)}
