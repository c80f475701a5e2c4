"""The page in a real browser: what is asked there is answered there, as the API answers it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
from models import TEMPLATE, write_model
from server import KEY, Address, serving

api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is not installed")
SHOTS = os.environ.get("OUTSIZE_SCREENSHOTS")  # a folder to look at afterwards
SIZES = {"wide": (1280, 860), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    mark = f"--outsize-test={uuid4().hex}"
    with api.sync_playwright() as playwright:
        where = found or playwright.chromium.executable_path
        if not Path(where).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        running = playwright.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu", mark])
        yield running
        running.close()
    left = processes_with(mark)
    for process in left:
        os.killpg(os.getpgid(process), signal.SIGKILL)  # playwright gives each browser a group of its own
    assert not left, "the browser did not end"


def processes_with(argument: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if argument.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), template=TEMPLATE)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with serving(model, tmp_path_factory.mktemp("server") / "log", key=None, context=512) as address:
        yield address


class Tab:
    """A page of the browser, and everything it complains about."""

    def __init__(self, browser, url: str, size: str = "wide", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.name = f"{size}-{scheme}"
        self.page.goto(url)
        self.until("facts !== null || document.getElementById('settings').open")

    def until(self, condition: str) -> None:
        """Wait for an expression to become true; playwright's own way needs an eval that the page's policy forbids."""
        deadline = time.monotonic() + 60
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def say(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def finish(self) -> str:
        """The last answer, once it is whole."""
        self.page.locator(".turn").last.locator(".note").wait_for()
        return self.page.locator(".turn .said").last.text_content()

    def settings(self, **values: object) -> None:
        self.page.get_by_text("Settings").click()
        for name, value in values.items():
            self.page.locator(f"#{name}").fill(str(value))
        self.page.get_by_text("Settings").click()

    def shot(self, what: str) -> None:
        if SHOTS:
            self.page.screenshot(path=f"{SHOTS}/{what}-{self.name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_an_answer_streams_in_as_the_api_gives_it(browser, server: Address, size: str, scheme: str) -> None:
    tab = Tab(browser, server.url, size, scheme)
    tab.shot("welcome")
    tab.settings(temperature=0, max_tokens=12)
    tab.say("w5 w6")
    first = tab.finish()
    messages = [{"role": "user", "content": "w5 w6"}]
    create = server.client.chat.completions.create
    right = create(model="tiny", messages=messages, temperature=0, max_tokens=12).choices[0].message.content
    assert first == right
    tab.say("w7")
    messages += [{"role": "assistant", "content": right}, {"role": "user", "content": "w7"}]
    assert (
        tab.finish() == create(model="tiny", messages=messages, temperature=0, max_tokens=12).choices[0].message.content
    )
    tab.shot("chat")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "something is wider than the screen"
    if size == "narrow":
        assert not tab.page.locator("#live").is_visible()
        tab.page.get_by_role("button", name="Live view").click()
    tab.until("facts.totals.finished >= 2")
    assert "of 1.17 GiB" in tab.page.locator("#budget").text_content()
    assert tab.page.locator("#units li").count() == len(server.stats()["units"])
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.shot("live")
    assert tab.complaints == []
    tab.context.close()


def test_stopping_keeps_what_was_said_and_frees_the_pages(browser, server: Address) -> None:
    tab = Tab(browser, server.url)
    tab.page.get_by_text("Settings").click()
    tab.page.locator("#temperature").fill("2")
    # Only a long answer can be stopped for certain, and the page has no setting for that.
    tab.page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=long(route.request.post_data)))
    tab.say("w9")
    tab.until("document.querySelectorAll('.said')[1]?.textContent.length > 20")
    tab.shot("streaming")
    assert (
        tab.page.get_by_role("button", name="Stop").is_visible() and tab.page.locator("#running").text_content() != "–"
    )
    tab.page.keyboard.press("Escape")
    tab.page.get_by_text("Stopped.").wait_for()
    assert len(tab.page.locator(".said").last.text_content()) > 20
    server.settle()
    tab.page.get_by_role("button", name="New chat").click()
    assert tab.page.locator(".turn").count() == 0
    assert tab.page.locator("#prompt").evaluate("e => e === document.activeElement")
    tab.context.close()


def long(body: str) -> str:
    return body[:-1] + ', "ignore_eos": true, "n": 40}'


def test_errors_are_said_and_markup_stays_text(browser, server: Address) -> None:
    tab = Tab(browser, server.url)
    tab.settings(max_tokens=100000)
    tab.say("<img src=x onerror=alert(1)>")
    tab.page.locator(".note.bad").wait_for()
    assert "more than the context of 512 tokens" in tab.page.locator(".note.bad").text_content()
    assert tab.page.locator("#talk img").count() == 0
    tab.shot("error")
    tab.context.close()


def test_the_keyboard_reaches_everything(browser, server: Address) -> None:
    tab = Tab(browser, server.url)
    reached = []
    for _ in range(12):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"fresh", "panel", "talk", "prompt", "send", "SUMMARY"} <= set(reached), reached
    names = tab.page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => !(e.labels?.length || e.textContent.trim()))"
        ".map(e => e.id)"
    )
    assert names == [], f"{names} have no name for who cannot see them"
    tab.context.close()


def test_a_key_is_asked_for_and_a_model_without_template_continues(browser, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with serving(model, tmp_path / "log") as here:
        tab = Tab(browser, here.url)
        assert tab.page.locator("#key").evaluate("e => e === document.activeElement")
        tab.shot("key")
        tab.page.locator("#key").fill(KEY)
        tab.page.keyboard.press("Tab")
        tab.until("facts !== null")
        tab.page.locator("#temperature").fill("0")
        tab.page.locator("#max_tokens").fill("8")
        tab.say("w5 w6")
        right = here.client.completions.create(model="tiny", prompt="w5 w6", temperature=0, max_tokens=8)
        assert tab.finish() == right.choices[0].text
        tab.shot("continuing")
        tab.context.close()
