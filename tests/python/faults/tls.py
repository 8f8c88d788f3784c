"""Certificates of the fault server: a good one, an expired one, one for another host, one of an unknown authority."""

import ssl
import subprocess
import tempfile
from pathlib import Path

LOCAL = "IP:127.0.0.1,DNS:localhost"
LONG_AGO, LATER = ("20200101000000Z", "20200201000000Z"), ("20200101000000Z", "20490101000000Z")
CONFIG = """
[ca]
default_ca = own
[own]
dir = .
database = index.txt
new_certs_dir = .
serial = serial
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = optional
"""


def _openssl(folder: Path, *arguments: str):
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr[-1000:]}")


def _authority(folder: Path, name: str):
    _openssl(
        folder,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        f"/CN={name}",
        "-keyout",
        f"{name}.key",
        "-out",
        f"{name}.pem",
        "-days",
        "7000",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
    )


def _certificate(folder: Path, name: str, authority: str, hosts: str, valid: tuple[str, str]) -> ssl.SSLContext:
    _openssl(
        folder,
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        f"/CN={name}",
        "-keyout",
        f"{name}.key",
        "-out",
        f"{name}.csr",
        "-addext",
        f"subjectAltName={hosts}",
        "-addext",
        "extendedKeyUsage=serverAuth",
    )
    _openssl(
        folder,
        "ca",
        "-batch",
        "-notext",
        "-config",
        "ca.conf",
        "-cert",
        f"{authority}.pem",
        "-keyfile",
        f"{authority}.key",
        "-in",
        f"{name}.csr",
        "-out",
        f"{name}.pem",
        "-startdate",
        valid[0],
        "-enddate",
        valid[1],
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return server


def make(folder: Path) -> dict[str, ssl.SSLContext]:
    """One context for each kind; `folder/trusted.pem` is the authority a client may be told to trust."""
    (folder / "ca.conf").write_text(CONFIG)
    (folder / "index.txt").write_text("")
    (folder / "index.txt.attr").write_text("unique_subject = no\n")
    (folder / "serial").write_text("1000\n")
    _authority(folder, "trusted")
    _authority(folder, "stranger")
    return {
        "good": _certificate(folder, "good", "trusted", LOCAL, LATER),
        "expired": _certificate(folder, "expired", "trusted", LOCAL, LONG_AGO),
        "wrong_host": _certificate(folder, "wrong_host", "trusted", "DNS:other.example,IP:192.0.2.1", LATER),
        "stranger": _certificate(folder, "strange", "stranger", LOCAL, LATER),
    }


def temporary() -> tuple[tempfile.TemporaryDirectory, dict[str, ssl.SSLContext]]:
    folder = tempfile.TemporaryDirectory(prefix="fault-tls-")
    return folder, make(Path(folder.name))
