"""How a request of any route chooses adapters: fan-out and composition over several sources, aliases that are sticky by user."""

import pytest

import marker
from faults.client import FaultServer
from faults.serving import SourcedServer, reference, write_named

SOURCES = ("hub", "s3", "gcs", "http", "local")


@pytest.fixture(scope="module")
def faults():
    with FaultServer() as faults:
        yield faults


@pytest.fixture(scope="module")
def server(faults, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for i in (201, 202, 203):
        write_named(root, f"acme/m{i}")
    with SourcedServer(faults, "--adapter-root", str(root), "--share-hub-token") as server:
        server.root = root
        yield server


def test_a_fan_out_over_all_sources(server, faults):
    entries = [reference(faults, source, "acme/m201", server.root) for source in SOURCES]
    answer = server.http.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "adapters": entries, **marker.ASK})
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["adapter"] for choice in choices] == entries
    assert answer.headers["x-adapter-source"] == ",".join(SOURCES)
    assert len(answer.headers["x-adapter-revision"].split(",")) == len(SOURCES)
    for choice in choices:
        assert marker.read_marker({"choices": [choice]}) == marker.marker(201)


def test_a_composition_over_two_sources(server, faults):
    parts = [{"adapter": reference(faults, "hub", "acme/m202", server.root), "weight": 1}, {"adapter": f"{server.root}/acme/m203", "weight": 0}]
    answer = server.http.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "compose": parts, **marker.ASK})
    assert answer.status_code == 200, answer.text
    assert marker.read_marker(answer.json()) == marker.marker(202)
    assert answer.headers["x-adapter-source"] == "hub,local"


def test_an_alias_is_sticky_by_user(server):
    for i in (201, 202):
        assert server.admin("PUT", f"/adapters/v{i}?wait=30s", json={"ref": f"{server.root}/acme/m{i}"}).status_code == 200
    versions = [{"adapter": "v201", "weight": 1}, {"adapter": "v202", "weight": 1}]
    made = server.admin("PUT", "/aliases/canary", json={"versions": versions, "sticky_by": "user"})
    assert made.status_code == 200, made.text

    def version(user: str, path: str = "/v1/completions") -> str:
        body = {"model": "canary", "prompt": "Hi", "max_tokens": 1, "user": user}
        return server.http.post(path, json=body).headers["x-adapter-id"]

    got = {f"u{i}": version(f"u{i}") for i in range(24)}
    assert set(got.values()) == {"v201", "v202"}, "both are used"
    assert all(version(user) == which for user, which in got.items()), "and a user keeps his"
