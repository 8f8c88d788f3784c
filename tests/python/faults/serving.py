"""loramux with the fault server behind each of its sources."""

import json
import os
import tempfile
from pathlib import Path

from adapter_files import write_adapter
from faults.client import SERVER_KEY, SERVER_TOKEN, FaultServer
from faults.world import marker_files, spec_of_name
from loramux_server import Server

REMOTE = ("hub", "s3", "gcs", "http")
HTTP_SECRET = "operators-http-secret"
# Sixty seconds become 6: what is kept, waited for and retried comes in time for a test. Deadlines of requests shrink with it.
TIME_SCALE = 0.1


def environment(faults: FaultServer, folder: Path, time_scale: float | None = None) -> dict[str, str]:
    """The operator's credentials and endpoints. `folder` takes a file."""
    account = folder / "service-account.json"
    account.write_text(
        json.dumps(
            {
                "gcs_base_url": faults.url("gcs"),
                "disable_oauth": True,
                "client_email": "loramux@test",
                "private_key": "",
                "private_key_id": "",
            }
        )
    )
    scale = {"LORAMUX_TEST_TIME_SCALE": str(time_scale)} if time_scale else {}
    return {
        "HF_ENDPOINT": faults.url("hub"),
        "HF_TOKEN": SERVER_TOKEN,
        "HF_HOME": str(folder / "hf-home"),
        "AWS_ENDPOINT_URL": faults.url("s3"),
        "AWS_ACCESS_KEY_ID": SERVER_KEY,
        "AWS_SECRET_ACCESS_KEY": "operatorsSecret",
        "AWS_REGION": "us-east-1",
        "GOOGLE_APPLICATION_CREDENTIALS": str(account),
        **scale,
    }


def flags(faults: FaultServer, *more: str, networks: str | None = "127.0.0.0/8") -> list[str]:
    """All sources on, pointed at the fault server. (A process that may dump core lets its own user look into its /proc.)"""
    opened = ["--adapter-http-networks", networks] if networks else []
    return [
        "--hub-hosts",
        f"127.0.0.1:{faults.ports['cdn']}",
        "--adapter-http-hosts",
        faults.url("http"),
        *opened,
        "--allow-runtime-adapters",
        "--admin-listen",
        "off",
        "--admin-key",
        ADMIN_KEY,
        "--allow-core-dumps",
        *more,
    ]


ADMIN_KEY = "admin-of-the-tests"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def load_ms(seconds: float) -> int:
    """`adapter_load_timeout_ms` for a deadline that really is so far away."""
    return int(seconds * 1000 / TIME_SCALE)


def reference(faults: FaultServer, source: str, name: str, root: Path | None = None) -> str:
    """`name` (`folder/m7`) at a source."""
    return {
        "hub": f"hf://{name}",
        "s3": f"s3://public-bucket/{name}",
        "gcs": f"gs://bucket/{name}",
        "http": f"{faults.url('http')}/{name}",
        "local": f"{root}/{name}",
    }[source]


def write_named(root: Path, name: str):
    """The adapter that `name` stands for, below `root`."""
    spec = spec_of_name(name)
    files = marker_files(spec["marker"], spec["kib"])
    write_adapter(root / name, files["adapter_config.json"], files["adapter_model.safetensors"])


class SourcedServer(Server):
    """`with SourcedServer(faults, "--flag") as server:`; `server.ask(..)` is the client of `asking.py` bound to it."""

    def __init__(
        self,
        faults: FaultServer,
        *more: str,
        data_dir: str | None = None,
        time_scale: float | None = TIME_SCALE,
        env: dict | None = None,
        load_timeout_s: float = 30,
        networks: str | None = "127.0.0.0/8",
        **settings,
    ):
        self.folder = tempfile.TemporaryDirectory(prefix="sourced-")
        where = Path(self.folder.name)
        self.data = Path(data_dir or where / "data")
        variables = {**environment(faults, where, time_scale), **(env or {})}
        timeout = f"{load_timeout_s / (time_scale or 1):g}"
        super().__init__(*flags(faults, "--adapter-load-timeout", timeout, *more, networks=networks), data_dir=str(self.data), env=variables, **settings)

    def open_files(self) -> dict[str, int]:
        """Descriptors by kind: sockets (connections that are kept for the next request among them) and all others."""
        kinds = {"sockets": 0, "others": 0}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                kinds["sockets" if os.readlink(entry).startswith("socket:") else "others"] += 1
            except OSError:
                pass  # it was closed while we looked
        return kinds

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def admin(self, method: str, path: str, **more):
        return self.http.request(method, f"/admin/v1{path}", headers=ADMIN, **more)

    def temporary_files(self) -> list[str]:
        """What a finished or given up download must not leave. A part that is kept to be resumed has a note beside it."""
        folder = self.data / "store" / "tmp"
        return [str(path.relative_to(self.data)) for path in folder.rglob("*") if path.is_file() and not (path.parent / "partial.json").exists()]

    def close(self):
        super().close()
        self.folder.cleanup()
