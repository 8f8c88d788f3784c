"""Writes golden_embeddings.json: what transformers (and PEFT) say the pooled final hidden states are, in float32.

python make_golden_embeddings.py MODEL_DIR ADAPTERS_DIR OUT.json    (needs torch, transformers, peft)
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["Hello", "The capital of France is Paris.", "A pirate's life for me! " * 40]
SHOWN = 24  # of the values of each normalised embedding


def main(model_dir: str, adapters_dir: str, out: str):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    cases = []
    for adapter in (None, "pirate", "caps"):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        if adapter:
            model = PeftModel.from_pretrained(model, f"{adapters_dir}/{adapter}").eval()
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()  # after the last norm
            for pooling, pooled in (("mean", states.mean(0)), ("last", states[-1])):
                values = (pooled / pooled.norm()).tolist()
                cases.append({"adapter": adapter, "text": text, "tokens": ids.shape[1], "pooling": pooling,
                              "values": [round(value, 7) for value in values[:SHOWN]], "length": round(float(pooled.norm()), 4)})
    with open(out, "w") as file:
        json.dump({"dimensions": len(values), "cases": cases}, file, indent=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
