"""vLLM's and SGLang's routes that load and unload adapters, as their clients and AIBrix's controller use them."""

import concurrent.futures
import json
import shutil

import httpx
import pytest

from adapter_files import write_random_adapter
from loramux_server import REPOSITORY, Server, wait_until

DEMO = REPOSITORY / "models/demo/adapters"
MODEL_CONFIG = json.loads((REPOSITORY / "models/demo/base/config.json").read_text())
RETRY_PHRASES = ("connection refused", "connection reset", "timeout", "no route to host", "network is unreachable",
                 "temporary failure", "service unavailable", "bad gateway")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime")
    root = folder / "loras"
    shutil.copytree(DEMO / "sql", root / "sql")
    shutil.copytree(DEMO / "haiku", root / "haiku")
    write_random_adapter(root / "large", MODEL_CONFIG, 512, ("q_proj",), gain=8)
    write_random_adapter(root / "other-base", {**MODEL_CONFIG, "hidden_size": 128, "head_dim": 32}, 4, ("q_proj",))
    (root / "empty").mkdir()
    (root / "Connection Refused timeout").mkdir()
    shutil.copytree(DEMO / "sql", folder / "outside")
    flags = ["--adapter-root", str(root), "--max-lora-rank", "64"]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with Server(*flags, data_dir=str(folder / "data"), env=env) as server:
        server.root, server.folder = root, folder
        yield server


def load(server, name, path, **fields) -> httpx.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def unload(server, name, **fields) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})


def listed(server) -> dict:
    return {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}


def text_of(server, model) -> str:
    body = {"model": model, "prompt": "Once", "max_tokens": 12, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def refused(answer: httpx.Response, status: int, kind: str) -> dict:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, kind), answer.text
    if error["retryable"]:
        assert error["message"].startswith("service unavailable:"), error
    else:
        assert not any(phrase in error["message"].lower() for phrase in RETRY_PHRASES), error
    return error


def test_load_use_list_unload(server):
    answer = load(server, "one", server.root / "sql")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    card = listed(server)["one"]
    assert card["parent"] == "demo" and card["root"] == str(server.root / "sql")
    assert text_of(server, "one") != text_of(server, "demo")
    answer = unload(server, "one", lora_int_id=None)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'one' removed successfully.")
    assert "one" not in listed(server)
    assert server.http.post("/v1/completions", json={"model": "one", "prompt": "a"}).status_code == 404
    error = refused(unload(server, "one"), 404, "NotFoundError")
    assert error["message"] == "The lora adapter 'one' cannot be found."


def test_taken_names_and_loading_in_place(server):
    assert load(server, "two", server.root / "sql").status_code == 200
    for path in (server.root / "sql", server.root / "haiku"):
        error = refused(load(server, "two", path), 400, "InvalidUserInput")
        assert error["message"] == ("The lora adapter 'two' has already been loaded. If you want to load the adapter in place, "
                                    "set 'load_inplace' to True.")
    sql = text_of(server, "two")
    assert load(server, "two", server.root / "haiku", load_inplace=True).status_code == 200
    assert text_of(server, "two") != sql
    assert refused(load(server, "two", server.root / "large", load_inplace=True), 400, "BadRequestError")
    assert text_of(server, "two") != sql, "a failed load in place leaves what serves"
    assert load(server, "two", server.root / "sql", load_inplace=True, lora_int_id=7).status_code == 200
    assert text_of(server, "two") == sql
    assert unload(server, "two", lora_int_id=7).status_code == 200


