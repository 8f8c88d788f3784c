"""The calls of public clients, each in its own environment, and the bytes that passed, checked against published schemas.

`clients/calls_NAME.py` and `../node` are the calls; here is what they talk to.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from exchanges import check
from loramux_server import REPOSITORY, Server
from tee import Tee
from third_party import INSTALL_TIMEOUT_S, missing, node, program

CLIENTS = Path(__file__).parent / "clients"
TIMEOUT_S = 600  # the first run of each installs what it needs
# The first of them installs what it needs.
pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT_S + TIMEOUT_S)
KEY = "key-of-the-clients"
# The calls, and whose environment they run in; None: the one that these tests run in, with the newest `openai`.
SUITES = [
    ("openai", None),
    ("openai", "clients-openai"),
    ("huggingface_hub", "clients-openai"),
    ("instructor", "clients-openai"),
    ("langchain", "clients-openai"),
    ("litellm", "clients-openai"),
    ("llama_index", "clients-openai"),
    ("text_generation", "clients"),
    ("anthropic", "clients"),
]


@pytest.fixture(scope="module")
def locked(slow_flags, data_dir, tmp_path_factory):
    """Wants a key, and lets it ask one thing at a time. Its steps are slow enough to leave in the middle of a text."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "clients"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\nmax_concurrent = 1\n')
    with Server(*slow_flags, "--keys-file", str(keys), data_dir=data_dir) as server:
        yield server


@pytest.mark.parametrize("name, environment", SUITES, ids=[f"{name}{'' if of is None else '-in-' + of}" for name, of in SUITES])
def test_python(demo, locked, name, environment):
    python = sys.executable if environment is None else program("python", environment)
    run(demo, locked, python, "-m", "pytest", "-q", "-c", str(CLIENTS / "pytest.ini"), f"--rootdir={CLIENTS}", f"calls_{name}.py")


def test_node(demo, locked):
    run(demo, locked, node(), "--test", str(REPOSITORY / "tests/node/openai.test.mjs"))


def test_rust(demo, locked):
    if not shutil.which("cargo"):
        missing("no cargo for `async-openai`")
    test = ["cargo", "test", "--locked", "--manifest-path", str(REPOSITORY / "tests/clients-rust/Cargo.toml")]
    subprocess.run([*test, "--no-run"], check=True, timeout=INSTALL_TIMEOUT_S)
    run(demo, locked, *test)


def test_what_passes_is_seen_and_checked(demo):
    body = {"model": "sql", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    with Tee(demo.address) as tee, httpx.Client(base_url=tee.base, timeout=60, trust_env=False) as http:
        whole = http.post("/v1/chat/completions", json=body)
        streamed = http.post("/v1/chat/completions", json={**body, "stream": True})
        refused = http.post("/v1/chat/completions", json={**body, "temperature": -1})
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 1000, "ignore_eos": True}) as left:
            next(left.iter_raw())
    seen = tee.exchanges()
    assert [exchange.status for exchange in seen] == [200, 200, 400, 200]
    assert [exchange.body for exchange in seen[:3]] == [whole.content, streamed.content, refused.content]
    assert [exchange.whole for exchange in seen] == [True, True, True, False]
    for exchange in seen:
        check(exchange)
    wrong = [
        (0, lambda body: body.replace(b'"refusal":null', b'"refusal":1')),
        (1, lambda body: body.replace(b"data: [DONE]", b"")),
        (1, lambda body: body.replace(b'"finish_reason":"', b'"finish_reason":"un')),
        (2, lambda body: json.dumps({"error": "no"}).encode()),
    ]
    for index, change in wrong:
        changed = dataclasses.replace(seen[index], body=change(seen[index].body))
        assert changed.body != seen[index].body
        with pytest.raises(AssertionError):
            check(changed)


def run(demo, locked, *command: str):
    """Runs the calls of a client, and checks every reply that they got of the demo server."""
    with Tee(demo.address) as tee:
        where = {"LORAMUX_URL": tee.base, "LORAMUX_LOCKED_URL": locked.base, "LORAMUX_LOCKED_KEY": KEY}
        done = subprocess.run(command, env={**clean(os.environ), **where}, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=CLIENTS)
    assert done.returncode == 0, f"{done.stdout[-12000:]}\n{done.stderr[-3000:]}"
    exchanges = tee.exchanges()
    assert exchanges, "nothing passed"
    for exchange in exchanges:
        check(exchange)


def clean(environment) -> dict:
    """Without what would send the clients elsewhere, or home."""
    kept = {name: value for name, value in environment.items()
            if not name.startswith(("OPENAI_", "HF_", "HUGGING", "LITELLM_", "LANG", "ANTHROPIC_", "PYTEST_")) and "proxy" not in name.lower()}
    return {**kept, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
