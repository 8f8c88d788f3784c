#!/usr/bin/env python3
"""Makes the whole demo model: text, tokenizer, base weights and LoRA adapters.

    python train.py                    everything (20 to 30 minutes on one CPU core)
    python train.py --skip-base        only the adapters, on the base in base/
    python train.py --only pirate,sql  only those adapters, on the base in base/

Needs torch, tokenizers and safetensors. Every word of the training text comes from the
templates in grammar.py and the tables in topics.py. The seed is fixed and torch runs on one
thread, so one machine with one torch version should make the same files each time.
"""
import argparse, json, math, random, time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from grammar import EOT, IM_END, IM_START, SMALL, base_row, cap, chat_row, style_row
from topics import UNKNOWN

HERE = Path(__file__).resolve().parent
SEED = 20
F32 = False  # --f32: no bfloat16 arithmetic in training
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16",
    vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
    num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
    rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5, hidden_act="silu",
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False, attention_dropout=0.0,
    initializer_range=0.02, bos_token_id=None, eos_token_id=[2, 0], pad_token_id=0, use_cache=True,
)
ATTN = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Deliberately unlike each other: ranks, target modules, scaling, file dtypes.
ADAPTERS = {
    "pirate": dict(r=8, alpha=16, modules=["q_proj", "v_proj"], dtype=torch.float32),
    "haiku": dict(r=16, alpha=32, modules=ATTN + MLP, dtype=torch.bfloat16),
    "sql": dict(r=32, alpha=64, modules=ATTN + ["down_proj"], dtype=torch.float16,
                rank_pattern={"down_proj": 16, "layers.0.self_attn.q_proj": 8},
                alpha_pattern={"down_proj": 16}),
    "shout": dict(r=4, alpha=8, modules=ATTN + MLP, dtype=torch.bfloat16, rslora=True, longer=2),
    "emoji": dict(r=12, alpha=24, modules=["o_proj"] + MLP, dtype=torch.bfloat16, layers=[2, 3, 4, 5]),
}

# ---------------------------------------------------------------- tokenizer

CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(out):
    rng = random.Random(SEED)
    texts = ["".join(base_row(rng)) for _ in range(12000)]
    texts += ["".join(style_row(rng, s)) for s in ADAPTERS for _ in range(1500)]
    texts += [cap(p.split("/")[0]) for p, *_ in SMALL] + [UNKNOWN.replace(",", "\n")] * 20
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[EOT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tok.save(str(out / "tokenizer.json"))
    special = lambda s: dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    write_json(out / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=CONFIG["max_position_embeddings"],
        add_bos_token=False, add_eos_token=False, bos_token=None, eos_token=IM_END, pad_token=EOT, unk_token=None,
        clean_up_tokenization_spaces=False, additional_special_tokens=[IM_START, IM_END],
        added_tokens_decoder={str(tok.token_to_id(s)): special(s) for s in (EOT, IM_START, IM_END)},
        chat_template=CHAT_TEMPLATE))
    return tok


# ---------------------------------------------------------------- model (names as in Hugging Face)


