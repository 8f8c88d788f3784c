"""Starts the fault server for a test, and speaks with its control port."""

import json
import subprocess
import sys
from pathlib import Path

import httpx

SCRIPT = Path(__file__).resolve().parents[1] / "fault_server.py"
SERVER_TOKEN = "hf_operatorsOwnToken0000000000000000"
SERVER_KEY = "AKIAOPERATOR"


class FaultServer:
    """One process. `with FaultServer() as faults:`; a test that sets rules clears them (`faults.rules()`)."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fault server ended with {self.process.wait()}")
        said = json.loads(line)
        self.ports, self.authority = said["ports"], said["authority"]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.ports['control']}", timeout=60, trust_env=False)
        # What the operator's own credentials may read.
        self.token(SERVER_KEY, ["*"])
        self.token(SERVER_TOKEN, ["private-operator/*"])

    def url(self, dialect: str) -> str:
        return f"http://127.0.0.1:{self.ports[dialect]}"

    def ask(self, op: str, **more):
        answer = self.http.post("/control", json={"op": op, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rules(self, *rules: dict):
        """Replaces all rules; without any, every reply is honest."""
        self.ask("rules", rules=list(rules))

    def token(self, name: str, globs: list[str] | None):
        self.ask("token", name=name, value=globs)

    def repo(self, name: str, value: dict | None):
        self.ask("repo", name=name, value=value)

    def object(self, dialect: str, prefix: str, value: dict | None):
        self.ask("object", name=f"{dialect}:{prefix}", value=value)

    def mark(self) -> int:
        """Now, for `log`."""
        return self.ask("count")["requests"]

    def log(self, since: int = 0) -> list[dict]:
        return self.ask("log", since=since)

    def open_connections(self) -> int:
        return sum(self.ask("count")["open_connections"].values())

    def close(self):
        self.http.close()
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
