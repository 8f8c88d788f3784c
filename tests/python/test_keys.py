"""Keys: who may call what, how often, and that nothing repeats a key or a token."""

import hashlib
import shutil
import signal
import socket

import httpx
import pytest

from loramux_server import REPOSITORY, Server, run_to_end, wait_until
from wire import check_error

DEMO = REPOSITORY / "models/demo/adapters"


def bearer(key: str) -> dict:
    return {"authorization": f"Bearer {key}"}


def complete(server, key: str, **changes) -> httpx.Response:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4, **changes}
    return server.http.post("/v1/completions", json=body, headers=bearer(key))


def code_of(answer: httpx.Response) -> str:
    return check_error(answer.json())["code"]


def entry(name: str, key: str, **fields) -> str:
    lines = [f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    lines += [f"{field} = {value}" for field, value in fields.items()]
    return "[[keys]]\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    (folder / "lines").write_text("# clients\nfrom-file\n")
    (folder / "keys.toml").write_text(
        entry("acme", "acme-key", namespace='"acme"', adapters='["sql", "org/*"]', requests_per_minute=1000)
        + entry("slow", "slow-key", requests_per_minute=2)
        + entry("ops", "ops-key", admin="true"))
    flags = ["--api-key", "typed", "--api-key-file", str(folder / "lines"), "--keys-file", str(folder / "keys.toml"),
             "--adapter-dir", str(DEMO), "--log-level", "trace", "--admin-listen", f"unix:{folder / 'admin.sock'}"]
    with Server(*flags, data_dir=str(folder / "data"), api_key="typed-too") as server:
        server.folder = folder
        yield server


def test_every_kind_of_key_opens_what_it_should(keyed):
    for key in ("typed", "typed-too", "from-file", "acme-key"):
        assert complete(keyed, key).status_code == 200, key
    for key in ("", "wrong", "Typed", "typed ", "# clients"):
        answer = keyed.http.post("/v1/completions", json={"prompt": "a"}, headers={"authorization": f"Bearer {key}x"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert code_of(answer) == "invalid_api_key"
    answer = complete(keyed, "ops-key")
    assert (answer.status_code, code_of(answer)) == (403, "route_forbidden")
    for path in ("/admin/v1/status", "/admin/v1/adapters"):
        assert keyed.http.get(path, headers=bearer("ops-key")).status_code == 200
        assert keyed.http.get(path, headers=bearer("typed")).status_code == 403
        assert keyed.http.get(path, headers={"authorization": ""}).status_code == 401
    with keyed.admin("ops-key") as admin:
        assert admin.get("/admin/v1/status").json()["ready"] is True
    with keyed.admin() as admin:
        assert admin.get("/admin/v1/status").status_code == 401


def test_a_key_sees_only_its_adapters(keyed):
    def names(key: str) -> set:
        return {card["id"] for card in keyed.http.get("/v1/models", headers=bearer(key)).json()["data"]}

    for model in ("sql", "haiku"):
        assert complete(keyed, "typed", model=model).status_code == 200
    assert complete(keyed, "acme-key", model="sql").status_code == 200
    refused, unknown = complete(keyed, "acme-key", model="haiku"), complete(keyed, "acme-key", model="nothing")
    assert refused.status_code == unknown.status_code == 404
    text = refused.json()["error"]["message"]
    assert text == unknown.json()["error"]["message"].replace("nothing", "haiku"), "one answer for unknown and not yours"
    assert {"demo", "sql", "haiku"} <= names("typed")
    assert "sql" in names("acme-key") and "haiku" not in names("acme-key")
    assert keyed.http.get("/v1/models/haiku", headers=bearer("acme-key")).status_code == 404


def test_a_key_has_its_rate(keyed):
    answers = [complete(keyed, "slow-key") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert code_of(answers[2]) == "rate_limited" and 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert complete(keyed, "typed").status_code == 200


def test_keys_are_read_again_on_a_signal(keyed):
    file = keyed.folder / "keys.toml"
    before = file.read_text()
    assert complete(keyed, "new-key").status_code == 401
    file.write_text(before + entry("new", "new-key"))
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: complete(keyed, "new-key").status_code == 200, "the new key works")
    file.write_text("nonsense = ")
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "keys stay as they were" in keyed.log(), "the mistake is logged")
    assert complete(keyed, "new-key").status_code == 200
    file.write_text(before)
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: complete(keyed, "new-key").status_code == 401, "the key is gone")


def test_no_output_repeats_a_key_or_a_token(keyed):
    canary = "canary-7d21f0"
    for path in ("/v1/completions", "/v1/load_lora_adapter", "/tokenize", "/v1/chat/completions"):
        for headers in ({"x-adapter-token": canary}, bearer(canary), {"x-adapter-token": canary * 500}):
            body = {"model": f"https://u:{canary}@127.0.0.1:1/x?sig={canary}", "prompt": "a", "api_token": canary,
                    "lora_name": "x", "lora_path": f"https://u:{canary}@127.0.0.1:1/x?sig={canary}"}
            for key in ("typed", None):
                sent = headers | (bearer(key) if key and "authorization" not in headers else {})
                answer = keyed.http.post(path, json=body, headers=sent)
                assert canary not in answer.text and canary not in str(answer.headers), path
    assert canary not in keyed.http.get("/metrics").text
    log = keyed.log()
    for secret in (canary, "typed-too", "from-file", "acme-key", "ops-key"):
        assert secret not in log, secret


def test_mistakes_in_key_files_end_the_start_without_their_content(tmp_path):
    secret = "hunter2-hunter2"
    cases = {"--keys-file": f'[[keys]]\nname = "a"\nsha256 = "{secret}"\n', "--api-key-file": "# nothing\n"}
    for flag, text in cases.items():
        (tmp_path / "file").write_text(text)
        ended = run_to_end(flag, str(tmp_path / "file"), "--data-dir", str(tmp_path / "data"))
        assert ended.returncode == 1 and flag in ended.stderr and secret not in ended.stderr, ended.stderr
    ended = run_to_end("--admin-listen", "0.0.0.0:0", "--data-dir", str(tmp_path / "data"))
    assert ended.returncode == 1 and "--admin-key" in ended.stderr


def test_an_open_server_takes_the_hubs_tokens_and_says_that_it_is_open(start_server):
    server = start_server("--allow-runtime-adapters")
    for key in ("EMPTY", "hf_abcdef", ""):
        assert complete(server, key or "x").status_code == 200
    assert "everyone who can reach this address" in server.log() and "load and unload adapters too" in server.log()


def test_trusted_programs_of_this_machine_need_no_key_for_two_routes_and_the_list(start_server):
    server = start_server("--trust-loopback-adapters", "--allow-runtime-adapters", api_key="k")
    with httpx.Client(base_url=server.base, trust_env=False) as stranger:
        assert stranger.get("/v1/models").status_code == 200
        assert stranger.post("/v1/unload_lora_adapter", json={"lora_name": "none"}).status_code == 404
        assert stranger.post("/v1/completions", json={"prompt": "a"}).status_code == 401
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        plain = start_server("--trust-loopback-adapters", "--host", "0.0.0.0", api_key="k")
        port = plain.address.rsplit(":", 1)[1]
        answer = httpx.get(f"http://{own}:{port}/v1/models", trust_env=False)
        assert answer.status_code == 401, "this machine's outer address is not loopback"


def test_a_key_with_a_list_loads_nothing_that_it_may_not_use(tmp_path):
    """A name from the list is no way to what the operator named, nor to what the list lacks."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root / "open", secret):
        shutil.copytree(DEMO / "sql", folder)
    (tmp_path / "keys.toml").write_text(entry("guest", "guest-key", adapters=f'["guest-*", "{root}/*"]') + entry("own", "own-key"))
    flags = ["--keys-file", str(tmp_path / "keys.toml"), "--allow-runtime-adapters", "--adapter", f"secret={secret}", "--adapter-root", str(root)]
    with Server(*flags, data_dir=str(tmp_path / "data")) as server:
        def load(key: str, name: str, path) -> httpx.Response:
            return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}, headers=bearer(key))
        assert load("guest-key", "guest-x", secret).status_code == 404
        assert load("guest-key", "guest-x", "hf://acme/private").status_code == 404
        assert load("guest-key", "other", root / "open").status_code == 403
        assert load("guest-key", "guest-x", root / "open").status_code == 200
        assert complete(server, "guest-key", model="guest-x").status_code == 200
        assert load("own-key", "mine", secret).status_code == 200, "a plain key is the operator's"
