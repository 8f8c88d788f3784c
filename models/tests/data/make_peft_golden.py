#!/usr/bin/env python3
"""Writes peft/: adapters made with PEFT for tiny seeded models, and what transformers + PEFT compute with them.

    python make_peft_golden.py            write peft/
    python make_peft_golden.py --check    compute again from the adapters that are there, and compare

Needs torch, transformers and peft. The base models are not stored: their weights come from the same generator as
`tiny_weights` in ../support/mod.rs. Every parameter that training would change gets seeded noise, so that no feature is at
its neutral start. All arithmetic is float32 on the CPU. Decoding is greedy and never stops at an end token.

Composition and scale have no direct counterpart in PEFT (its DoRA reads the sum of the adapters before it), so their
reference is what they mean: base weights plus `scale * (merged weights - base weights)` of every adapter.
"""
import json, sys, warnings
from pathlib import Path

import numpy as np
import peft, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent / "peft"
SEED, STEPS, MASK = 0xFEA7_0001, 12, (1 << 64) - 1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=88, vocab_size=101,
            max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, hidden_act="silu")
MODELS = {"llama": ("llama", False), "tied": ("llama", True), "qwen2": ("qwen2", False)}
PROMPTS = [[5, 17, 3, 88, 41, 60, 7], [99, 0, 1, 100, 23, 23, 54, 12, 76, 31, 8]]


