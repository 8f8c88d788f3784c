"""The admin API and `loramux adapters`, on local directories: list, load, inspect, check, pin, unload, aliases, drain."""

import json
import shutil
import subprocess

import httpx
import pytest

from adapter_files import write_random_adapter
from loramux_server import REPOSITORY, Server, binary, clean_environment, wait_until
from wire import check_error

DEMO = REPOSITORY / "models/demo/adapters"
MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
FIELDS = {"name", "ref", "state", "pinned", "rank_min", "rank_max", "bytes", "pages", "running", "waiting"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("admin")
    root = folder / "loras"
    for name in ("sql", "haiku", "pirate"):
        shutil.copytree(DEMO / name, root / name)
    write_random_adapter(root / "large", MODEL_CONFIG, 512, ("q_proj",), gain=8)
    flags = ["--adapter-root", str(root), "--max-lora-rank", "64", "--admin-key", "root", "--admin-listen", f"unix:{folder / 'a.sock'}"]
    with Server(*flags, data_dir=str(folder / "data")) as server:
        server.root, server.folder = root, folder
        yield server


@pytest.fixture(scope="module")
def admin(server):
    with server.admin("root") as client:
        yield client


def put(admin, name, ref, query="?wait=30s", **fields) -> httpx.Response:
    return admin.put(f"/admin/v1/adapters/{name}{query}", json={"ref": str(ref), **fields})


def code_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    body.pop("report", None)
    return check_error(body)["code"]


def text_of(server, model, **fields) -> str:
    body = {"model": model, "prompt": "Once", "max_tokens": 12, "temperature": 0, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_an_adapter_is_loaded_inspected_used_and_unloaded(server, admin):
    answer = put(admin, "team%2Fsql", server.root / "sql")
    assert answer.status_code == 200, answer.text
    view = answer.json()
    assert FIELDS <= set(view), FIELDS - set(view)
    assert (view["name"], view["ref"], view["state"], view["source"]) == ("team/sql", str(server.root / "sql"), "ready", "local")
    assert len(view["content_id"]) == 64 and 1 <= view["rank_min"] <= view["rank_max"] and view["bytes"] > 0 and view["pages"] > 0
    assert view["residency"] in ("device", "host", "disk")
    assert text_of(server, "team/sql") != text_of(server, "demo")
    # The engine publishes what it holds at most every 50 ms.
    view = wait_until(lambda: (now := admin.get("/admin/v1/adapters/team%2Fsql").json())["residency"] == "device" and now, "it is on the device")
    assert view["last_used"] > 0
    gone = admin.delete("/admin/v1/adapters/team%2Fsql")
    assert gone.status_code == 200 and gone.json()["name"] == "team/sql"
    assert code_of(admin.get("/admin/v1/adapters/team%2Fsql"), 404) == "model_not_found"
    assert code_of(admin.delete("/admin/v1/adapters/team%2Fsql"), 404) == "model_not_found"
    assert server.http.post("/v1/completions", json={"model": "team/sql", "prompt": "a"}).status_code == 404


def test_a_name_gets_new_content_only_from_the_state_that_was_meant(server, admin):
    first = put(admin, "swap", server.root / "sql", if_content_id="").json()
    assert code_of(put(admin, "swap", server.root / "haiku", if_content_id=""), 409) == "precondition_failed"
    assert code_of(put(admin, "swap", server.root / "haiku", if_content_id="00ff"), 409) == "precondition_failed"
    before = text_of(server, "swap")
    second = put(admin, "swap", server.root / "haiku", if_content_id=first["content_id"]).json()
    assert second["content_id"] != first["content_id"] and second["generation"] > first["generation"]
    assert text_of(server, "swap") != before
    scaled = put(admin, "swap", server.root / "sql", scale=0).json()
    assert scaled["scale"] == 0 and text_of(server, "swap") == text_of(server, "demo"), "a registration's scale counts"
    assert admin.delete("/admin/v1/adapters/swap?mode=now&purge=true").status_code == 200


def test_a_refused_adapter_comes_with_its_report_and_leaves_what_serves(server, admin):
    assert put(admin, "keep", server.root / "sql").status_code == 200
    before = text_of(server, "keep")
    answer = put(admin, "keep", server.root / "large")
    assert code_of(answer, 422) == "adapter_rank_limit"
    report = answer.json()["report"]
    assert report["ok"] is False and "adapter_rank_limit" in [refusal["code"] for refusal in report["refusals"]]
    assert text_of(server, "keep") == before
    assert admin.delete("/admin/v1/adapters/keep").status_code == 200


def test_a_dry_run_reports_and_registers_nothing(server, admin):
    def validate(ref, **fields):
        return admin.post("/admin/v1/adapters/validate", json={"ref": str(ref), **fields})

    def names() -> list:
        return [view["name"] for view in admin.get("/admin/v1/adapters").json()["data"]]

    before = names()
    good = validate(server.root / "sql").json()
    assert good["ok"] is True and good["refusals"] == [] and good["base"]["matches"] is True
    assert good["modules"] and good["ranks"][0] >= 1 and good["pages_needed"] >= 1 and good["tensors_unmatched"] == []
    assert good["features"]["dora"] is False
    bad = validate(server.root / "large")
    assert bad.status_code == 200 and bad.json()["ok"] is False
    assert bad.json()["refusals"][0]["code"] == "adapter_rank_limit"
    assert code_of(validate(server.root / "nothing"), 404) == "model_not_found"
    assert code_of(validate("ftp://x"), 400) == "invalid_value"
    assert code_of(validate(server.root / "sql", self_test=True), 400) == "unsupported_parameter"
    assert names() == before


def test_lists_are_filtered_and_paged(server, admin):
    names = [f"page-{i:02}" for i in range(7)]
    for name in names:
        assert put(admin, name, server.root / "pirate").status_code == 200
    seen, after = [], ""
    while True:
        page = admin.get(f"/admin/v1/adapters?prefix=page-&limit=3&after={after}").json()
        assert len(page["data"]) <= 3
        seen += [view["name"] for view in page["data"]]
        after = page.get("next")
        if not after:
            break
    assert seen == names
    assert admin.get("/admin/v1/adapters?prefix=page-&state=failed").json()["data"] == []
    assert len(admin.get("/admin/v1/adapters?prefix=page-&state=ready").json()["data"]) == 7
    for query in ("state=odd", "limit=0", "limit=x", "limit=1001", "namespace=a/b"):
        assert code_of(admin.get(f"/admin/v1/adapters?{query}"), 400) == "invalid_value", query
    for name in names:
        admin.delete(f"/admin/v1/adapters/{name}")


def test_pins_keep_an_adapter(server, admin):
    put(admin, "kept", server.root / "sql")
    for residency in ("host", "device"):
        view = admin.post("/admin/v1/adapters/kept/pin", json={"residency": residency}).json()
        assert view["pinned"] is True and view["pin"] == residency
    assert code_of(admin.post("/admin/v1/adapters/kept/pin", json={"residency": "moon"}), 400) == "invalid_value"
    assert code_of(admin.post("/admin/v1/adapters/kept/pin", json={}), 400) == "missing_field"
    assert code_of(admin.post("/admin/v1/adapters/none/pin", json={"residency": "host"}), 404) == "model_not_found"
    assert admin.post("/admin/v1/adapters/kept/unpin").json()["pinned"] is False
    admin.delete("/admin/v1/adapters/kept")


def test_aliases_share_requests_and_change_in_one_step(server, admin):
    put(admin, "v1", server.root / "sql")
    put(admin, "v2", server.root / "haiku")
    versions = [{"adapter": "v1", "weight": 1}, {"adapter": "v2", "weight": 3}]
    alias = admin.put("/admin/v1/aliases/live", json={"versions": versions, "expected_version": 0}).json()
    assert (alias["name"], alias["version"], alias["sticky_by"]) == ("live", 1, "none")
    texts = [text_of(server, "live") for _ in range(40)]
    share = texts.count(text_of(server, "v1"))
    assert 1 <= share <= 25 and share + texts.count(text_of(server, "v2")) == 40, share
    assert code_of(admin.put("/admin/v1/aliases/live", json={"versions": versions, "expected_version": 0}), 409) == "precondition_failed"
    promoted = admin.put("/admin/v1/aliases/live", json={"versions": [{"adapter": "v2", "weight": 1}], "expected_version": 1}).json()
    assert promoted["version"] == 2 and text_of(server, "live") == text_of(server, "v2")
    back = admin.post("/admin/v1/aliases/live/rollback").json()
    assert back["version"] == 3 and len(back["versions"]) == 2
    assert admin.get("/admin/v1/aliases/live").json() == back
    assert [one["name"] for one in admin.get("/admin/v1/aliases").json()["data"]] == ["live"]
    for bad in ({}, {"versions": []}, {"versions": [{"weight": 1}]}, {"versions": [{"adapter": "v1", "weight": 0}]},
                {"versions": versions, "sticky_by": "moon"}, {"versions": versions * 9}):
        assert admin.put("/admin/v1/aliases/bad", json=bad).status_code == 400, bad
    assert admin.delete("/admin/v1/aliases/live").status_code == 200
    assert code_of(admin.get("/admin/v1/aliases/live"), 404) == "model_not_found"
    for name in ("v1", "v2"):
        admin.delete(f"/admin/v1/adapters/{name}")


def test_what_is_wrong_is_named(server, admin):
    cases = [({}, "missing_field"), ({"ref": 1}, "invalid_value"), ({"ref": "ftp://x"}, "invalid_value"),
             ({"ref": "/x", "scale": 9}, "invalid_value"), ({"ref": "/x", "namespace": "a/b"}, "invalid_value"),
             ({"ref": "/x", "revision": "main"}, "invalid_value"), ({"ref": "/x", "pinned": "yes"}, "invalid_value")]
    for body, code in cases:
        assert code_of(admin.put("/admin/v1/adapters/x", json=body), 400) == code, body
    assert code_of(put(admin, "x", "/x", query="?wait=soon"), 400) == "invalid_value"
    assert code_of(put(admin, "demo", server.root / "sql"), 400) == "name_is_base_model"
    assert code_of(put(admin, "a%20b", server.root / "sql"), 400) == "invalid_value"
    assert code_of(admin.delete("/admin/v1/adapters/x?mode=soon"), 400) == "invalid_value"
    assert code_of(admin.get("/admin/v1/nothing"), 404) == "route_not_found"
    assert code_of(admin.patch("/admin/v1/adapters/x"), 405) == "method_not_allowed"


def test_status_says_what_the_server_holds(server, admin):
    status = admin.get("/admin/v1/status").json()
    assert status["ready"] is True and status["draining"] is False
    assert status["pages"]["total"] == status["pages"]["free"] + status["pages"]["kv"] + status["pages"]["adapter"]
    assert set(status["adapters"]["states"]) >= {"ready", "failed", "registered"}


def cli(server, *arguments, key="root", folder=None) -> subprocess.CompletedProcess:
    command = [str(binary()), "adapters", "--url", f"unix:{server.folder / 'a.sock'}", "--key", key, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(), stdin=subprocess.DEVNULL, cwd=folder)


def test_the_command_line_does_the_same(server):
    done = cli(server, "load", "cli-sql", str(server.root / "sql"))
    assert done.returncode == 0 and "ready" in done.stdout, done
    assert "cli-sql" in cli(server, "list").stdout
    view = json.loads(cli(server, "--json", "get", "cli-sql").stdout)
    assert view["state"] == "ready"
    assert cli(server, "pin", "cli-sql", "host").returncode == 0 and "host" in cli(server, "get", "cli-sql").stdout
    assert cli(server, "unpin", "cli-sql").returncode == 0
    assert "100.0 %" in cli(server, "alias", "cli-live", "cli-sql").stdout
    assert cli(server, "alias", "cli-live", "--delete").stdout == "alias cli-live deleted\n"
    refused = cli(server, "load", "cli-large", str(server.root / "large"))
    assert refused.returncode == 2 and "adapter_rank_limit" in refused.stdout + refused.stderr, refused
    assert cli(server, "unload", "cli-large").returncode in (0, 2)
    assert cli(server, "unload", "cli-sql").stdout == "cli-sql unloaded\n"
    assert cli(server, "unload", "cli-sql").returncode == 2
    assert cli(server, "list", key="wrong").returncode == 2
    for url in ("http://127.0.0.1:1", f"unix:{server.folder / 'none.sock'}"):
        assert subprocess.run([str(binary()), "adapters", "--url", url, "list"], capture_output=True, timeout=60).returncode == 3


def test_a_load_that_fails_says_why_to_the_operator_alone(server, admin):
    (server.root / "empty").mkdir()
    (server.root / "org").mkdir()
    shutil.copytree(DEMO / "sql", server.root / "org" / "sql")
    outside = str(server.folder / "data")
    cases = [(str(server.root / "nowhere"), "no such folder"), (str(server.root / "empty"), "has no adapter_config.json"),
             (outside, "is not below an --adapter-root")]
    for reference, why in cases:
        answer = put(admin, "why", reference)
        assert code_of(answer, 404) == "model_not_found" and why in answer.json()["error"]["message"], answer.text
        failed = cli(server, "load", "why2", reference)
        assert failed.returncode == 2 and why in failed.stderr, failed
        told = server.http.post("/v1/completions", json={"model": "why", "prompt": "a", "max_tokens": 1}).text
        assert why not in told and reference not in told, told
        admin.delete("/admin/v1/adapters/why"), admin.delete("/admin/v1/adapters/why2")
    assert "no adapter `nobody` is registered" in cli(server, "get", "nobody").stderr
    typed = cli(server, "load", "here", "org/sql", folder=server.root)
    assert typed.returncode == 0 and str(server.root / "org/sql") in typed.stdout, typed
    assert cli(server, "load", "there", "./org/none", folder=server.root).returncode == 2
    hides = admin.put("/admin/v1/aliases/here", json={"versions": [{"adapter": "here", "weight": 1}]})
    assert code_of(hides, 409) == "adapter_exists" and "hide" in hides.json()["error"]["message"]
    admin.delete("/admin/v1/adapters/here")


def test_an_adapter_is_checked_without_a_server(server):
    def validate(*arguments):
        command = [str(binary()), "adapters", "validate", *arguments, "--model-id", str(REPOSITORY / "models/demo/base")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment() | {"HF_ENDPOINT": "http://127.0.0.1:1"})

    good = validate(str(server.root / "sql"))
    assert good.returncode == 0 and good.stdout.startswith("can be served"), good
    report = json.loads(validate(str(server.root / "sql"), "--json").stdout)
    assert report["ok"] is True and report["modules"]
    bad = validate(str(server.root / "large"), "--max-lora-rank", "64")
    assert bad.returncode == 2 and "adapter_rank_limit" in bad.stdout, bad
    assert validate(str(server.root / "nothing")).returncode == 2
    assert validate("acme/private-lora").returncode == 3, "the hub does not answer"


def test_draining_ends_the_process_well(start_server, tmp_path):
    server = start_server("--admin-listen", f"unix:{tmp_path / 'drain.sock'}")
    with server.admin() as admin:
        assert admin.post("/admin/v1/drain").json() == {"draining": True}
    assert server.wait_exit(20) == 0


def test_the_operators_listener_without_a_key_is_for_programs_of_this_machine(data_dir):
    with Server("--admin-listen", "127.0.0.1:0", data_dir=data_dir) as server, server.admin() as admin:
        assert admin.get("/admin/v1/status").status_code == 200
        assert admin.get("/admin/v1/status", headers={"origin": "https://evil.example"}).status_code == 403
        assert server.http.get("/admin/v1/status").status_code == 404, "without an admin key, not on the main port"
