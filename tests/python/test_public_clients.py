"""The calls of public clients, each in its own environment, and the bytes that passed, checked against published schemas.

`clients/calls_NAME.py` are the calls; here is what they talk to.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exchanges import check
from loramux_server import Server
from tee import Tee
from third_party import program

CLIENTS = Path(__file__).parent / "clients"
TIMEOUT_S = 240
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
]


@pytest.fixture(scope="module")
def locked(slow_flags, data_dir, tmp_path_factory):
    """Wants a key, and lets it ask one thing at a time. Its steps are slow enough to leave in the middle of a text."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "clients"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\nmax_concurrent = 1\n')
    with Server(*slow_flags, "--keys-file", str(keys), data_dir=data_dir) as server:
        yield server


@pytest.mark.parametrize("name, environment", SUITES, ids=[f"{name}{'' if of is None else '-in-' + of}" for name, of in SUITES])
def test_calls(demo, locked, name, environment):
    python = sys.executable if environment is None else program("python", environment)
    with Tee(demo.address) as tee:
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-c", str(CLIENTS / "pytest.ini"), f"--rootdir={CLIENTS}", str(CLIENTS / f"calls_{name}.py")],
            env={**clean(os.environ), "LORAMUX_URL": tee.base, "LORAMUX_LOCKED_URL": locked.base, "LORAMUX_LOCKED_KEY": KEY},
            capture_output=True, text=True, timeout=TIMEOUT_S, cwd=CLIENTS)
    assert done.returncode == 0, f"{done.stdout[-12000:]}\n{done.stderr[-3000:]}"
    print(done.stdout.strip().splitlines()[-1])
    exchanges = tee.exchanges()
    assert exchanges, "nothing passed"
    for exchange in exchanges:
        check(exchange)


def clean(environment) -> dict:
    """Without what would send the clients elsewhere, or home."""
    kept = {name: value for name, value in environment.items()
            if not name.startswith(("OPENAI_", "HF_", "HUGGING", "LITELLM_", "LANG", "ANTHROPIC_", "PYTEST_")) and "proxy" not in name.lower()}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