class Random:
    """SplitMix64, as in ../support/mod.rs."""

    def __init__(self, seed):
        self.state = seed

    def unit(self):
        self.state = (self.state + 0x9E37_79B9_7F4A_7C15) & MASK
        z = ((self.state ^ (self.state >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
        return np.float32((z ^ (z >> 31)) >> 40) / np.float32(1 << 23) - np.float32(1)

    def tensor(self, shape, centre, spread):
        values = [np.float32(centre) + np.float32(spread) * self.unit() for _ in range(int(np.prod(shape)))]
        return torch.tensor(np.array(values, dtype=np.float32)).reshape(shape)


def base_weights(kind, tied):
    random, out = Random(SEED), {}
    hidden, vocab, wide, head_dim = 48, 101, 88, 8
    q, kv = 6 * head_dim, 2 * head_dim
    out["model.embed_tokens.weight"] = random.tensor([vocab, hidden], 0, 1.0)
    out["model.norm.weight"] = random.tensor([hidden], 1, 0.3)
    if not tied:
        out["lm_head.weight"] = random.tensor([vocab, hidden], 0, 0.3)
    modules = [("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
               ("self_attn.o_proj", hidden, q), ("mlp.gate_proj", wide, hidden), ("mlp.up_proj", wide, hidden),
               ("mlp.down_proj", hidden, wide)]
    for layer in range(3):
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            out[f"model.layers.{layer}.{norm}.weight"] = random.tensor([hidden], 1, 0.3)
        for module, d_out, d_in in modules:
            out[f"model.layers.{layer}.{module}.weight"] = random.tensor([d_out, d_in], 0, 0.25)
            if kind == "qwen2" and module[-6:] in ("q_proj", "k_proj", "v_proj"):
                out[f"model.layers.{layer}.{module}.bias"] = random.tensor([d_out], 0, 0.5)
    return out


def base_model(name):
    kind, tied = MODELS[name]
    cls, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[kind]
    model = cls(config(**TINY, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                       attn_implementation="eager")).eval()
    missing, unexpected = model.load_state_dict(base_weights(kind, tied), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def adapter(model, name, dtype="float32", save_embeddings=False, **config):
    return dict(model=model, name=name, dtype=dtype, save_embeddings=save_embeddings,
                config=dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))


ADAPTERS = [
    adapter("llama", "plain", target_modules=["q_proj", "v_proj"]),
    adapter("llama", "dora", target_modules=LINEAR, use_dora=True),
    adapter("llama", "dora-bf16", dtype="bfloat16", target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True, use_rslora=True,
            rank_pattern={"o_proj": 17}, alpha_pattern={"up_proj": 3}),
    adapter("llama", "lora-bias", target_modules=["q_proj", "k_proj", "down_proj"], lora_bias=True),
    adapter("llama", "head", target_modules=["v_proj", "lm_head"], rank_pattern={"lm_head": 18}, use_rslora=True),
    adapter("llama", "embed", target_modules=["v_proj", "embed_tokens"], rank_pattern={"embed_tokens": 19}),
    adapter("llama", "ends-saved", save_embeddings=True, target_modules=["embed_tokens", "lm_head"]),
    adapter("llama", "ends-dora", target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True),
    adapter("llama", "save-head", dtype="float16", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    adapter("llama", "save-embed", dtype="bfloat16", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    adapter("llama", "everything", target_modules=LINEAR + ["lm_head"], use_dora=True, modules_to_save=["embed_tokens"],
            use_rslora=True, rank_pattern={"layers.1.mlp.up_proj": 20}),
    adapter("tied", "tied-head", target_modules=["q_proj", "lm_head"]),
    adapter("tied", "tied-embed", target_modules=["q_proj", "embed_tokens"]),
    adapter("tied", "tied-embed-saved", save_embeddings=True, target_modules=["q_proj", "embed_tokens"]),
    adapter("tied", "tied-dora", target_modules=["embed_tokens", "lm_head", "k_proj"], use_dora=True),
    adapter("tied", "tied-save-head", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    adapter("tied", "tied-save-embed", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    adapter("tied", "tied-save-both", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    adapter("qwen2", "bias-all", target_modules=["q_proj", "o_proj"], bias="all"),
    adapter("qwen2", "bias-lora-only", target_modules=["k_proj", "up_proj"], bias="lora_only"),
    adapter("qwen2", "qwen-lora-bias", target_modules=["q_proj", "down_proj"], lora_bias=True),
    adapter("qwen2", "qwen-dora-bias", target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True, bias="all"),
]
# Weighted sums of merged deltas.
SUMS = [
    ("llama", [("dora", 0.5)]),
    ("llama", [("everything", -0.75)]),
    ("llama", [("dora", 1.0), ("head", 0.5)]),
    ("llama", [("save-head", 0.5), ("ends-dora", 1.25)]),
    ("llama", [("save-embed", 0.5), ("embed", -1.0)]),
    ("llama", [("everything", 0.5), ("save-head", 0.5), ("plain", 2.0)]),
    ("qwen2", [("bias-all", 0.5), ("qwen-dora-bias", 0.5)]),
    ("tied", [("tied-save-both", 0.5), ("tied-dora", 0.5)]),
]


@torch.no_grad()
def make(entry):
    torch.manual_seed(sum(map(ord, entry["name"])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(entry["model"]), LoraConfig(**entry["config"]))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.copy_(0.3 * noise)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "modules_to_save" in name:
                parameter.add_(0.15 * noise)
            else:
                parameter.add_(0.2 * noise)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, entry["dtype"]))
        directory = HERE / entry["name"]
        model.save_pretrained(directory, save_embedding_layers=entry["save_embeddings"])
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = entry["model"]
    for name in ["target_modules", "modules_to_save"]:
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def untied(model):
    """With a head of its own, so that merging into one end leaves the other alone."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    return model


def load(base, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, HERE / name).float().eval()


@torch.no_grad()
def weighted(model, parts):
    """The base with `scale * (merged - base)` of each part."""
    out = untied(base_model(model))
    base = {k: v.clone() for k, v in out.state_dict().items()}
    total = {k: v.clone() for k, v in base.items()}
    for name, scale in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = load(untied(base_model(model)), name).merge_and_unload().state_dict()
        for key in total:
            total[key] += scale * (merged[key] - base[key])
    out.load_state_dict(total)
    return out.eval()


@torch.no_grad()
def run(model, prompt):
    ids, margins, tops, first = list(prompt), [], [], None
    for _ in range(STEPS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        first = first if first is not None else [round(v, 5) for v in logits.tolist()]
        best, logprobs = logits.topk(2).values, logits.log_softmax(-1)
        margins.append(round(float(best[0] - best[1]), 5))
        top = logprobs.topk(3)
        tops.append([[i, round(v, 5)] for i, v in zip(top.indices.tolist(), top.values.tolist())])
        ids.append(int(logits.argmax()))
    return dict(prompt=prompt, output=ids[len(prompt):], margins=margins, top=tops, logits=first)


def main():
    torch.set_num_threads(1)
    check = "--check" in sys.argv[1:]
    if not check:
        for entry in ADAPTERS:
            make(entry)
    cases = [dict(model=name, adapters=[], **run(base_model(name), prompt)) for name in MODELS for prompt in PROMPTS]
    for entry in ADAPTERS:
        model = load(base_model(entry["model"]), entry["name"])
        cases += [dict(model=entry["model"], adapters=[[entry["name"], 1.0]], **run(model, prompt)) for prompt in PROMPTS]
    for name, parts in SUMS:
        model = weighted(name, parts)
        cases += [dict(model=name, adapters=[list(part) for part in parts], **run(model, prompt)) for prompt in PROMPTS]
    golden = dict(
        about="Greedy decoding in float32 by transformers and peft; see make_peft_golden.py. `logits` are those after the prompt, "
              "`top` [id, logprob] of each step, `margins` best minus second logit.",
        versions=dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__, peft=peft.__version__), seed=SEED)
    path = HERE / "golden.json"
    if check:
        old = json.loads(path.read_text())["cases"]
        bad = [i for i, (a, b) in enumerate(zip(old, cases)) if np.abs(np.array(a["logits"]) - np.array(b["logits"])).max() > 2e-4]
        print(f"{len(cases)} cases, {len(bad)} differ {bad}")
        sys.exit(bool(bad) or len(old) != len(cases))
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items())
    path.write_text("{\n" + head + ',\n "cases": [\n  ' + ",\n  ".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n ]\n}\n")
    plain = {(c["model"], tuple(c["prompt"])): c["logits"] for c in cases if not c["adapters"]}
    for c in cases:
        moved = np.abs(np.array(c["logits"]) - np.array(plain[c["model"], tuple(c["prompt"])])).max()
        print(f"{c['model']:6} {str(c['adapters']):70} changes logits by {moved:8.4f}, smallest margin {min(c['margins']):.4f}")


if __name__ == "__main__":
    main()
