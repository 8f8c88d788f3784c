"""Models that say what a test wants: every token decides the next one.

A decoder whose layers add nothing, with one-hot embeddings and a head that maps each token to its successor. Each script is a
chain of tokens of its own, begun by a special token that the chat template prints: `chat_template_kwargs: {"say": name}`.
"""

import json
from pathlib import Path

import numpy

from adapter_files import safetensors_bytes

HIDDEN = 512
END = "<|end|>"

TEMPLATE = """{% for message in messages %}<|start|>{{ message.role }}
{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|end|>
{% endfor %}{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{{ '<|say ' ~ say ~ '|>' }}"""


def _byte_alphabet() -> list[str]:
    """The characters that stand for bytes in byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _added(number: int, text: str, special: bool) -> dict:
    return dict(id=number, content=text, special=special, single_word=False, lstrip=False, rstrip=False, normalized=False)


def write_model(folder: Path, scripts: dict[str, list[str]], special: list[str]):
    """`scripts`: name -> pieces of text in order. Pieces of `special` are special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    added, following, texts = [], {}, set()

    def token(text: str, is_special: bool) -> int:
        number = len(vocabulary) + len(added)
        assert number < HIDDEN, "the scripts are too long"
        assert text not in vocabulary and text not in texts, f"{text!r} is a token already; cut the text elsewhere"
        texts.add(text)
        added.append(_added(number, text, is_special))
        return number

    end, _ = token(END, True), token("<|start|>", True)
    marks = {text: token(text, True) for text in special}
    for name, pieces in scripts.items():
        last = token(f"<|say {name}|>", True)
        for piece in pieces:
            number = marks[piece] if piece in marks else token(piece, False)
            assert last not in following and number not in following, f"{name}: {piece!r} would have two successors"
            following[last] = number
            last = number
        following[last] = end
    embedding = numpy.eye(HIDDEN, dtype=numpy.float32)
    head = numpy.zeros((HIDDEN, HIDDEN), dtype=numpy.float32)
    for number in range(HIDDEN):
        head[following.get(number, end), number] = 2.0
    zeros, ones = numpy.zeros((HIDDEN, HIDDEN), numpy.float32), numpy.ones(HIDDEN, numpy.float32)
    layer = "model.layers.0."
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": ones,
               layer + "input_layernorm.weight": ones, layer + "post_attention_layernorm.weight": ones}
    weights |= {f"{layer}self_attn.{name}_proj.weight": zeros for name in "qkvo"}
    weights |= {f"{layer}mlp.{name}_proj.weight": zeros for name in ("gate", "up", "down")}
    tensors = {name: ("F32", list(array.shape), array.tobytes()) for name, array in weights.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="float32", vocab_size=HIDDEN, hidden_size=HIDDEN,
        intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=4096, rope_theta=10000.0, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=end)
    (folder / "config.json").write_text(json.dumps(config))
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None, pre_tokenizer=level,
        post_processor=None, decoder=level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocabulary, merges=[]))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=END, chat_template=TEMPLATE)))