def test_what_is_missing_or_wrong_has_vllms_answer(server):
    def post(path, body):
        return server.http.post(path, json=body)

    for body in ({}, {"lora_name": "x"}, {"lora_path": "/x"}, {"lora_name": None, "lora_path": "/x"}):
        refused(post("/v1/load_lora_adapter", body), 400, "BadRequestError")
    for body in ({"lora_name": "", "lora_path": "/x"}, {"lora_name": "x", "lora_path": ""}):
        error = refused(post("/v1/load_lora_adapter", body), 400, "InvalidUserInput")
        assert error["message"] == "Both 'lora_name' and 'lora_path' must be provided."
    for name in ("../x", "a b", "a/b/c", "x" * 129):
        refused(load(server, name, server.root / "sql"), 400, "InvalidUserInput")
    assert refused(load(server, "demo", server.root / "sql"), 400, "InvalidUserInput")["code"] == "name_is_base_model"
    for body in ({}, {"lora_name": ""}, {"lora_name": None}):
        error = refused(post("/v1/unload_lora_adapter", body), 400, "InvalidUserInput")
        assert error["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."
    assert server.http.post("/v1/load_lora_adapter", content=b"{").status_code == 400
    assert not set(listed(server)) - {"demo", "pirate", "haiku", "sql", "shout", "emoji"}


def test_absent_and_forbidden_paths_are_one_answer(server):
    for path in (server.root / "nothing", server.folder / "outside", "/etc", server.root / "sql/../../outside", "../x", "ftp://x/y",
                 "http://127.0.0.1:1/x", server.root / "Connection Refused timeout/none", "sql"):
        error = refused(load(server, "three", path), 404, "NotFoundError")
        assert error["message"].startswith("No adapter found for "), error
    assert "three" not in listed(server)


def test_refused_adapters_keep_our_code_under_vllms_status(server):
    assert refused(load(server, "four", server.root / "large"), 400, "BadRequestError")["code"] == "adapter_rank_limit"
    code = refused(load(server, "four", server.root / "other-base"), 400, "BadRequestError")["code"]
    assert code in ("adapter_base_mismatch", "adapter_invalid")
    assert "four" not in listed(server)
    assert load(server, "four", server.root / "sql").status_code == 200, "the name is free"
    assert unload(server, "four").status_code == 200


def test_the_same_load_twice_at_once_is_one_load(server):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: load(server, "five", server.root / "haiku"), range(8)))
    assert {answer.status_code for answer in answers} <= {200, 400} and any(answer.status_code == 200 for answer in answers)
    for answer in answers:
        assert answer.status_code == 200 or "has already been loaded" in answer.text
    assert unload(server, "five").status_code == 200


def test_a_load_goes_on_when_its_caller_hangs_up(server):
    with pytest.raises(httpx.TimeoutException):
        with httpx.Client(base_url=server.base, trust_env=False, timeout=httpx.Timeout(5, read=0.0005)) as client:
            client.post("/v1/load_lora_adapter", json={"lora_name": "six", "lora_path": str(server.root / "sql")})
    wait_until(lambda: "six" in listed(server), "the adapter is listed")
    assert unload(server, "six").status_code == 200


def test_sglangs_spelling(server):
    answer = server.http.post("/load_lora_adapter", json={"lora_name": "seven", "lora_path": str(server.root / "sql"), "pinned": False})
    assert answer.status_code == 200 and answer.json()["success"] is True
    assert answer.json()["loaded_adapters"]["seven"] == str(server.root / "sql")
    for path, body in (("/load_lora_adapter", {"lora_name": "seven", "lora_path": str(server.root / "sql")}),
                       ("/load_lora_adapter", {"lora_name": "x"}), ("/load_lora_adapter", {"lora_name": "x", "lora_path": "/none"}),
                       ("/unload_lora_adapter", {"lora_name": "none"}), ("/unload_lora_adapter", {})):
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400 and set(answer.json()) == {"success", "error_message"}, answer.text
        assert answer.json()["success"] is False and answer.json()["error_message"]
    answer = server.http.post("/unload_lora_adapter", json={"lora_name": "seven"})
    assert answer.status_code == 200 and "seven" not in answer.json()["loaded_adapters"]


def test_the_routes_are_off_unless_the_operator_says_so(demo):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"):
        answer = demo.http.post(path, json={"lora_name": "x", "lora_path": "/x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "runtime_adapters_disabled")
        assert "--allow-runtime-adapters" in error["message"]
