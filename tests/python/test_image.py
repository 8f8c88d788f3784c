"""The container image, as far as it can be checked without a container engine."""

import os
import re
import socket
import subprocess

from loramux_server import REPOSITORY, run_to_end

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def probe(port: int) -> int:
    script = REPOSITORY / "docker/healthcheck.sh"
    return subprocess.run([script], env={**os.environ, "LORAMUX_PORT": str(port)}, capture_output=True, timeout=10).returncode


def test_the_health_check_says_what_health_says(demo):
    assert probe(int(demo.address.rpartition(":")[2])) == 0


def test_the_health_check_fails_where_nothing_listens_or_health_is_not_200():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert probe(port) != 0
        listener.listen()
        for answer in (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"200\r\n", b""):
            check = subprocess.Popen([REPOSITORY / "docker/healthcheck.sh"], env={**os.environ, "LORAMUX_PORT": str(port)},
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)
            assert check.wait(timeout=10) != 0, answer


def test_the_image_sets_variables_that_exist():
    known = run_to_end("serve", "--help").stdout
    names = set(re.findall(r"\b(LORAMUX_[A-Z_]+)=", DOCKERFILE))
    assert {"LORAMUX_HOST", "LORAMUX_DATA_DIR", "LORAMUX_KERNEL_CACHE"} <= names
    assert not [name for name in names if f"[env: {name}" not in known]


def test_the_image_compiles_kernels_with_flags_that_exist():
    command = re.search(r"loramux warm-kernels (.*);", DOCKERFILE).group(1)
    known = run_to_end("warm-kernels", "--help").stdout
    flags = re.findall(r"--[a-z-]+", command)
    assert flags and not [flag for flag in flags if not re.search(rf"{flag}\b", known)], known


def test_the_builder_has_the_toolchain_of_the_repository():
    toolchain = re.search(r'channel = "([\d.]+)"', (REPOSITORY / "rust-toolchain.toml").read_text()).group(1)
    assert re.search(rf"^ENV RUSTUP_TOOLCHAIN={re.escape(toolchain)}$", DOCKERFILE, re.M)
    assert f"FROM rust:{toolchain.rpartition('.')[0]}-" in DOCKERFILE
