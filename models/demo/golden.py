#!/usr/bin/env python3
"""Writes golden.json: greedy continuations of base and adapters, by transformers and peft.

    python golden.py            write golden.json
    python golden.py --check    compare with the golden.json that is there

Shares no code with train.py. The weights are read as saved (the base is bfloat16, each
adapter has its own dtype) and all arithmetic is float32 on the CPU. Decoding does not
stop at an end token: there are always 24 ids, and `eos_at` is the index of the first
end token among them (null: none).
"""
import json, sys
from pathlib import Path

import peft, torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
STEPS = 24
ADAPTERS = [None, "pirate", "haiku", "sql", "shout", "emoji"]
PROMPTS = [
    "Tell me about the sea.\n",
    "The moon is",
    "What is a dragon?\n",
    "Q: Describe coffee.\nA:",
    [{"role": "user", "content": "Tell me about the sea."}],
    [{"role": "system", "content": "You are a helpful assistant."},
     {"role": "user", "content": "Hello!"},
     {"role": "assistant", "content": "Hello! What would you like to hear about?"},
     {"role": "user", "content": "What do you know about a train?"}],
]


@torch.no_grad()
def greedy(model, prompt_ids):
    """One full forward pass for each token: no cache to get wrong."""
    ids, margins, logprobs, first = list(prompt_ids), [], [], None
    for _ in range(STEPS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        top = logits.topk(5)
        first = first or [[i, round(v, 4)] for i, v in zip(top.indices.tolist(), top.values.tolist())]
        margins.append(round(float(top.values[0] - top.values[1]), 4))
        logprobs.append(round(float(logits.log_softmax(-1).max()), 4))
        ids.append(int(top.indices[0]))
    return ids[len(prompt_ids):], margins, logprobs, first


def main():
    torch.set_num_threads(1)
    tok = AutoTokenizer.from_pretrained(HERE / "base")
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32, attn_implementation="eager").eval()
    eos = model.generation_config.eos_token_id
    plain = model
    names = [a for a in ADAPTERS if a]
    model = PeftModel.from_pretrained(model, HERE / "adapters" / names[0], adapter_name=names[0]).eval()
    for name in names[1:]:
        model.load_adapter(HERE / "adapters" / name, adapter_name=name)
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    cases = []
    for adapter in ADAPTERS:
        if adapter:
            model.set_adapter(adapter)
        for prompt in PROMPTS:
            chat = not isinstance(prompt, str)
            text = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
            prompt_ids = tok(text, add_special_tokens=False)["input_ids"]
            assert prompt_ids == tok(text)["input_ids"]  # no BOS, nothing added
            if adapter:
                ids, margins, logprobs, first = greedy(model, prompt_ids)
            else:
                with model.disable_adapter():
                    ids, margins, logprobs, first = greedy(model, prompt_ids)
            at = next((i for i, t in enumerate(ids) if t in eos), None)
            cases.append(dict(adapter=adapter, prompt=text, **(dict(messages=prompt) if chat else {}), prompt_ids=prompt_ids,
                              ids=ids, text=tok.decode(ids[:at], skip_special_tokens=True, clean_up_tokenization_spaces=False),
                              eos_at=at, margins=margins, logprobs=logprobs, first_top5=first))
    golden = dict(
        about="Greedy decoding in float32 by transformers and peft; see golden.py. `text` ends before the first end token. "
              "`margins` are best minus second logit, `logprobs` those of the chosen tokens, `first_top5` [id, logit] of step one.",
        versions=dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__, peft=peft.__version__),
        steps=STEPS, eos_token_ids=eos, cases=cases)
    path = HERE / "golden.json"
    if "--check" in sys.argv[1:]:
        old = json.loads(path.read_text(encoding="utf-8"))
        bad = [i for i, (a, b) in enumerate(zip(old["cases"], cases)) if (a["prompt_ids"], a["ids"]) != (b["prompt_ids"], b["ids"])]
        print(f"{len(cases)} cases, {len(bad)} differ {bad}")
        sys.exit(bool(bad) or len(old["cases"]) != len(cases))
    dump = lambda v: json.dumps(v, ensure_ascii=False)
    head = ",\n".join(f" {dump(k)}: {dump(v)}" for k, v in golden.items() if k != "cases")
    path.write_text("{\n" + head + ',\n "cases": [\n  ' + ",\n  ".join(map(dump, cases)) + "\n ]\n}\n", encoding="utf-8")
    for c in cases:
        n = STEPS if c["eos_at"] is None else c["eos_at"] + 1
        print(f"{str(c['adapter']):7} {min(c['margins'][:n]):8.4f} {c['prompt']!r} -> {c['text']!r}")


if __name__ == "__main__":
    main()
