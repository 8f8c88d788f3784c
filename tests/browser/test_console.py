"""The console in a real browser: it shows what happens, does what its buttons say, and runs nobody's script but its own."""

import json
import threading
import time

import httpx
import pytest

from conftest import LAPTOP, PHONE, Server, slow_model, wait_for_text

HOSTILE = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>"
VIEWS = ["overview", "adapters", "playground"]


class Traffic:
    """Requests for these models, one after another in a thread each, until it is left."""

    def __init__(self, server, *models):
        self.server, self.stop = server, threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(model,)) for model in models]

    def run(self, model):
        with httpx.Client(base_url=self.server.base, timeout=30, trust_env=False) as client:
            while not self.stop.is_set():
                body = {"model": model, "prompt": "Tell me about the sea.\n", "max_tokens": 400, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def answering(status: int, body: dict):
    """In the place of the server."""
    text = json.dumps(body)
    return lambda route: route.fulfill(status=status, content_type="application/json", body=text)


def number(text: str) -> float:
    return float(text.replace(",", "").split()[0])


def test_browsers_get_the_page_and_programs_what_they_got_before(server):
    for address in (server.base, server.console):
        for accept, is_page in (("text/html,application/xhtml+xml,*/*;q=0.8", True), ("*/*", False), ("application/json", False)):
            answer = httpx.get(f"{address}/", headers={"accept": accept}, trust_env=False)
            assert answer.status_code == 200
            assert answer.text.startswith("<!doctype html>") if is_page else answer.content == b"", (address, accept)
        answer = httpx.get(f"{address}/console", trust_env=False)
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_live_numbers_move_with_the_traffic(server, tab):
    page = tab(server.console).open()
    page.get_by_text("Nothing runs.").wait_for()
    assert page.locator("#status").inner_text() == "Live"
    before = number(page.locator(".tile", has_text="Generated").locator(".tile-note").inner_text())
    with Traffic(server, "haiku", "sql", "haiku", "demo"):
        for name in ("haiku", "sql", "base model"):
            page.locator(".batch tbody tr", has_text=name).first.wait_for()
        rate = page.locator(".tile", has_text="Generated").locator(".tile-value")
        wait_for_text(rate, lambda text: number(text) > 0)
        first = page.locator(".tile", has_text="First token").locator(".tile-value")
        wait_for_text(first, lambda text: text != "–")
        assert page.locator(".stack i").count() >= 1
        assert page.locator(".pages i").count() > 50
        page.locator(".memory .legend-list li", has_text="haiku").wait_for()
    wait_for_text(page.locator(".tile", has_text="Generated").locator(".tile-note"), lambda text: number(text) > before)
    page.get_by_text("Nothing runs.").wait_for()


def test_a_plot_is_read_with_the_keyboard(server, tab):
    page = tab(server.console).open()
    plot = page.get_by_role("slider", name="Sequences")
    wait_for_text(plot, lambda text: "running" in text, lambda: plot.get_attribute("aria-valuetext"))
    page.wait_for_timeout(2500)  # a few points
    plot.focus()
    page.keyboard.press("Home")
    text = plot.get_attribute("aria-valuetext")
    assert "seconds ago" in text and "running" in text and "waiting" in text, text
    assert int(plot.get_attribute("aria-valuenow")) < 0
    page.keyboard.press("Escape")
    assert plot.get_attribute("aria-valuetext").startswith("now")


def test_adapters_are_loaded_pinned_and_unloaded_by_buttons(server, tab, roots):
    page = tab(server.console).open("adapters")
    page.get_by_role("button", name="Load adapter").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name", exact=True).fill("team/poet")
    dialog.get_by_label("Reference").fill("ftp://nowhere")
    dialog.get_by_role("button", name="Load").click()
    refused = dialog.get_by_role("alert")
    refused.wait_for()
    assert refused.inner_text().startswith("not an adapter reference") and "(invalid_value)" in refused.inner_text(), "as the API says it"
    dialog.get_by_label("Reference").fill(str(roots / "haiku"))
    dialog.get_by_role("button", name="Load").click()
    dialog.wait_for(state="detached")
    row = page.locator("table.adapters tbody tr", has_text="team/poet")
    row.locator(".badge", has_text="ready").wait_for()

    with server.admin() as admin:
        page.get_by_role("button", name="Pin team/poet", exact=True).click()
        dialog.get_by_label("On the device").check()
        dialog.get_by_role("button", name="Pin").click()
        row.get_by_text("pinned (device)").wait_for()
        assert admin.get("/admin/v1/adapters/team%2Fpoet").json()["pin"] == "device"
        page.get_by_role("button", name="Unpin team/poet", exact=True).click()
        dialog.get_by_role("button", name="Unpin").click()
        page.get_by_role("button", name="Pin team/poet", exact=True).wait_for()
        assert admin.get("/admin/v1/adapters/team%2Fpoet").json()["pinned"] is False

        page.get_by_role("button", name="Unload team/poet", exact=True).click()
        page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
        assert admin.get("/admin/v1/adapters/team%2Fpoet").status_code == 200, "leaving the question does nothing"
        page.get_by_role("button", name="Unload team/poet", exact=True).click()
        dialog.get_by_role("button", name="Unload").click()
        row.wait_for(state="detached")
        assert admin.get("/admin/v1/adapters/team%2Fpoet").status_code == 404


def test_the_table_is_searched_and_sorted_by_the_server(server, tab):
    page = tab(server.console).open("adapters")
    names = page.locator("table.adapters tbody .name-lines .name")
    names.first.wait_for()
    assert names.all_inner_texts() == sorted(names.all_inner_texts())
    page.get_by_role("button", name="Rank", exact=True).click()
    page.locator('th[aria-sort="descending"][data-name="rank"]').wait_for()
    ranks = [int(text.split("–")[-1]) for text in page.locator('td[data-label="Rank"]').all_inner_texts()]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 1
    page.get_by_label("Search").fill("QL")
    page.locator(".page-where", has_text="1–1 of 1").wait_for()
    assert names.all_inner_texts() == ["sql"]
    page.get_by_label("Search").fill("no such name")
    page.get_by_text("No adapter fits.").wait_for()


def test_the_playground_streams_two_adapters_at_once(server, tab):
    page = tab(server.console).open("playground")
    left, right = (page.locator(f'section[aria-label="{side} model"]') for side in ("Left", "Right"))
    left.get_by_role("combobox").fill("pirate")
    right.get_by_role("combobox").fill("haiku")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Run both").click()
    for lane in (left, right):
        lane.locator("dd", has_text="stop").wait_for()
        assert "tok/s" in lane.inner_text() and "ms" in lane.inner_text()
    texts = [lane.locator(".answer").inner_text() for lane in (left, right)]
    assert all(texts) and texts[0] != texts[1]


@pytest.fixture(scope="module")
def slow(data_dir, tmp_path_factory):
    """A model so slow that a page paints many times while it answers."""
    with Server(*slow_model(tmp_path_factory.mktemp("slow")), data_dir=data_dir) as server:
        yield server


def test_in_the_playground_pieces_of_both_models_come_in_turns_and_a_click_ends_both(slow, tab):
    page = tab(slow.base).open("playground")
    for side in ("Left", "Right"):
        page.locator(f'section[aria-label="{side} model"]').get_by_role("combobox").fill("demo")
    page.evaluate("""() => {
      window.order = [];
      for (const [i, answer] of document.querySelectorAll(".answer").entries())
        new MutationObserver(() => answer.textContent && window.order.push(i)).observe(answer, {childList: true, characterData: true, subtree: true});
    }""")
    page.route("**/v1/completions", lambda route: route.continue_(
        post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True})))
    page.get_by_role("button", name="Completion").click()
    page.get_by_label("Max tokens").fill("1900")
    page.get_by_role("button", name="Run both").click()
    wait_for_text(page, lambda length: length > 20, lambda: page.evaluate("window.order.length"))
    page.get_by_role("button", name="Stop").click()
    page.locator(".lane.is-running").first.wait_for(state="detached")
    order = page.evaluate("window.order")
    assert sum(a != b for a, b in zip(order, order[1:])) >= 2, order
    slow.wait_idle()


