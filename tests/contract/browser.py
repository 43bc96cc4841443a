"""A real browser on the page, and what it met there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from playwright.sync_api import Browser, Page, expect, sync_playwright

# Its import keeps trio_asyncio's loops away from the browser's driver, which needs one of asyncio's own.
import api.bridge  # noqa: F401
from tests.contract.loops import MOST_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
_MOST_MS = 1000 * MOST_S

expect.set_options(timeout=_MOST_MS)


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Chromium as the system has it, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS, timeout=_MOST_MS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, what its console complained of, and the URLs that it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@contextmanager
def visited(
    browser: Browser, url: str, *, width: int = 1200, height: int = 900, is_dark: bool = False
) -> Iterator[Visit]:
    """The page at `url`, loaded in a fresh browser profile."""
    scheme: Literal["dark", "light"] = "dark" if is_dark else "light"
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        context.set_default_timeout(_MOST_MS)
        visit = Visit(context.new_page())
        context.on("request", lambda request: visit.urls.append(request.url))
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        visit.page.on(
            "console",
            lambda message: visit.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        visit.page.goto(url)
        yield visit
