"""A real browser, Debian's Chromium for instance, for tests of the status page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright
from programs import needs

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = needs(CHROMIUM, "no chromium: `apt-get install chromium` gives one")

PATIENCE_MS = 60_000

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def opened(url: str, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """The page at the address, and what the browser complains of: errors, violations."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.goto(url)
        yield page, complaints
        browser.close()
