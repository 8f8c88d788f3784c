"""The demo model as a quantised GGUF file, written from its safetensors."""

import json
import shutil
import struct
from pathlib import Path

import numpy

from loramux_server import REPOSITORY

DEMO = REPOSITORY / "models/demo/base"
ALIGNMENT = 32
F32, Q4_0, Q8_0 = 0, 2, 8
NAMES = [("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm."), ("model.layers.", "blk."),
         ("self_attn.q_proj.", "attn_q."), ("self_attn.k_proj.", "attn_k."), ("self_attn.v_proj.", "attn_v."),
         ("self_attn.o_proj.", "attn_output."), ("mlp.gate_proj.", "ffn_gate."), ("mlp.up_proj.", "ffn_up."),
         ("mlp.down_proj.", "ffn_down."), ("input_layernorm.", "attn_norm."), ("post_attention_layernorm.", "ffn_norm.")]


def demo_tensors() -> dict[str, numpy.ndarray]:
    """The demo model's weights in f32."""
    data = (DEMO / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, found = json.loads(data[8:8 + length]), {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        first, end = (8 + length + offset for offset in tensor["data_offsets"])
        assert tensor["dtype"] == "BF16", name
        bits = numpy.frombuffer(data[first:end], "<u2").astype("<u4") << 16
        found[name] = bits.view("<f4").reshape(tensor["shape"])
    return found


def q8_0(values: numpy.ndarray) -> bytes:
    """Blocks of 32: a half-precision scale and 32 bytes."""
    blocks = values.reshape(-1, 32)
    scale = (abs(blocks).max(axis=1) / 127).astype("<f2")
    divisor = numpy.where(scale > 0, scale, 1).astype("<f4")[:, None]
    numbers = numpy.clip(numpy.rint(blocks / divisor), -127, 127).astype("i1")
    return numpy.concatenate([scale[:, None].view("u1"), numbers.view("u1")], axis=1).tobytes()


def q4_0(values: numpy.ndarray) -> bytes:
    """Blocks of 32: a half-precision scale and 16 bytes, element i in the low and i + 16 in the high nibble of byte i."""
    blocks = values.reshape(-1, 32)
    largest = numpy.take_along_axis(blocks, abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale = (largest / -8).astype("<f2")
    divisor = numpy.where(scale != 0, scale, 1).astype("<f4")[:, None]
    numbers = numpy.clip(numpy.rint(blocks / divisor) + 8, 0, 15).astype("u1")
    return numpy.concatenate([scale[:, None].view("u1"), numbers[:, :16] | numbers[:, 16:] << 4], axis=1).tobytes()


def as_pairs(values: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp's order of the rows of q and k: the halves of each head become neighbours."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_demo(folder: Path, kind: int) -> Path:
    """Writes `model.gguf` with matrices of type `kind` into `folder`, the demo's tokenizer beside it."""
    config = json.loads((DEMO / "config.json").read_text())
    numbers = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
               "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
               "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim", "vocab_size": "vocab_size"}
    metadata = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    metadata += [text(f"llama.{key}") + struct.pack("<II", 4, config[field]) for key, field in numbers.items()]
    metadata += [text(f"llama.{key}") + struct.pack("<If", 6, config[field])
                 for key, field in {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}.items()]
    metadata.append(text("tokenizer.ggml.eos_token_id") + struct.pack("<II", 4, config["eos_token_id"][0]))
    entries, data = [], b""
    for name, values in demo_tensors().items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        values = as_pairs(values, config[heads]) if heads else values
        stored = kind if values.ndim == 2 else F32
        for old, new in NAMES:
            name = name.replace(old, new)
        dims = values.shape[::-1]
        entries.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, stored, len(data)))
        data += {F32: lambda v: v.astype("<f4").tobytes(), Q4_0: q4_0, Q8_0: q8_0}[stored](values)
        data += bytes(-len(data) % ALIGNMENT)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)) + b"".join(metadata + entries)
    path = folder / "model.gguf"
    path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + data)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return path
