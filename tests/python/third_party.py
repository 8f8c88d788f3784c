"""Programs of others that talk to our server, in `.venv-clients`. Made once; made again when `requirements-clients.txt` changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_server import REPOSITORY

REQUIREMENTS = Path(__file__).parent / "requirements-clients.txt"
INSTALL_TIMEOUT_S = 900
# What the packages run on.
PYTHONS = ((3, 10), (3, 11), (3, 12))


def environment() -> Path:
    """The virtual environment, complete. Without the packages the test is skipped, or fails where they are required."""
    folder = Path(os.environ.get("LORAMUX_CLIENTS_VENV", REPOSITORY / ".venv-clients"))
    installed = folder / "requirements.installed"
    if installed.is_file() and installed.read_text() == REQUIREMENTS.read_text():
        return folder
    failure = _install(folder)
    if failure:
        shutil.rmtree(folder, ignore_errors=True)
        if os.environ.get("LORAMUX_REQUIRE_CLIENTS"):
            pytest.fail(failure)
        pytest.skip(failure)
    installed.write_text(REQUIREMENTS.read_text())
    return folder


def _install(folder: Path) -> str | None:
    """What went wrong, if anything did."""
    python = next((name for name in _pythons() if _runs(name)), None)
    if python is None:
        return "no Python 3.10, 3.11 or 3.12 for the third-party clients"
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(REQUIREMENTS)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {error}"
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr[-1000:]}"
    return None


def _pythons() -> list[str]:
    own = [sys.executable] if sys.version_info[:2] in PYTHONS else []
    return own + [f"python{major}.{minor}" for major, minor in reversed(PYTHONS)]


def _runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


def program(name: str) -> str:
    """The path of a program of the environment."""
    return str(environment() / "bin" / name)
