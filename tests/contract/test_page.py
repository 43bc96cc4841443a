"""The page at `/` in a real browser on a real server, and the JSON that it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from api.client_sync import connect_sync
from runtime.models import SEEDLING
from tests.contract.browser import CHROMIUM, Visit, opened_browser, visited
from tests.contract.conftest import KEYS, LABEL
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, started
from tests.contract.stubs import PROMPT

pytestmark = pytest.mark.door

SINK, WINDOW = 4, 60
VISIBLE = SINK + WINDOW
EVIL = "<img src=x onerror=\"document.title='broken in'\">"
LONG = "word" * 60
# Each label with the turns of its session, one of which is 20 tokens appended and 3 generated.
TURNS = {"agent": 20, EVIL: 2, LONG: 1}
TURN_TOKENS = len(PROMPT) + 3
QUESTION = "Tell me about the sea."
ENDLESS = {
    "model": SEEDLING,
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 2**31 - 1,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def watched() -> Iterator[ServerProcess]:
    """A server with one permit, for which completions wait, and the sessions of TURNS."""
    settings: dict[str, Any] = {"http_overflow": "evict", "max_concurrent": 1, "admission_policy": "queue"}
    with started("perennial", sink=SINK, window=WINDOW, **settings) as server, connect_sync(server.grpc) as client:
        for label, turns in TURNS.items():
            session = client.create_session(label=label)
            for _ in range(turns):
                session.append(PROMPT)
                with session.generate(3) as events:
                    list(events)
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, watched: ServerProcess) -> Iterator[Visit]:
    """The page once it has shown what the server says."""
    with visited(browser, watched.http) as visit:
        expect(visit.page.locator("#state")).to_have_text("serving")
        yield visit


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.page


def status(server: ServerProcess, **headers: str) -> Any:
    response = httpx.get(f"{server.http}/v1/runtime", headers=headers, timeout=MOST_S)
    assert response.status_code == 200
    return response.json()


def overflow_of(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    over: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return over


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def until_answered(page: Page) -> None:
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")


@contextmanager
def permit_taken(server: ServerProcess) -> Iterator[None]:
    with httpx.stream("POST", f"{server.http}/v1/chat/completions", json=ENDLESS, timeout=MOST_S) as stream:
        assert stream.status_code == 200
        yield


class TestRuntimeStatus:
    def test_tells_of_each_session_what_its_slab_holds(self, watched: ServerProcess) -> None:
        ceiling = status(watched)["slab"]["ceiling_bytes"]
        token_bytes = told(watched)["agent"]["kv_live_bytes"] // VISIBLE
        assert 0 < token_bytes * VISIBLE < ceiling

        for label, turns in TURNS.items():
            length = turns * TURN_TOKENS
            one = told(watched)[label]
            # The last token of a generation was drawn, and the model has not read it yet.
            held = min(length - 1, VISIBLE)
            assert one["idle_seconds"] >= 0
            assert {name: one[name] for name in one if name != "idle_seconds"} == {
                "label": label,
                "history_length": length,
                "live_sink_tokens": SINK,
                "live_window_tokens": held - SINK,
                "evicted_token_count": max(0, length - VISIBLE),
                "kv_live_bytes": held * token_bytes,
            }

    def test_tells_slabs_admission_and_tokens(self, watched: ServerProcess) -> None:
        said = status(watched)

        assert (said["object"], said["model"]) == ("runtime", SEEDLING)
        assert said["uptime_s"] > 0
        assert said["slab"].pop("ceiling_bytes") > 0
        assert said["slab"] == {"sink": SINK, "window": WINDOW, "total": 8 + 1, "in_use": len(TURNS)}
        assert said["admission"] == {"max_concurrent": 1, "running": 0, "waiting": 0, "policy": "queue"}
        assert said["generated_tokens_total"] >= 3 * sum(TURNS.values())

    def test_tells_every_turn_with_the_history_that_it_had(self, watched: ServerProcess) -> None:
        turns = [turn for turn in status(watched)["turns"] if turn["label"] in TURNS]

        assert [(turn["label"], turn["history_length"]) for turn in turns] == [
            (label, number * TURN_TOKENS + len(PROMPT)) for label, count in TURNS.items() for number in range(count)
        ]
        assert all(turn["time_to_first_token_s"] > 0 for turn in turns)

    def test_tells_no_session_id(self, watched: ServerProcess) -> None:
        with connect_sync(watched.grpc) as client, client.session(label="ours") as session:
            said = json.dumps(status(watched))

            assert "ours" in said
            assert session.id not in said

    def test_needs_a_key_where_the_server_has_some(self, keyed: ServerProcess) -> None:
        assert httpx.get(f"{keyed.http}/v1/runtime", timeout=MOST_S).status_code == 401
        assert status(keyed, authorization=f"Bearer {KEYS[1]}")["model"] == LABEL


def told(server: ServerProcess) -> dict[str, Any]:
    return {one["label"]: one for one in status(server)["sessions"]}


def test_the_page_needs_no_key_and_may_do_nothing_but_ask_this_server(keyed: ServerProcess) -> None:
    response = httpx.get(keyed.http, timeout=MOST_S)

    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert response.headers["deprecation"] == "true"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind]) for kind in ("script-src", "style-src"))


def test_each_session_is_shown_with_its_numbers(page: Page) -> None:
    for label, turns in TURNS.items():
        row = page.get_by_role("row").filter(has=page.get_by_text(label, exact=True))
        length = turns * TURN_TOKENS
        held = min(length - 1, VISIBLE)
        expect(row.locator("[data-name=History]")).to_have_text(str(length))
        expect(row.locator("[data-name=Evicted]")).to_have_text(str(max(0, length - VISIBLE)))
        expect(row.locator(".words")).to_have_text(f"{SINK} sink + {held - SINK} window of {VISIBLE} tokens")
        expect(row.locator(".bar.now .window")).to_have_attribute(
            "style", f"width: {percent((held - SINK) / VISIBLE)};"
        )


def percent(share: float) -> re.Pattern[str] | str:
    return f"{share * 100:g}%"


def test_the_tiles_show_sessions_slabs_and_permits(page: Page) -> None:
    expect(page.locator("#session-count")).to_have_text(str(len(TURNS)))
    expect(page.locator("#slabs")).to_have_text(f"{len(TURNS)} of 9")
    expect(page.locator("#admission")).to_have_text("0 of 1")
    expect(page.locator("#rate")).to_have_text("0")


def test_the_plot_has_a_point_for_every_turn_and_says_in_words_what_it_shows(
    page: Page, watched: ServerProcess
) -> None:
    turns = status(watched)["turns"]

    expect(page.locator("#plot circle")).to_have_count(len(turns))
    expect(page.locator("#plot .median")).to_have_count(1)
    expect(page.locator("#plot-words")).to_contain_text(f"The last {len(turns)} turns. Line: the median,")
    titles = page.locator("#plot circle title").all_text_contents()
    assert titles[0].startswith("agent: ")
    assert titles[0].endswith(f"after {len(PROMPT)} tokens")


def test_a_turn_made_while_somebody_watches_appears(page: Page, watched: ServerProcess) -> None:
    before = len(status(watched)["turns"])
    with connect_sync(watched.grpc) as client, client.session(label="newcomer") as session:
        session.append(PROMPT)
        with session.generate(1) as events:
            list(events)

        expect(page.get_by_role("row").filter(has_text="newcomer")).to_have_count(1)
        expect(page.locator("#plot circle")).to_have_count(before + 1)
    expect(page.get_by_role("row").filter(has_text="newcomer")).to_have_count(0)


def test_markup_in_a_label_is_text(page: Page) -> None:
    expect(page.locator("tbody").get_by_text(EVIL, exact=True)).to_be_visible()
    expect(page.locator("#legend").get_by_text(EVIL, exact=True)).to_be_visible()
    assert page.locator("img").count() == 0
    assert page.title() == "Perennial"


def test_the_console_is_silent_and_no_other_host_is_asked(visit: Visit, watched: ServerProcess) -> None:
    ask(visit.page, QUESTION)
    until_answered(visit.page)

    assert visit.complaints == []
    assert visit.urls
    assert [url for url in visit.urls if not url.startswith((watched.http, "data:"))] == []


def test_a_talk_goes_by_keyboard_alone_and_comes_in_pieces(page: Page, watched: ServerProcess) -> None:
    def focused() -> str:
        name: str = page.evaluate("document.activeElement.id")
        return name

    page.evaluate(
        "window.pieces = 0; new MutationObserver(changes => { pieces += changes.length })"
        ".observe(document.getElementById('log'), { childList: true, subtree: true })"
    )
    for _ in range(10):
        page.keyboard.press("Tab")
        if focused() == "message":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.type(QUESTION)
    with page.expect_request("**/v1/chat/completions"):
        page.keyboard.press("Enter")
    until_answered(page)

    answers = page.locator("#log .assistant span")
    first = answer_to(watched, [{"role": "user", "content": QUESTION}])
    assert (focused(), outline) == ("message", "solid")
    assert answers.all_text_contents() == [first]
    assert page.evaluate("pieces") > 5

    with page.expect_request("**/v1/chat/completions") as second:
        page.keyboard.type("And the sky?")
        page.keyboard.press("Enter")
    until_answered(page)

    assert json.loads(second.value.post_data or "")["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And the sky?"},
    ]
    expect(answers).to_have_count(2)


def answer_to(server: ServerProcess, messages: list[dict[str, str]]) -> str:
    body = {"model": SEEDLING, "messages": messages, "temperature": 0}
    answer: str = httpx.post(f"{server.http}/v1/chat/completions", json=body, timeout=MOST_S).json()["choices"][0][
        "message"
    ]["content"]
    return answer


def test_who_waits_for_a_permit_is_shown_and_may_stop(page: Page, watched: ServerProcess) -> None:
    with permit_taken(watched):
        ask(page, QUESTION)
        expect(page.locator("#admission")).to_have_text("1 of 1")
        expect(page.locator("#admission-more")).to_have_text("1 waiting, policy queue")

        page.keyboard.press("Escape")

        expect(page.get_by_role("log")).to_contain_text("stopped")
        expect(page.get_by_label("Message")).to_have_value(QUESTION)
        expect(page.locator("#admission-more")).to_have_text("0 waiting, policy queue")
    expect(page.locator("#admission")).to_have_text("0 of 1")


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(page: Page) -> None:
    def ask_for_more(route: Route) -> None:
        asked = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(asked | {"max_tokens": ENDLESS["max_tokens"], "ignore_eos": True}))

    # An answer that ends by itself may have come whole when the page gets to press.
    page.route("**/v1/chat/completions", ask_for_more)
    page.get_by_label("Message").fill(QUESTION)
    page.evaluate(
        "new MutationObserver(() => { if (document.querySelector('#log .assistant span')?.textContent) "
        "document.getElementById('stop').click() }).observe(document.getElementById('log'), { childList: true, subtree: true })"
    )
    page.get_by_label("Message").press("Enter")

    until_answered(page)
    expect(page.locator("#log .assistant .note")).to_have_text("stopped")
    assert page.locator("#log .assistant span").first.text_content()


CHUNK = {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]}


@pytest.mark.parametrize(
    ("last", "words"),
    [({"error": {"message": "not done within 3 s"}}, "not done within 3 s"), (None, "the answer broke off")],
)
def test_an_answer_that_breaks_off_says_so(page: Page, last: Any, words: str) -> None:
    events = "".join(f"data: {json.dumps(event)}\n\n" for event in (CHUNK, last) if event)

    def fulfil(route: Route) -> None:
        route.fulfill(body=events, content_type="text/event-stream")

    page.route("**/v1/chat/completions", fulfil)
    ask(page, QUESTION)

    expect(page.locator("#log .assistant .bad")).to_have_text(words)
    expect(page.locator("#log .assistant span").first).to_have_text("Half")


def test_a_refusal_is_shown_with_the_servers_words_and_the_message_comes_back(page: Page) -> None:
    def fulfil(route: Route) -> None:
        route.fulfill(status=429, json={"error": {"message": "too few permits"}})

    page.route("**/v1/chat/completions", fulfil)
    ask(page, QUESTION)

    expect(page.locator("#log .assistant .bad")).to_have_text("too few permits")
    expect(page.get_by_label("Message")).to_have_value(QUESTION)


def test_a_server_that_is_away_is_asked_again_until_it_is_back(page: Page) -> None:
    page.route("**/v1/runtime", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("the server does not answer")

    page.unroute("**/v1/runtime")

    expect(page.locator("#state")).to_have_text("serving")


def test_a_key_is_asked_for_where_the_server_has_some_and_kept_for_the_tab(
    browser: Browser, keyed: ServerProcess
) -> None:
    with visited(browser, keyed.http) as visit:
        page, field = visit.page, visit.page.get_by_label("Key (kept")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("type", "password")

        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not know this key.")
        expect(field).to_be_focused()

        page.keyboard.type(KEYS[0])
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text(LABEL)
        expect(field).to_be_hidden()
        ask(page, QUESTION)
        until_answered(page)
        assert page.locator("#log .assistant span").first.text_content()

        page.reload()
        expect(page.locator("#state")).to_have_text("serving")
        expect(field).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0
        assert [url for url in visit.urls if KEYS[0] in url] == []

    with visited(browser, keyed.http) as another:
        expect(another.page.get_by_label("Key (kept")).to_be_focused()


@pytest.mark.parametrize("width", [360, 600, 820, 1200])
def test_no_width_makes_the_page_scroll_sideways(browser: Browser, watched: ServerProcess, width: int) -> None:
    with visited(browser, watched.http, width=width) as visit:
        expect(visit.page.locator("#plot circle")).not_to_have_count(0)
        expect(visit.page.locator("tbody").get_by_text(LONG)).to_be_visible()
        ask(visit.page, "sea" * 100)
        until_answered(visit.page)

        assert overflow_of(visit.page) <= 0


def test_a_dark_scheme_is_followed(browser: Browser, watched: ServerProcess) -> None:
    brightness = {}
    for is_dark in (False, True):
        with visited(browser, watched.http, is_dark=is_dark) as visit:
            for name in ("color", "backgroundColor"):
                value = visit.page.evaluate(f"getComputedStyle(document.body).{name}")
                brightness[name, is_dark] = sum(int(part) for part in re.findall(r"\d+", value)[:3])

    assert brightness["color", False] < brightness["backgroundColor", False]
    assert brightness["color", True] > brightness["backgroundColor", True]


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator("button:visible, input:visible, textarea:visible").all():
        expect(control).to_have_accessible_name(re.compile(r"\w"))
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "polite")


class TestConversations:
    def test_are_shown_as_a_tree_with_what_each_turn_read_and_why(self, browser: Browser) -> None:
        with started("perennial", sink=SINK, window=508) as server:
            first = responded(server, QUESTION)
            begun = {"previous_response_id": first["id"]}
            turns = [first, responded(server, "And the land?", **begun), responded(server, "And the sky?", **begun)]
            asked = {"role": "user", "content": QUESTION}
            changed = [asked, {"role": "assistant", "content": "Something else."}, asked]
            turns.append(responded(server, changed))

            with visited(browser, server.http) as visit:
                rows = visit.page.locator("#points tr")
                # Of each turn what was given and what was answered.
                expect(rows).to_have_count(2 * len(turns))
                shown = [row.locator("td").all_inner_texts() for row in rows.all()]
                depths = [
                    row.locator("th span").evaluate("span => parseFloat(span.style.marginLeft)") for row in rows.all()
                ]

        told = [usage_of_input(turn) for turn in turns]
        expected = [[str(one["reused"]), str(one["read"])] for one in told]
        assert sorted(row[2:4] for row in shown if row[2]) == sorted(expected)
        assert [row[4] for row in shown if row[4]] == ["differs at input.1"]
        assert told[-1]["broke_at"] == "input.1"
        # The first question was answered, and gone on from otherwise; so was its answer.
        assert sorted(depths) == [0, 1, 1, 1, 2, 2, 2, 2]


def responded(server: ServerProcess, input_: object, **more: Any) -> Any:
    body = {"model": SEEDLING, "input": input_, "max_output_tokens": 4, "temperature": 0, **more}
    response = httpx.post(f"{server.http}/v1/responses", json=body, timeout=MOST_S)
    assert response.status_code == 200, response.text
    return response.json()


def usage_of_input(response: Any) -> Any:
    return response["usage"]["input_tokens_details"]
