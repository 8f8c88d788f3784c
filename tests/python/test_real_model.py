"""SmolLM2-135M-Instruct with three PEFT adapters, against what transformers and PEFT say (golden.json).

Needs LORAMUX_REAL_MODEL_DIR, LORAMUX_REAL_ADAPTERS_DIR, LORAMUX_REAL_GOLDEN and LORAMUX_REAL_GGUF.
"""

import asyncio
import json
import os
from pathlib import Path

import httpx
import pytest

from loramux_server import Server
from wire import check_reply, post

NAMES = ["LORAMUX_REAL_MODEL_DIR", "LORAMUX_REAL_ADAPTERS_DIR", "LORAMUX_REAL_GOLDEN", "LORAMUX_REAL_GGUF"]
MISSING = [name for name in NAMES if not os.environ.get(name)]
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=f"real-model parity: not set: {', '.join(MISSING)}"), pytest.mark.timeout(900)]

# Below this gap between the best and the second logit, rounding to bfloat16 (or other weights' rounding) may choose the other.
MARGIN_MIN = 0.05
# The CUDA path keeps its activations in the model's 16-bit type, the CPU in f32: what bfloat16's 8 bits lose in 30 layers
# shows most in unlikely tokens.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 2.5e-1, "emulated-float16": 8e-2, "emulated-bfloat16": 4e-1}
EMULATED = ["--device", "emulated", "--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "256",
            "--arena-bytes", "512MiB", "--host-adapter-memory", "256MiB", "--kernel-cache-dir", str(Path(__file__).parents[2] / "target/emulator-kernels")]


def golden() -> dict:
    return json.loads(Path(os.environ["LORAMUX_REAL_GOLDEN"]).read_text())


def serve(model: str, dtype: str, data_dir: str, *more: str) -> Server:
    adapters = Path(os.environ["LORAMUX_REAL_ADAPTERS_DIR"])
    flags = [flag for name in ("pirate", "caps", "json") for flag in ("--adapter", f"{name}={adapters / name}")]
    return Server("--model-id", model, "--served-model-name", "base", "--dtype", dtype, *flags, *more, data_dir=data_dir)


@pytest.fixture(scope="module")
def float32(data_dir):
    with serve(os.environ["LORAMUX_REAL_MODEL_DIR"], "float32", data_dir) as server:
        yield server


@pytest.fixture(scope="module")
def bfloat16(data_dir):
    with serve(os.environ["LORAMUX_REAL_MODEL_DIR"], "bfloat16", data_dir) as server:
        yield server


@pytest.fixture
def emulated(data_dir, request):
    """The CUDA path on the host emulator."""
    with serve(os.environ["LORAMUX_REAL_MODEL_DIR"], request.param, data_dir, *EMULATED) as server:
        yield server


def all_at_once(server: Server, cases: list[dict]) -> list[dict]:
    """Greedy continuations of all cases in one batch."""
    def body(case: dict) -> dict:
        return dict(model=case["adapter"] or "base", prompt=case["prompt_ids"], temperature=0, max_tokens=len(case["output_ids"]),
                    ignore_eos=True, return_token_ids=True, logprobs=5, return_tokens_as_token_ids=True)

    async def ask():
        async with httpx.AsyncClient(base_url=server.base, timeout=600, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body(case)) for case in cases))
        for answer in answers:
            assert answer.status_code == 200, answer.text
        return [check_reply(answer.json())["choices"][0] for answer in answers]

    return asyncio.run(ask())


def label(case: dict) -> str:
    return f"{case['adapter'] or 'base'} / {case['user'][:30]!r}"


def sure_steps(case: dict, margin_min: float = MARGIN_MIN) -> int:
    """Steps before the first near-tie: there the tokens must agree in any dtype."""
    return next((step for step, margin in enumerate(case["margin"]) if margin < margin_min), len(case["margin"]))