def test_a_colour_follows_from_the_name_alone(server, tab):
    def colours(page) -> dict:
        page.evaluate("location.hash = 'adapters'")
        page.locator("#view-adapters tbody tr", has_text="sql").wait_for()
        read = "(rows) => rows.map((row) => [row.querySelector('.name').textContent, getComputedStyle(row.querySelector('.swatch')).backgroundColor])"
        return dict(page.locator("#view-adapters tbody tr").evaluate_all(read))

    directly = colours(tab(server.console).open("adapters"))
    page = tab(server.console).open("playground")
    model = page.get_by_role("combobox", name="Left model")
    for i in range(30):
        model.fill(f"other-{i}")
    assert colours(page) == directly
    assert len(set(directly.values())) >= 5 and "rgba(0, 0, 0, 0)" not in directly.values(), directly


def test_the_playground_begins_with_the_base_model_beside_an_adapter(server, tab):
    page = tab(server.base).open("playground")
    left, right = (page.get_by_role("combobox", name=f"{side} model") for side in ("Left", "Right"))
    wait_for_text(page, bool, left.input_value)
    assert (left.input_value(), right.input_value()) == ("demo", "emoji")


def test_an_error_of_the_playground_is_what_the_api_says(server, tab):
    page = tab(server.console).open("playground")
    page.get_by_role("combobox", name="Left model").fill("nobody")
    page.get_by_role("button", name="Run both").click()
    alert = page.locator('section[aria-label="Left model"]').get_by_role("alert")
    alert.wait_for()
    assert "nobody" in alert.inner_text() and "(model_not_found)" in alert.inner_text()


