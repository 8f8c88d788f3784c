"""Quantised GGUF files over a socket: weights that stay quantised answer as the dequantised ones do."""

import pytest

import gguf_file
from loramux_server import REPOSITORY, Server
from wire import post

ADAPTER = REPOSITORY / "models/demo/adapters/sql"
# What the model is sure of: of two tokens that are as likely, rounding picks one.
PROMPTS = {"base": "I am a small demo model. I know a little about", "sql": "List users"}


def serve(path, dtype: str) -> Server:
    return Server("--model-id", str(path), "--served-model-name", "base", "--dtype", dtype, "--device", "cpu",
                  "--adapter", f"sql={ADAPTER}")


def answers(server: Server) -> dict:
    def ask(model: str, prompt: str) -> dict:
        return post(server.http, "/v1/completions", model=model, prompt=prompt, temperature=0, max_tokens=24, logprobs=1,
                    ignore_eos=True, return_token_ids=True)["choices"][0]
    return {model: ask(model, prompt) for model, prompt in PROMPTS.items()}


def logprob_differences(left: dict, right: dict) -> list[float]:
    """Of the tokens up to the first that differs."""
    pairs = zip(left["token_ids"], left["logprobs"]["token_logprobs"], right["token_ids"], right["logprobs"]["token_logprobs"])
    found = []
    for token, logprob, other, other_logprob in pairs:
        if token != other:
            break
        found.append(abs(logprob - other_logprob))
    return found


@pytest.mark.parametrize(("kind", "name"), [(gguf_file.Q8_0, "q8_0"), (gguf_file.Q4_0, "q4_0")])
def test_weights_that_stay_quantised_answer_as_the_dequantised_do(kind, name, tmp_path):
    path = gguf_file.write_demo(tmp_path, kind)
    with serve(path, "auto") as server:
        assert server.http.get("/info").json()["model_dtype"] == name
        kept = answers(server)
        assert answers(server) == kept, "not the same twice"
    with serve(path, "float32") as server:
        assert server.http.get("/info").json()["model_dtype"] == "float32"
        plain = answers(server)
    for model in PROMPTS:
        differences = logprob_differences(kept[model], plain[model])
        assert len(differences) >= 4, f"{model}: {kept[model]['text']!r}, dequantised {plain[model]['text']!r}"
        # Activations of the kept form are rounded to 8 bits; a wrong row order or block gives another text at once.
        assert max(differences) < 0.5, f"{model}: {differences}"
    assert kept["base"]["token_ids"] != kept["sql"]["token_ids"]