def logprob_differences(case: dict, choice: dict, tolerance: float) -> list[str]:
    """Where the top-5 logprobs of the first steps differ, as long as the tokens before are the same."""
    wrong = []
    for step, (expected, found) in enumerate(zip(case["top5_logprobs"], choice["logprobs"]["top_logprobs"])):
        if choice["token_ids"][:step] != case["output_ids"][:step]:
            break
        lowest = min(found.values())
        for token, logprob in expected:
            got = found.get(f"token:{token}")
            if got is None and logprob <= lowest + 2 * tolerance:
                continue  # a near-tie for the fifth place
            if got is None or abs(got - logprob) > tolerance:
                wrong.append(f"{label(case)}: step {step}, token {token}: {got}, golden {logprob}")
    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_logprobs_are_those_of_transformers_and_peft(dtype, request):
    agrees_with_golden(request.getfixturevalue(dtype), dtype)


@pytest.mark.parametrize("emulated", ["float16", "bfloat16"], indirect=True)
def test_the_cuda_path_agrees_with_transformers_and_peft(emulated, request):
    agrees_with_golden(emulated, f"emulated-{request.node.callspec.params['emulated']}")


def agrees_with_golden(server: Server, dtype: str):
    cases = golden()["cases"]
    choices = all_at_once(server, cases)
    wrong, compared = [], 0
    for case, choice in zip(cases, choices):
        steps = len(case["output_ids"]) if dtype == "float32" else sure_steps(case, max(MARGIN_MIN, LOGPROB_TOLERANCE[dtype] * 0.8))
        compared += steps
        if choice["token_ids"][:steps] != case["output_ids"][:steps]:
            step = next(i for i in range(steps) if choice["token_ids"][i] != case["output_ids"][i])
            wrong.append(f"{label(case)}: step {step}: {choice['token_ids'][step]}, golden {case['output_ids'][step]}, "
                         f"margin {case['margin'][step]}")
        wrong += logprob_differences(case, choice, LOGPROB_TOLERANCE[dtype])
    assert not wrong, f"{len(wrong)} differences in {len(cases)} cases:\n" + "\n".join(wrong)
    assert compared > 4 * len(cases), "nearly nothing was compared"


def test_a_row_of_the_batch_is_what_it_is_alone(bfloat16):
    cases = golden()["cases"][::5]
    together = all_at_once(bfloat16, cases)
    for case, choice in zip(cases, together):
        assert all_at_once(bfloat16, [case])[0] == choice, label(case)


def test_the_template_and_tokenizer_are_the_models_own(bfloat16):
    for case in golden()["cases"]:
        if case["kind"] == "chat":
            asked = {"model": "base", "messages": [{"role": "user", "content": case["user"]}]}
        else:
            asked = {"model": "base", "prompt": case["prompt"]}
        tokens = bfloat16.http.post("/tokenize", json=asked).json()["tokens"]
        assert tokens == case["prompt_ids"], label(case)


@pytest.mark.parametrize("dtype, margin, least", [("bfloat16", 0.2, 2), ("auto", 0.5, 1)])
def test_a_gguf_file_serves_what_the_directory_serves(dtype, margin, least, data_dir):
    """The directory was made from this file: dequantised, the weights are the same; quantised, inputs are rounded to 8 bits."""
    cases = [case for case in golden()["cases"] if case["kind"] == "chat" and case["adapter"] in (None, "pirate")]
    with serve(os.environ["LORAMUX_REAL_GGUF"], dtype, data_dir) as server:
        compared = 0
        for case in cases:
            reply = post(server.http, "/v1/chat/completions", model=case["adapter"] or "base", temperature=0, ignore_eos=True,
                         messages=[{"role": "user", "content": case["user"]}], max_tokens=len(case["output_ids"]), return_token_ids=True)
            choice, steps = reply["choices"][0], sure_steps(case, margin)
            assert reply["usage"]["prompt_tokens"] == len(case["prompt_ids"]), label(case)
            assert choice["token_ids"][:steps] == case["output_ids"][:steps], label(case)
            compared += steps
        assert compared > least * len(cases), "nearly nothing was compared"