def test_hostile_names_are_text(server, tab):
    opened = tab(server.console)
    live = httpx.get(f"{server.console}/admin/v1/live", trust_env=False).json()
    named = {"name": HOSTILE, "namespace": HOSTILE, "content": HOSTILE}
    share = {"adapters": [named], "running": 3, "waiting": 2, "running_tokens": 9}
    live["batch"] |= {"running": 3, "waiting": 2, "shares": [share], "loading": 1, "loading_names": [named]}
    live["pages"]["adapters"] = [named | {"pages": 3, "running": 1, "pinned": True}]
    live |= {"model": HOSTILE, "ready": False, "waiting_for": [HOSTILE]}
    view = httpx.get(f"{server.console}/admin/v1/adapters", trust_env=False).json()["data"][0]
    view |= {"name": HOSTILE, "ref": HOSTILE, "error": {"code": HOSTILE, "message": HOSTILE, "retryable": False}}
    models = {"object": "list", "data": [{"id": HOSTILE, "object": "model", "parent": "x"}]}
    error = {"error": {"message": HOSTILE, "code": HOSTILE}}
    for path, body, status in (("**/admin/v1/live*", live, 200), ("**/admin/v1/adapters?*", {"data": [view], "total": 1}, 200),
                               ("**/v1/models", models, 200), ("**/v1/chat/completions", error, 400)):
        opened.page.route(path, answering(status, body))
    page = opened.open()
    page.locator(".batch .name", has_text="onerror").wait_for()
    page.evaluate("location.hash = 'adapters'")
    page.locator(".adapters .row-error", has_text="onerror").wait_for()
    page.get_by_role("button", name="Unload").click()
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.evaluate("location.hash = 'playground'")
    page.get_by_role("button", name="Run both").click()
    page.locator(".lane .error", has_text="onerror").first.wait_for()
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script").count() == 0
    opened.errors.clear()  # the browser logs the 400 that was made up


def test_keys_open_what_they_should_and_stay_in_the_tab(data_dir, tab):
    with Server("--admin-key", "root", data_dir=data_dir, api_key="user") as server:
        opened = tab(server.base)
        page = opened.open()
        gate = page.locator("#view-overview .gate")
        gate.get_by_text("Live numbers need the admin key").wait_for()
        assert page.locator(".board").is_hidden()
        gate.get_by_label("Admin key").fill("wrong")
        gate.get_by_role("button", name="Show live numbers").click()
        gate.get_by_text("This admin key was refused.").wait_for()
        gate.get_by_label("Admin key").fill("root")
        gate.get_by_role("button", name="Show live numbers").click()
        page.locator("#status", has_text="Live").wait_for()
        page.evaluate("location.hash = 'playground'")
        notice = page.locator("#view-playground > .notice")
        notice.get_by_text("This server needs an API key").wait_for()
        notice.get_by_role("button", name="Keys").click()
        page.get_by_role("dialog").get_by_label("API key").fill("user")
        page.get_by_role("button", name="Use these keys").click()
        wait_for_text(page, bool, page.locator(".model").first.input_value)
        page.get_by_role("button", name="Run both").click()
        page.locator(".lane dd", has_text="stop").first.wait_for()
        assert "root" not in page.url and "user" not in page.url
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        page.evaluate("location.hash = 'overview'")
        page.locator("#status", has_text="Live").wait_for()
    page.locator("#status", has_text="Disconnected").wait_for()
    assert page.locator("#view-overview > .notice").inner_text().startswith("Disconnected")
    opened.errors.clear()  # refused connections


def test_a_port_without_an_admin_key_says_where_the_numbers_are(server, tab):
    page = tab(server.base).page
    page.goto(server.base)
    page.locator("#view-playground:not([hidden])").wait_for()  # what works here comes first
    page.get_by_role("link", name="Overview").click()
    gate = page.locator("#view-overview .gate")
    gate.get_by_text("This port shows no live numbers").wait_for()
    gate.get_by_role("link", name="playground", exact=True).click()
    page.get_by_role("button", name="Run both").click()
    page.locator(".lane dd", has_text="stop").first.wait_for()


@pytest.mark.parametrize(("size", "scheme"), [(LAPTOP, "light"), (LAPTOP, "dark"), (PHONE, "light")])
def test_nothing_stands_in_anybodys_way(server, tab, axe, size, scheme):
    opened = tab(server.console, size=size, scheme=scheme)
    with Traffic(server, "haiku", "sql"):
        page = opened.open()
        page.locator(".batch tbody tr").first.wait_for()
        for view in VIEWS:
            page.evaluate(f"location.hash = '{view}'")
            page.wait_for_selector(f"#view-{view}:not([hidden])")
            if view == "adapters":
                page.locator("table.adapters tbody tr").first.wait_for()
            assert opened.axe_violations(axe) == [], view
            assert page.evaluate("document.documentElement.scrollWidth") == size[0], f"{view} scrolls sideways"
    page.evaluate("location.hash = 'adapters'")
    for button in ("Load adapter", "Unload sql", "Pin sql"):
        page.get_by_role("button", name=button, exact=True).click()
        page.get_by_role("dialog").wait_for()
        assert opened.axe_violations(axe) == [], button
        page.keyboard.press("Escape")


def test_it_asks_about_once_a_second(server, tab):
    opened = tab(server.console)
    asked = []
    opened.page.on("request", lambda request: asked.append(time.monotonic()) if "/live" in request.url else None)
    page = opened.open()
    page.wait_for_timeout(4000)
    assert 3 <= len(asked) <= 7, len(asked)
