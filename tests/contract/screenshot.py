"""Makes a picture of the page over sessions at work: `python -m tests.contract.screenshot docs/page.png`."""

from __future__ import annotations

import sys

from playwright.sync_api import expect

from api.client_sync import SyncSession, connect_sync
from tests.contract.browser import opened_browser, visited
from tests.contract.servers import started

# Each session with the tokens that it begins with. They take turns in rotation: what else runs on the machine, and when,
# then slows long histories and short ones alike.
SESSIONS = {"night shift": 24, "code review": 2000, "research agent": 4000}
# Turns of 24 tokens appended and 12 generated, before the page is opened and while it is watched.
TURNS, WATCHED_TURNS = 48, 8


def take_turn(session: SyncSession, number: int) -> None:
    session.append([3 + (7 * number + place) % 2000 for place in range(24)])
    with session.generate(12) as events:
        list(events)


def main(path: str) -> None:
    with (
        started("perennial", window=508) as server,
        connect_sync(server.grpc) as client,
        opened_browser() as browser,
    ):
        sessions = [client.create_session(label=label) for label in SESSIONS]
        for session, length in zip(sessions, SESSIONS.values(), strict=True):
            session.append([3 + place % 2000 for place in range(length)])
        for number in range(TURNS):
            for session in sessions:
                take_turn(session, number)
        with visited(browser, server.http) as visit:
            page = visit.page
            expect(page.locator("#state")).to_have_text("serving")
            page.get_by_label("Message").fill("Hello! My name is Anna.")
            page.get_by_label("Message").press("Enter")
            expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
            for number in range(WATCHED_TURNS):
                for session in sessions:
                    take_turn(session, number)
            turns = len(sessions) * (TURNS + WATCHED_TURNS) + 1
            expect(page.locator("#plot circle")).to_have_count(turns)
            page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    main(sys.argv[1])
