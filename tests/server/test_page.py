"""The page at /, used in Chromium as people use it: typing, reading, stopping, on a phone, in the dark."""

from __future__ import annotations

import re

import pytest

from tests.tools.browser import browsing
from tests.tools.serving import HTML_PAGE, QUESTION, served

WAIT_MS = 60_000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The page of `server`, in a context of its own; errors in its console fail the test."""
    with_errors: list[str] = []
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: with_errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: with_errors.append(str(error)))
    page.goto(server.url + "/")
    page.locator("#model", has_text="kvq-books").wait_for()
    page.errors = with_errors
    yield page
    context.close()
    assert not [error for error in with_errors if "status of 4" not in error]  # refused requests are shown to the user


def settings(page, **values: str) -> None:
    """Fill in fields by their labels."""
    for label, value in values.items():
        page.get_by_label(label.replace("_", " ")).fill(value)


def answered(page) -> None:
    """Wait until no answer is at work."""
    page.locator("#stop:disabled").wait_for()


def test_a_conversation_says_what_the_api_says_and_shades_what_it_has_cached(page, client):
    settings(page, Temperature="0", Max_tokens="40", Bits_per_cached_value="3.5", System_message="You are a sailor.")
    page.get_by_label("Message", exact=True).fill(QUESTION[0]["content"])
    page.keyboard.press("Enter")
    answered(page)
    messages = [{"role": "system", "content": "You are a sailor."}, *QUESTION]
    done = client.chat.completions.create(
        model="kvq-books", messages=messages, max_tokens=40, temperature=0,
        extra_body={"kv_bits": 3.5, "kv_token_bits": True},
    )  # fmt: skip
    cache, said = done.kvq["cache"], done.choices[0].message.content
    answer = page.locator(".assistant .text")
    assert answer.text_content() == said
    shaded = [(span.text_content(), span.get_attribute("class")) for span in answer.locator(".t").all()]
    at, expected = 0, []
    for text, length, pair, windowed in cache["cells"]:
        if at >= cache["prompt_tokens"]:
            expected.append((text, f"t {pair}" + " w" * windowed))
        at += length
    assert shaded == expected
    assert f"{cache['tokens']} tokens in" in page.locator("#running").text_content()
    assert f"{cache['kv_bits']:.2f} bits per value" in page.locator("#running").text_content()
    rows = page.locator("#legend tr").all()
    assert sum(int(row.locator("td").nth(1).text_content()) for row in rows) == cache["tokens"]
    page.get_by_text("All that is cached").click()
    assert page.locator("#all").text_content() == "".join(text for text, *_ in cache["cells"])
    # The whole conversation goes with the next question.
    page.get_by_label("Message", exact=True).fill("Why?")
    page.get_by_role("button", name="Send").click()
    answered(page)
    assert said.strip() in page.locator("#all").text_content()
    assert page.locator(".assistant").count() == 2
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0


def test_stopping_keeps_what_was_said_and_frees_the_server(page, server):
    settings(page, Max_tokens="1400", Temperature="1.5")  # hot: nothing is drafted, and it takes its time
    said = page.locator(".assistant").last
    for _ in range(6):  # on a busy machine an answer may be over before the key comes through
        page.get_by_label("Message", exact=True).fill("Tell me everything.")
        page.keyboard.press("Enter")
        said.locator(".t").nth(3).wait_for()
        page.keyboard.press("Escape")
        answered(page)
        if "Stopped." in said.locator(".note").text_content():
            break
    assert "Stopped." in said.locator(".note").text_content()
    assert said.locator(".text").text_content()
    server.until(active=0)
    assert not page.errors


def test_an_error_is_shown_and_the_message_is_not_lost(page):
    settings(page, Bits_per_cached_value="1.01")
    page.get_by_label("Message", exact=True).fill("Hello <b>there</b>")
    page.keyboard.press("Enter")
    answered(page)
    alert = page.get_by_role("alert").text_content()
    assert "kv_bits" in alert
    assert page.get_by_label("Message", exact=True).input_value() == "Hello <b>there</b>"
    assert page.locator("article").count() == 0
    settings(page, Bits_per_cached_value="")
    settings(page, Max_tokens="3")
    page.get_by_role("button", name="Send").click()
    answered(page)
    assert page.get_by_role("alert").count() == 0
    assert page.locator(".user .text").text_content() == "Hello <b>there</b>"  # markup is text


def test_on_a_phone_nothing_is_wider_than_the_screen(page):
    page.set_viewport_size({"width": 360, "height": 720})
    page.reload()
    assert not page.get_by_label("Temperature").is_visible()  # settings fold away
    page.get_by_text("Settings and cache").click()
    settings(page, Max_tokens="30")
    page.get_by_label("Message", exact=True).fill("x" * 300)
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_it_follows_the_system_s_colours(page):
    def ground() -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    light = ground()
    page.emulate_media(color_scheme="dark")
    assert ground() < 100 < 600 < light


def test_every_control_has_a_name_and_can_be_reached_with_the_keyboard(page):
    controls = page.locator("input:visible, textarea:visible, button:visible").all()
    assert len(controls) >= 8
    assert all(page.evaluate("e => e.labels?.length || e.textContent", each.element_handle()) for each in controls)
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"message", "send", "fresh", "system", "temperature", "most", "bits", "shading"} <= seen


def test_the_page_loads_nothing_and_runs_only_its_own_script(page, server):
    answer = server.get("/", headers=HTML_PAGE)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in re.sub(r"<!--.*?-->", "", answer.text).lower()
    refused = """() => new Promise(done => {
      document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
      document.body.append(Object.assign(document.createElement("img"), {src: "/health"}));
    })"""
    assert page.evaluate(refused) == "img-src"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>hello</b>'")
    page.errors.clear()  # the policy's own complaint
    assert server.get("/").text == "kvq is running"


def test_a_server_with_a_key_shows_the_page_and_asks_for_it(browser):
    with served("--api-key", "open-sesame") as server:
        assert server.get("/v1/models").status_code == 401
        page = browser.new_page()
        page.goto(server.url + "/")
        page.get_by_role("alert").wait_for()
        page.get_by_label("API key").fill("open-sesame")
        page.keyboard.press("Tab")
        page.locator("#model", has_text="kvq-books").wait_for()
        page.close()