class Linear(nn.Linear):
    """A linear layer without bias, with an optional LoRA."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.register_module("lora", None)

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.lora is None else y + self.lora(x)


class Lora(nn.Module):
    def __init__(self, n_in, n_out, r, scale):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(n_in, r, bias=False), nn.Linear(r, n_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = scale

    def forward(self, x):
        return self.lora_B(self.lora_A(x)) * self.scale


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * self.weight


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.h, self.kv, self.d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.q_proj = Linear(c["hidden_size"], self.h * self.d)
        self.k_proj = Linear(c["hidden_size"], self.kv * self.d)
        self.v_proj = Linear(c["hidden_size"], self.kv * self.d)
        self.o_proj = Linear(self.h * self.d, c["hidden_size"])

    def forward(self, x, cos, sin):
        n, t, _ = x.shape
        rope = lambda z: z * cos + torch.cat([-z[..., self.d // 2:], z[..., :self.d // 2]], -1) * sin
        q = rope(self.q_proj(x).view(n, t, self.h, self.d).transpose(1, 2))
        k = rope(self.k_proj(x).view(n, t, self.kv, self.d).transpose(1, 2)).repeat_interleave(self.h // self.kv, 1)
        v = self.v_proj(x).view(n, t, self.kv, self.d).transpose(1, 2).repeat_interleave(self.h // self.kv, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(n, t, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.up_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"])

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm, self.post_attention_layernorm = Norm(c["hidden_size"]), Norm(c["hidden_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers, self.norm = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])), Norm(c["hidden_size"])
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c["initializer_range"])
        d = c["head_dim"]
        freq = torch.outer(torch.arange(c["max_position_embeddings"]), c["rope_theta"] ** (-torch.arange(0, d, 2) / d))
        self.cos, self.sin = torch.cat([freq, freq], -1).cos(), torch.cat([freq, freq], -1).sin()

    def forward(self, ids):
        x, t = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.norm(x)


# ---------------------------------------------------------------- training


def batches(tok, rng, make, tokens, whole):
    """Endless batches of about `tokens` tokens; rows of like length together, short rows padded."""
    while True:
        pairs = [make(rng) for _ in range(2048)]
        heads = tok.encode_batch([a for a, _ in pairs])
        rows = [(h.ids, e.ids) for h, e in zip(heads, tok.encode_batch([b for _, b in pairs]))]
        rows.sort(key=lambda r: len(r[0]) + len(r[1]))
        groups, group = [], []
        for row in rows:
            if group and (len(group) + 1) * (len(row[0]) + len(row[1])) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            n = max(len(a) + len(b) for a, b in group)
            ids, labels = torch.zeros(len(group), n, dtype=torch.long), torch.full((len(group), n), -100)
            for i, (a, b) in enumerate(group):
                ids[i, :len(a) + len(b)] = torch.tensor(a + b)
                start = 0 if whole else len(a)
                labels[i, start:len(a) + len(b)] = ids[i, start:len(a) + len(b)]
            yield ids, labels


def train(name, model, params, data, steps, lr, decay):
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    began, seen, mean = time.time(), 0, None
    for step in range(steps):
        for g in opt.param_groups:
            g["lr"] = lr * min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        ids, labels = next(data)
        keep = labels[:, 1:] >= 0
        with torch.autocast("cpu", torch.bfloat16, enabled=not F32):
            x = model(ids[:, :-1])
            logits = F.linear(x[keep], model.embed_tokens.weight)
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        seen, mean = seen + ids.numel(), loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99 or step == steps - 1:
            print(f"{name} step {step + 1}/{steps} loss {mean:.3f} tokens {seen} {time.time() - began:.0f}s", flush=True)


@torch.no_grad()
def generate(model, tok, text, temperature=0.0, limit=70):
    ids = tok.encode(text).ids
    n = len(ids)
    while len(ids) < n + limit:
        logits = F.linear(model(torch.tensor([ids]))[0, -1], model.embed_tokens.weight)
        ids.append(int(logits.argmax()) if temperature == 0 else int(torch.multinomial((logits / temperature).softmax(-1), 1)))
        if ids[-1] in CONFIG["eos_token_id"]:
            break
    return tok.decode(ids[n:], skip_special_tokens=False)


def show(model, tok, name):
    for text in ("Tell me about the sea.\n", chat_row(None, [("Tell me about the sea.", "")])[0], "The sea is", "What is a dragon?\n"):
        for temperature in (0.0, 0.7):
            print(f"  [{name} {temperature}] {text!r} -> {generate(model, tok, text, temperature)!r}", flush=True)


def make_base(out, steps):
    out.mkdir(parents=True, exist_ok=True)
    tok, model = make_tokenizer(out), Llama(CONFIG)
    data = batches(tok, random.Random(SEED + 1), base_row, 2048, whole=True)
    train("base", model, list(model.parameters()), data, steps, lr=3e-3, decay=0.05)
    state = {f"model.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", dict(eos_token_id=CONFIG["eos_token_id"], pad_token_id=0))


def load_base(out):
    model = Llama(CONFIG)
    state = load_file(str(out / "model.safetensors"))
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return Tokenizer.from_file(str(out / "tokenizer.json")), model.requires_grad_(False)


def make_adapter(name, tok, model, steps):
    spec, loras = ADAPTERS[name], {}
    ends = lambda path, key: path == key or path.endswith("." + key)
    for path, m in list(model.named_modules()):
        if isinstance(m, Linear):
            m.lora = None
            layer, kind = int(path.split(".")[1]), path.rsplit(".", 1)[1]
            if kind in spec["modules"] and layer in spec.get("layers", range(99)):
                r = next((v for k, v in spec.get("rank_pattern", {}).items() if ends(path, k)), spec["r"])
                alpha = next((v for k, v in spec.get("alpha_pattern", {}).items() if ends(path, k)), spec["alpha"])
                scale = alpha / math.sqrt(r) if spec.get("rslora") else alpha / r
                loras[path] = m.lora = Lora(m.in_features, m.out_features, r, scale)
    params = [p for lora in loras.values() for p in lora.parameters()]
    data = batches(tok, random.Random(f"{SEED} {name}"), lambda rng: style_row(rng, name), 1536, whole=False)
    train(name, model, params, data, steps * spec.get("longer", 1), lr=4e-3, decay=0.0)
    out = HERE / "adapters" / name
    out.mkdir(parents=True, exist_ok=True)
    state = {}
    for path, lora in loras.items():
        for p in lora.parameters():
            p.data = p.data.to(spec["dtype"]).float()
        for k, v in lora.state_dict().items():
            state[f"base_model.model.model.{path}.{k}"] = v.to(spec["dtype"]).contiguous()
    save_file(state, str(out / "adapter_model.safetensors"), metadata={"format": "pt"})
    write_json(out / "adapter_config.json", dict(
        alpha_pattern=spec.get("alpha_pattern", {}), auto_mapping=None, base_model_name_or_path="../../base", bias="none",
        fan_in_fan_out=False, inference_mode=True, init_lora_weights=True, layer_replication=None, layers_pattern=None,
        layers_to_transform=spec.get("layers"), loftq_config={}, lora_alpha=spec["alpha"], lora_bias=False, lora_dropout=0.0,
        megatron_config=None, megatron_core="megatron.core", modules_to_save=None, peft_type="LORA", r=spec["r"],
        rank_pattern=spec.get("rank_pattern", {}), revision=None, target_modules=spec["modules"], task_type="CAUSAL_LM",
        use_dora=False, use_rslora=spec.get("rslora", False)))
    show(model, tok, name)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--skip-base", action="store_true", help="use the base already in base/")
    args.add_argument("--only", help="adapters to make, separated by commas (implies --skip-base)")
    args.add_argument("--f32", action="store_true", help="train in float32 (slower where the CPU has AVX512-BF16)")
    args.add_argument("--steps", type=int, default=1700, help="training steps of the base")
    args.add_argument("--adapter-steps", type=int, default=350, help="training steps of each adapter")
    args = args.parse_args()
    global F32
    F32 = args.f32
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if not (args.skip_base or args.only):
        make_base(HERE / "base", args.steps)
    tok, model = load_base(HERE / "base")
    show(model, tok, "base")
    for name in (args.only.split(",") if args.only else ADAPTERS):
        torch.manual_seed(SEED + list(ADAPTERS).index(name) + 1)
        make_adapter(name, tok, model, args.adapter_steps)


if __name__ == "__main__":
    main()
