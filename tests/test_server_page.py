"""The server's page, in a headless Chromium against a server process.

`PAGE_SCREENSHOT=docs/page.png python -m pytest tests/test_server_page.py -k screenshot` takes the
README's picture.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import SOAK
from servers import PATIENCE, RunningServer

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium or chromedriver is not installed", allow_module_level=True)

STORY = "Tell me a story about a fox."
LIGHT, DARK = "rgb(252, 252, 251)", "rgb(21, 23, 26)"


class Page:
    """The browser with the page open, and what a reader would do there."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        # What the browser has asked for since it was last read.
        self.log: list[dict[str, Any]] = []
        # The requests whose answers are complete.
        self.answered: set[str] = set()

    def open(self, width: int = 1280, height: int = 860, scheme: str = "light") -> None:
        self.resize(width, height)
        self.prefer(scheme)
        site = {"origin": self.url.rstrip("/"), "storageTypes": "local_storage"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", site)
        self.driver.get_log("performance")
        self.log = []
        self.driver.get(self.url)
        self.wait(lambda: self.all("#model option"))

    def resize(self, width: int, height: int) -> None:
        # Chromium's windows are never narrower than 500 pixels; the page's view can be.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def wait(self, condition: Callable[[], Any], message: str = "") -> Any:
        waiting = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05)
        return waiting.until(lambda _: condition(), message)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script(
            "return document.querySelector(arguments[0]).textContent", selector
        )

    def choose(self, picker: str, value: str) -> None:
        Select(self.one(f"#{picker}")).select_by_value(value)

    def fill(self, field: str, value: str) -> None:
        self.one(f"#{field}").clear()
        self.one(f"#{field}").send_keys(value)

    def type(self, *keys: str) -> None:
        self.one("#prompt").send_keys(*keys)

    def start(self, text: str) -> None:
        """Sends and returns once it runs or has failed."""
        before = self.text("#status")
        self.driver.execute_script("document.getElementById('status').textContent = ''")
        self.type(text, Keys.ENTER)
        self.wait(lambda: self.text("#status"), f"nothing started after {before!r}")

    def finish(self) -> None:
        self.wait(lambda: not self.one("#stop").is_displayed(), "still running")

    def send(self, text: str) -> None:
        self.start(text)
        self.finish()

    def tokens(self, inside: str = ".turn:last-child") -> list[dict[str, Any]]:
        """What is painted, as the reader has it."""
        return self.driver.execute_script(
            """return [...document.querySelectorAll(arguments[0] + " .token")].map(span => ({
                text: span.textContent,
                stage: "stage" in span.dataset ? Number(span.dataset.stage) : null,
                drafted: span.classList.contains("drafted"),
            }))""",
            inside,
        )

    def figure(self, name: str, inside: str = ".turn:last-child") -> str:
        return self.text(f'{inside} [data-figure="{name}"]')

    def requests(self) -> list[dict[str, Any]]:
        """All requests that the browser has sent since the page was opened."""
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self.log.append(event["params"])
            elif event["method"] == "Network.loadingFinished":
                self.answered.add(event["params"]["requestId"])
        return self.log

    def exchange(self, path: str = "/v1/") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The last completion: what the page has asked for, and the events that it was sent."""
        asked = [r for r in self.requests() if r["request"]["method"] == "POST"][-1]
        assert path in asked["request"]["url"]
        # The page may have read the answer's last part before the browser files it.
        self.wait(lambda: self.requests() and asked["requestId"] in self.answered)
        answer = self.driver.execute_cdp_cmd(
            "Network.getResponseBody", {"requestId": asked["requestId"]}
        )
        lines = answer["body"].splitlines()
        events = [line[6:] for line in lines if line.startswith("data: ") and "[DONE]" not in line]
        return json.loads(asked["request"]["postData"]), [json.loads(event) for event in events]

    def card(self) -> str:
        self.wait(lambda: self.one("#card").is_displayed(), "no card")
        return self.one("#card").text


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Chrome, server: RunningServer) -> Page:
    page = Page(driver, f"{server.url}/")
    page.open()
    return page


def entries(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    choices = [choice for event in events for choice in event["choices"]]
    return [entry for choice in choices for entry in choice.get("token_stages") or []]


def content(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(
        choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        for choice in choices
    )


def painted(answer: list[dict[str, Any]], text: str) -> list[tuple[str, int, bool]]:
    """How an answer should look: a span for each token that ends in whole characters."""
    spans, pending = [], b""
    for entry in answer:
        pending += bytes(entry["bytes"])
        try:
            piece = pending.decode()
        except UnicodeDecodeError:
            continue
        pending = b""
        # A token that only ends the reply is no text.
        piece = piece if text.startswith(piece) else ""
        text = text[len(piece) :]
        spans.append((piece, entry["stage"], entry["from_draft"]))
    assert not text
    return spans


def test_each_token_is_painted_by_the_stage_that_emitted_it(page: Page) -> None:
    page.choose("chat-mode", "speculative")
    page.send(STORY)
    asked, events = page.exchange("/v1/chat/completions")
    assert (asked["mode"], asked["messages"]) == (
        "speculative",
        [{"role": "user", "content": STORY}],
    )
    text, tokens = content(events), page.tokens()
    assert "".join(token["text"] for token in tokens) == text != ""
    shown = [(token["text"], token["stage"], token["drafted"]) for token in tokens]
    assert shown == painted(entries(events), text)

    usage = events[-1]["usage"]
    details, poe = usage["completion_tokens_details"], usage["poe"]
    accepted = details["accepted_prediction_tokens"]
    drafted = accepted + details["rejected_prediction_tokens"]
    stages = len(page.all("#legend .sample")) - 1
    assert page.figure("depth") == f"{poe['mean_depth']:.2f} of {stages}"
    # Where drafting does not pay, on a busy machine say, the mode is given up.
    assert page.figure("accepted") == (f"{accepted} of {drafted}" if drafted else "\N{EN DASH}")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert page.figure("cached") == f"{cached} of {usage['prompt_tokens']}"
    assert page.figure("count") == str(usage["completion_tokens"])
    assert float(page.figure("rate")) > 0
    assert re.fullmatch(r"[\d.]+ m?s", page.figure("first"))


@SOAK
def test_stages_differ_by_color_and_by_more_than_color(page: Page) -> None:
    looks = page.driver.execute_script(
        """return [...document.querySelectorAll("#legend .sample")].map(sample => {
            const style = getComputedStyle(sample);
            return [style.backgroundImage, style.backgroundSize];
        })"""
    )
    *stages, drafted = looks
    assert len({image for image, _ in stages}) == len({size for _, size in stages}) == len(stages)
    assert "repeating" in drafted[0] and drafted[1] == stages[0][1]


def test_a_conversation_keeps_its_turns_and_changes_modes(page: Page) -> None:
    page.choose("chat-mode", "full")
    page.one("#system").send_keys("Be brief.")
    page.send("What is the capital of Italy?")
    first = content(page.exchange()[1])
    page.choose("chat-mode", "stage")
    page.choose("chat-stage", "1")
    page.send("And of Kenya?")
    asked = page.exchange()[0]
    assert [message["content"] for message in asked["messages"]] == [
        *("Be brief.", "What is the capital of Italy?", first, "And of Kenya?")
    ]
    assert (asked["mode"], asked["stage"], asked["temperature"]) == ("stage", 1, 0)
    assert {token["stage"] for token in page.tokens()} == {1}

    # Retrying answers the same turn in the mode of now.
    page.choose("chat-mode", "full")
    page.one(".turn:last-child .last-only button").click()
    page.finish()
    assert page.exchange()[0]["messages"] == asked["messages"]
    assert len(page.all(".turn")) == 2
    assert page.figure("depth").split(" of ")[0] == f"{int(page.figure('depth')[-1]):.2f}"

    page.one("#clear").click()
    assert not page.all(".turn")
    page.one(".cleared button").click()
    assert len(page.all(".turn")) == 2


def test_a_base_model_continues_a_text(page: Page) -> None:
    base = next(o for o in page.all("#model option") if o.get_attribute("value") == "poe-tiny")
    base.click()
    assert "base model" in page.one("#base-note").text
    assert not page.one("#system").is_displayed()
    page.choose("chat-mode", "wand")
    page.send("Once upon a time")
    asked, events = page.exchange("/v1/completions")
    assert (asked["prompt"], asked["mode"]) == ("Once upon a time", "wand")
    shown = [(token["text"], token["stage"], token["drafted"]) for token in page.tokens()]
    assert shown == painted(entries(events), content(events))
    assert page.text(".turn .text") == "Once upon a time" + content(events)
    ActionChains(page.driver).move_to_element(page.all(".token")[1]).perform()
    assert "log-probability" in page.card()


def test_a_token_shows_its_alternatives_to_pointer_and_keyboard(page: Page) -> None:
    page.send("What is the capital of Italy?")
    events = page.exchange()[1]
    logprobs = [
        entry
        for event in events
        for choice in event["choices"]
        for entry in (choice.get("logprobs") or {}).get("content") or []
    ]
    stages = entries(events)

    def expect(card: str, at: int) -> None:
        entry = logprobs[at]
        assert "log-probability " + f"{entry['logprob']:.4f}".replace("-", "\N{MINUS SIGN}") in card
        assert f"stage {stages[at]['stage']} (0 to" in card
        assert ("drafted" in card) == stages[at]["from_draft"]
        rows = [row.text.split() for row in page.all("#card tr")]
        signs = {" ": "␣", "\n": "↵"}
        for other in entry["top_logprobs"]:
            sign = "".join(signs.get(c, c) for c in other["token"])
            assert any(row[0] == sign and row[-1] == "%" for row in rows), (sign, rows)
        assert len(page.all("#card .chosen")) == 1

    tokens = page.all(".token")
    ActionChains(page.driver).move_to_element(tokens[3]).perform()
    expect(page.card(), 3)
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert not page.one("#card").is_displayed()

    # The reply is one tab stop; arrow keys go on from there.
    assert len(page.all('.token[tabindex="0"]')) == 1
    page.driver.execute_script("document.getElementById('system').focus()")
    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert page.driver.switch_to.active_element == tokens[0]
    expect(page.card(), 0)
    ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert page.driver.switch_to.active_element == tokens[2]
    assert tokens[2].get_attribute("aria-describedby") == "card"
    expect(page.card(), 2)
    ActionChains(page.driver).send_keys(Keys.HOME).perform()
    assert page.driver.switch_to.active_element == tokens[0]
    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    assert not page.one("#card").is_displayed()


@pytest.mark.parametrize("order", ["together", pytest.param("alone", marks=SOAK)])
def test_a_race_has_two_replies_and_a_verdict(page: Page, order: str) -> None:
    page.one("#view-race").click()
    page.choose("order", order)
    page.choose("left-mode", "full")
    page.choose("right-mode", "speculative")
    page.fill("max-tokens", "40")
    page.send(STORY)
    lanes = [page.tokens("#lane-left"), page.tokens("#lane-right")]
    texts = ["".join(token["text"] for token in lane) for lane in lanes]
    assert texts[0] == texts[1] != ""
    assert not any(token["drafted"] for token in lanes[0])
    assert any(token["drafted"] for token in lanes[1])
    verdict = page.text("#verdict")
    assert verdict.endswith("; same text.")
    assert re.match(
        "Both finished together|(full|speculative) (finished first:|was faster:|had the same)",
        verdict,
    )
    assert all(float(page.figure("rate", lane)) > 0 for lane in ("#lane-left", "#lane-right"))
    # The prompt stays where it was typed, for the next race.
    assert page.one("#prompt").get_attribute("value") == STORY


@SOAK
def test_a_race_says_where_texts_part(page: Page) -> None:
    page.one("#view-race").click()
    page.choose("left-mode", "full")
    page.choose("right-mode", "prefix")
    page.choose("right-max_stages", "1")
    page.fill("max-tokens", "40")
    page.send(STORY)
    match = re.search(r"texts differ from token (\d+) on", page.text("#verdict"))
    assert match
    at = int(match[1]) - 1
    sides = ("#lane-left", "#lane-right")
    left, right = ([token["text"] for token in page.tokens(side)] for side in sides)
    assert left[:at] == right[:at] and left[at] != right[at]
    assert [page.text(f"{side} .differs") for side in sides] == [left[at], right[at]]


@SOAK
def test_escape_stops_a_reply_and_what_is_there_stays(page: Page) -> None:
    page.choose("model", "poe-tiny")
    # What the model makes of this goes on for thousands of tokens.
    page.fill("max-tokens", "3000")
    page.start("Count from one to ten:")
    page.wait(lambda: len(page.tokens()) > 5)
    # While it runs, the next prompt can be written, and Enter does not lose it.
    page.type("And then", Keys.ENTER)
    page.type(Keys.ESCAPE)
    page.finish()
    assert page.text(".turn .notes") == "Stopped."
    assert len(page.tokens()) > 5
    assert page.one("#prompt").get_attribute("value") == "And then"
    assert len(page.all(".turn")) == 1
    assert page.text("#status").startswith("Stopped: ")
    # The server goes on serving.
    page.fill("max-tokens", "5")
    page.type(Keys.ENTER)
    page.wait(lambda: len(page.all(".turn")) == 2 and page.all(".turn:last-child .actions"))
    assert page.text(".turn:last-child .notes") == "Stopped at the token limit."


@SOAK
def test_the_keyboard_alone_is_enough(page: Page) -> None:
    assert page.driver.switch_to.active_element == page.one("#prompt")
    page.type("What is", Keys.SHIFT, Keys.ENTER, Keys.NULL, "the capital of Italy?")
    assert page.one("#prompt").get_attribute("value") == "What is\nthe capital of Italy?"
    assert not page.all(".turn")
    page.type(Keys.ENTER)
    page.wait(lambda: page.all(".turn .actions"))
    # Every control takes the focus, and shows it.
    seen = []
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        found = page.driver.execute_script(
            """const e = document.activeElement, s = getComputedStyle(e);
            return e === document.body ? null :
                [e.id || e.textContent, s.outlineStyle !== "none" && s.outlineWidth !== "0px"]"""
        )
        if found is None:
            continue  # The turn from the page's end to its beginning.
        if found in seen:
            break
        seen.append(found)
    names = [name for name, _ in seen]
    for name in ("view-race", "theme", "model", "chat-mode", "temperature", "max-tokens", "system"):
        assert name in names
    assert {"Copy", "Retry", "clear", "send"} <= set(names)
    assert all(visible for _, visible in seen), seen


def test_a_refused_request_keeps_the_typed_text(page: Page) -> None:
    page.fill("temperature", "-1")
    page.send("What is the capital of Italy?")
    assert "temperature" in page.text(".turn .error")
    assert "What is the capital of Italy?" in page.text(".turn")
    buttons = page.all(".turn .error button")
    assert [button.text for button in buttons] == ["Try again", "Edit"]
    buttons[1].click()
    assert page.one("#prompt").get_attribute("value") == "What is the capital of Italy?"
    assert not page.all(".turn")
    page.fill("temperature", "0")
    page.type(Keys.ENTER)
    page.wait(lambda: page.all(".turn .actions"))
    # What was refused is not part of the conversation.
    assert len(page.exchange()[0]["messages"]) == 1


@SOAK
def test_a_server_that_is_gone_is_named_and_can_be_tried_again(page: Page) -> None:
    def offline(gone: bool) -> None:
        page.driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": gone, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
        )

    page.driver.execute_cdp_cmd("Network.enable", {})
    offline(True)
    try:
        page.send("What is the capital of Italy?")
        assert "could not be reached" in page.text(".turn .error")
    finally:
        offline(False)
    page.one(".turn .error button").click()
    page.wait(lambda: page.all(".turn > div > .actions"))
    assert not page.all(".error") and len(page.tokens()) > 3


def answer_once(page: Page, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    """The page's next request gets this answer instead of the server's."""
    page.driver.execute_script(
        """const [body, status, headers] = arguments, real = window.fetch;
        window.fetch = async () => {
            window.fetch = real;
            return new Response(body, {status, headers});
        }""",
        *(body, status, headers or {}),
    )


def test_a_busy_server_is_asked_again_when_it_says(page: Page) -> None:
    refusal = json.dumps({"error": {"message": "the queue is full", "type": "", "code": None}})
    # The second passes when the test says so.
    page.driver.execute_script("window.setTimeout = (call) => { window.passes = call; }")
    answer_once(page, 429, refusal, {"Retry-After": "1"})
    page.send("What is the capital of Italy?")
    assert page.text(".error p") == "The server is busy: the queue is full. Try again in 1 s."
    again = page.one(".error button")
    assert again.text == "Try again in 1 s" and not again.is_enabled()
    page.driver.execute_script("window.passes()")
    assert again.text == "Try again" and again.is_enabled()
    again.click()
    page.wait(lambda: page.all(".turn > div > .actions"))
    assert not page.all(".error")


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ('data: {"error": {"message": "out of memory"}}\n\n', "The server failed: out of memory."),
        ("", "The connection ended before the reply was complete."),
    ],
)
def test_a_reply_that_breaks_off_stays_with_the_reason(page: Page, last: str, said: str) -> None:
    entry = {"id": 7, "stage": 0, "from_draft": False, "forced": False, "bytes": list(b"Rome")}
    choice = {"index": 0, "delta": {"content": "Rome"}, "token_stages": [entry]}
    choice["logprobs"] = {"content": [{"token": "Rome", "logprob": -0.5, "bytes": None}]}
    chunk = json.dumps({"choices": [choice]})
    answer_once(page, 200, f": reading\n\ndata: {chunk}\n\n{last}")
    page.send("What is the capital of Italy?")
    assert page.text(".turn .text") == "Rome"
    assert page.text(".turn .error p") == said


@pytest.mark.parametrize(
    ("drafter", "said"),
    [
        pytest.param("stages", "drafted", marks=SOAK),
        ("rounded", "drafted by its quantized copy"),
        pytest.param("lookup", "looked up", marks=SOAK),
    ],
)
def test_a_token_says_what_drafted_it(page: Page, drafter: str, said: str) -> None:
    entry = {"id": 7, "stage": 0, "from_draft": True, "drafter": drafter, "bytes": list(b"Rome")}
    choice = {"index": 0, "delta": {"content": "Rome"}, "token_stages": [entry]}
    choice |= {"logprobs": {"content": [{"token": "Rome", "logprob": 0}]}, "finish_reason": "stop"}
    answer_once(page, 200, f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")
    page.choose("chat-mode", "speculative")
    page.choose("chat-draft_lookup", "true")
    page.send("What is the capital of Italy?")
    ActionChains(page.driver).move_to_element(page.one(".token")).perform()
    how = page.card().splitlines()[1]
    assert said in how and ("drafted" in how) == (drafter != "lookup")


@SOAK
def test_lookup_is_asked_for_when_chosen(page: Page) -> None:
    for value, expected in [("", None), ("true", True)]:
        page.choose("chat-mode", "speculative")
        page.choose("chat-draft_lookup", value)
        page.send("What is the capital of Italy?")
        assert page.exchange()[0].get("draft_lookup") is expected


def test_markup_from_a_model_is_text(page: Page) -> None:
    text = "<img src=x onerror=alert(1)> & <b>"
    entry = {"id": 7, "stage": 0, "bytes": list(text.encode())}
    choice = {"index": 0, "delta": {"content": text}, "token_stages": [entry]}
    choice |= {"logprobs": {"content": [{"token": text, "logprob": 0}]}, "finish_reason": "length"}
    answer_once(page, 200, f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")
    page.send("Say it.")
    assert page.text(".turn .text") == text
    assert not page.all(".turn img")


@SOAK
def test_a_server_with_a_key_is_asked_for_it_once(driver: Chrome) -> None:
    server = RunningServer("--api-key", "sesame")
    try:
        page = Page(driver, f"{server.url}/")
        page.driver.get(page.url)
        page.wait(lambda: page.one("#key").is_displayed())
        page.one("#key").send_keys("guess", Keys.ENTER)
        page.wait(lambda: "did not accept" in page.one("#key-hint").text)
        page.one("#key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.all("#model option"))
        assert not page.one("#key").is_displayed()
        # A key that no longer holds: the message waits for the next one.
        page.driver.execute_script("sessionStorage.setItem('mlx-poe-key', 'old')")
        page.send("What is the capital of Italy?")
        assert page.text(".error p") == "The server did not accept the key."
        page.one("#key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.all(".turn > div > .actions"))
        assert "Rome" in page.text(".turn .text")
        page.driver.refresh()
        page.wait(lambda: page.all("#model option"))
    finally:
        server.stop()


@SOAK
def test_light_and_dark_follow_the_system_and_the_button(page: Page) -> None:
    def paper() -> str:
        return page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert paper() == LIGHT
    page.prefer("dark")
    assert paper() == DARK
    page.wait(lambda: page.one("#theme").text == "Light")
    page.one("#theme").click()
    assert paper() == LIGHT and page.one("#theme").text == "Dark"
    page.driver.refresh()
    page.wait(lambda: page.all("#model option"))
    assert paper() == LIGHT


@SOAK
def test_a_phone_scrolls_in_one_direction_only(page: Page) -> None:
    page.open(360, 740)

    def fits() -> bool:
        return page.driver.execute_script(
            """const width = document.documentElement.clientWidth;
            return [document.documentElement, document.getElementById("scroll")]
                .every(box => box.scrollWidth <= box.clientWidth) &&
                [...document.querySelectorAll("button, select, input, textarea, .token")]
                .filter(e => e.checkVisibility())
                .every(e => e.getBoundingClientRect().right <= width)"""
        )

    assert fits()
    assert not page.one("#model").is_displayed()
    page.one("#settings-toggle").click()
    assert page.one("#model").is_displayed() and fits()
    page.fill("max-tokens", "60")
    page.one("#settings-toggle").click()
    page.send(STORY)
    assert fits()
    page.all(".token")[4].click()
    card = page.one("#card").rect
    assert card["x"] >= 0 and card["x"] + card["width"] <= 360
    page.one("#view-race").click()
    page.send(STORY)
    assert fits()


def test_nothing_comes_from_elsewhere_and_nothing_is_blocked(page: Page) -> None:
    page.driver.get_log("browser")
    page.send("What is the capital of Italy?")
    page.one("#view-race").click()
    page.send("What is the capital of Italy?")
    urls = [request["request"]["url"] for request in page.requests()]
    assert any(url.endswith("/page.js") for url in urls)
    mine = urlsplit(page.url).netloc
    assert {urlsplit(url).netloc for url in urls if not url.startswith("data:")} == {mine}
    # A violation of the content security policy, or an error of a script, would stand here.
    assert page.driver.get_log("browser") == []


@pytest.mark.skipif("PAGE_SCREENSHOT" not in os.environ, reason="PAGE_SCREENSHOT is not set")
def test_takes_the_screenshot(page: Page) -> None:
    page.resize(1080, 860)
    page.choose("model", "poe-tiny")
    page.one("#view-race").click()
    page.choose("order", "alone")
    page.fill("max-tokens", "72")
    page.send("Once upon a time")
    # The token that the model was least sure of, among those with room for the card.
    choices = [choice for event in page.exchange()[1] for choice in event["choices"]]
    logprobs = [value for c in choices for value in (c["logprobs"] or {}).get("token_logprobs", [])]
    token = page.all("#lane-right .token")[logprobs.index(min(logprobs[:24]))]
    ActionChains(page.driver).move_to_element(token).perform()
    page.card()
    picture = Path(os.environ["PAGE_SCREENSHOT"])
    page.driver.save_screenshot(str(picture))
    assert picture.stat().st_size < 300_000
