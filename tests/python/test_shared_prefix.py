"""A system prompt that many requests share is computed once for each adapter, also when they all come at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from loramux_server import Server

USERS = 16
SYSTEM = "You answer questions about the sea and the moon. " * 24


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


def ask(server: Server, model: str, user: int) -> tuple[int, int]:
    """Prompt tokens, and how many of them were not computed for this request."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Who is number {user}?"}]
    body = {"model": model, "messages": messages, "max_tokens": 2, "temperature": 0}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("model", ["demo", "pirate"])
def test_of_requests_that_come_at_once_one_computes_what_all_share(server: Server, model: str):
    with ThreadPoolExecutor(USERS) as pool:
        answers = list(pool.map(lambda user: ask(server, model, user), range(USERS)))
    prompt, cached = [tokens for tokens, _ in answers], sorted(cached for _, cached in answers)
    assert min(prompt) > 200, "the system prompt is long"
    assert cached[0] == 0, "nobody else's KV serves this model"
    assert cached[1] > 0.8 * max(prompt), f"all others found what they share: {cached}"
    again = ask(server, model, USERS)
    assert again[0] - again[1] < 48, f"the next one computes only its own words: {again}"
