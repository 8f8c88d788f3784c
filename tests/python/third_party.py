"""Programs of others that talk to our server, in environments of their own. Made once; made again when their requirements change.

`clients` is `.venv-clients` (or `LORAMUX_CLIENTS_VENV`) of `requirements-clients.txt`; `clients-openai` likewise, with
`-openai` at the end of each name.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_server import REPOSITORY

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 900
# What the packages run on.
PYTHONS = ((3, 10), (3, 11), (3, 12))


def environment(name: str = "clients") -> Path:
    """The virtual environment, complete. Without the packages the test is skipped, or fails where they are required."""
    requirements = HERE / f"requirements-{name}.txt"
    suffix = name.removeprefix("clients")
    configured = os.environ.get("LORAMUX_CLIENTS_VENV")
    folder = Path(f"{configured}{suffix}") if configured else REPOSITORY / f".venv-{name}"
    installed = folder / "requirements.installed"
    if installed.is_file() and installed.read_text() == requirements.read_text():
        return folder
    failure = _install(folder, requirements)
    if failure:
        shutil.rmtree(folder, ignore_errors=True)
        missing(failure)
    installed.write_text(requirements.read_text())
    return folder


def node() -> str:
    """Node of `tests/node`, with the packages beside it as its lock file has them."""
    packages = REPOSITORY / "tests/node"
    installed, lock = packages / "node_modules/lock.installed", (packages / "package-lock.json").read_text()
    if not installed.is_file() or installed.read_text() != lock:
        failure = _run(["npm", "ci", "--prefix", str(packages), "--no-audit", "--no-fund", "--loglevel=error"])
        if failure:
            missing(failure)
        installed.write_text(lock)
    return str(next(packages.glob("node_modules/node-linux-*/bin/node")))


def missing(why: str):
    """Ends the test: skipped, or failed where clients are required."""
    if os.environ.get("LORAMUX_REQUIRE_CLIENTS"):
        pytest.fail(why)
    pytest.skip(why)


def _install(folder: Path, requirements: Path) -> str | None:
    """What went wrong, if anything did."""
    python = next((name for name in _pythons() if _runs(name)), None)
    if python is None:
        return "no Python 3.10, 3.11 or 3.12 for the third-party clients"
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(requirements)],
    ):
        if failure := _run(command):
            return failure
    return None


def _run(command: list[str]) -> str | None:
    """What went wrong, if anything did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {error}"
    return f"{' '.join(command)}: {done.stderr[-1000:]}" if done.returncode else None


def _pythons() -> list[str]:
    own = [sys.executable] if sys.version_info[:2] in PYTHONS else []
    return own + [f"python{major}.{minor}" for major, minor in reversed(PYTHONS)]


def _runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


def program(name: str, of: str = "clients") -> str:
    """The path of a program of an environment."""
    return str(environment(of) / "bin" / name)
