"""Where the server is. These tests run in the clients' own environments; `test_public_clients.py` starts what they talk to."""

import os
import time
import urllib.request
from dataclasses import dataclass

import pytest


@dataclass
class Address:
    """A server without `/v1` at the end, and a key that opens it."""
    url: str
    key: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def running(self) -> float:
        """Requests that the server computes now."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running"))

    def wait_running(self, count: int, timeout_s: float = 20.0):
        deadline = time.monotonic() + timeout_s
        while self.running() != count:
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {count} requests run"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def server() -> Address:
    """The demo model with its adapters; open to everyone. What passes is checked against published schemas afterwards."""
    return Address(os.environ["LORAMUX_URL"], "EMPTY")


@pytest.fixture(scope="session")
def locked() -> Address:
    """A server of slow steps that wants a key; the key may ask one thing at a time."""
    return Address(os.environ["LORAMUX_LOCKED_URL"], os.environ["LORAMUX_LOCKED_KEY"])
