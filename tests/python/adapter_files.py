"""PEFT adapters as files, made with the standard library alone: for load tests and for adapters that must be refused."""

import json
import math
import random
import struct
from pathlib import Path

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ATTENTION + MLP


def module_shapes(config: dict, modules=ALL_MODULES) -> dict[str, tuple[int, int]]:
    """Full module name -> (d_out, d_in), for a Llama-like config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head_dim
    inner = config["intermediate_size"]
    shapes = {"q_proj": (heads * head_dim, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads * head_dim),
              "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    unknown = set(modules) - set(shapes)
    if unknown:
        raise ValueError(f"unknown modules {sorted(unknown)}; known: {', '.join(shapes)}")
    part = {name: "self_attn" if name in ATTENTION else "mlp" for name in shapes}
    return {f"model.layers.{layer}.{part[name]}.{name}": shapes[name]
            for layer in range(config["num_hidden_layers"]) for name in modules}


def random_bf16(rng: random.Random, count: int, rms: float) -> bytes:
    """`count` bfloat16 numbers of random sign and a root mean square within a factor 2 of `rms`.

    The low byte (lowest exponent bit and mantissa) and the sign are random bits, the other exponent bits are fixed: magnitudes lie
    between 2^e and 2^(e+2). That needs no arithmetic for each number.
    """
    half_exponent = round((math.log2(rms / 2.415) + 127) / 2)
    signs = bytes((byte & 0x80) | half_exponent for byte in range(256))
    numbers = bytearray(2 * count)
    numbers[0::2] = rng.randbytes(count)
    numbers[1::2] = rng.randbytes(count).translate(signs)
    return bytes(numbers)


def rms_of(rms: float) -> float:
    """What `random_bf16` really gives for a wanted `rms`."""
    return 2.415 * 2.0 ** (2 * round((math.log2(rms / 2.415) + 127) / 2) - 127)


def lora_tensors(shapes: dict, rank: int, seed: int) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensor name -> (dtype, shape, bytes). A keeps the size of its input, and so does B for inputs of `rank` numbers."""
    rng = random.Random(seed)
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = ("BF16", [rank, d_in], random_bf16(rng, rank * d_in, d_in ** -0.5))
        tensors[f"{prefix}.lora_B.weight"] = ("BF16", [d_out, rank], random_bf16(rng, d_out * rank, rank ** -0.5))
    return tensors


def alpha_for(shapes: dict, rank: int, gain: float) -> float:
    """The `lora_alpha` that makes |delta| = gain * |input|, for the median module."""
    gains = sorted(rms_of(d_in ** -0.5) * d_in ** 0.5 * rms_of(rank ** -0.5) * rank ** 0.5 for _, d_in in shapes.values())
    return round(gain * rank / gains[len(gains) // 2], 4)


def adapter_config(rank: int, modules, **changes) -> dict:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "demo", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": sorted(modules), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    config.update(changes)
    return {key: value for key, value in config.items() if value != "$absent"}


def safetensors_bytes(tensors: dict, metadata: dict | None = None) -> bytes:
    header, offset, data = {"__metadata__": metadata or {"format": "pt"}}, 0, []
    for name, (dtype, shape, content) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
        data.append(content)
    return with_header(json.dumps(header, separators=(",", ":")).encode(), b"".join(data))


def with_header(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def write_adapter(directory: Path, config: dict | bytes, weights: bytes):
    directory.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config, indent=1).encode()
    (directory / "adapter_config.json").write_bytes(text)
    (directory / "adapter_model.safetensors").write_bytes(weights)


def write_random_adapter(directory: Path, model_config: dict, rank: int, modules=ALL_MODULES, seed: int = 0, gain: float = 1.0) -> int:
    """A complete adapter; gives the size of its weights in bytes."""
    shapes = module_shapes(model_config, modules)
    weights = safetensors_bytes(lora_tensors(shapes, rank, seed))
    write_adapter(directory, adapter_config(rank, modules, lora_alpha=alpha_for(shapes, rank, gain)), weights)
    return len(weights)
