"""The playground in real headless Chromium, in front of a real model. Pictures for people: .artifacts/screenshots."""

import subprocess
import sys
from typing import Any

import pytest

from tests.browser.conftest import Urls, Visit, Visitor

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
expect = playwright.expect
# Milliseconds that an answer may take on a busy machine.
PATIENCE = 60_000
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
DONE = ".turn:not(.running)"
# Records, from inside the page, every length that the answer's text has while it is being generated.
RECORD = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const answer = document.querySelector(".running .answer");
    if (answer && answer.textContent.length) window.lengths.push(answer.textContent.length);
  }).observe(document.querySelector(".log"), {childList: true, subtree: true, characterData: true});
}"""


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Control+Enter")


def answered(page: Any, count: int = 1) -> None:
    """Wait until so many turns are over, and none is running."""
    expect(page.locator(DONE)).to_have_count(count, timeout=PATIENCE)
    expect(page.locator(".running")).to_have_count(0, timeout=PATIENCE)


def set_max_tokens(page: Any, count: int) -> None:
    page.fill("#setting-max_tokens", str(count))


def test_an_answer_comes_token_by_token_and_says_what_it_cost(visit: Visit) -> None:
    page = visit.page
    visit.screenshot("desktop-light-empty")
    page.evaluate(RECORD)
    set_max_tokens(page, 40)
    ask(page, "Tell me a long story about a lighthouse.")
    page.wait_for_selector(".running .token:nth-of-type(8)", timeout=PATIENCE)
    visit.screenshot("desktop-light-streaming")
    answered(page)
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 10
    assert lengths == sorted(lengths)
    meta = page.inner_text(".meta")
    for words in ("prompt tokens", "40 tokens", "tokens/s", "cut off at max tokens"):
        assert words in meta
    visit.screenshot("desktop-light-answer")


def test_an_answer_can_be_stopped(visit: Visit) -> None:
    page = visit.page
    set_max_tokens(page, 1000)
    ask(page, "Tell me a long story about a lighthouse.")
    page.wait_for_selector(".running .token", timeout=PATIENCE)
    assert page.inner_text("#send") == "Stop"
    page.keyboard.press("Escape")
    answered(page)
    assert page.inner_text(".meta").startswith("stopped")
    assert page.inner_text("#send") == "Send"
    kept = page.inner_text(".answer")
    # The conversation goes on from what was said.
    set_max_tokens(page, 4)
    ask(page, "Go on.")
    answered(page, 2)
    assert page.locator(".answer").first.inner_text() == kept
    roles = [message["role"] for message in visit.bodies()[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_settings_start_at_the_models_own_and_only_changes_are_sent(visit: Visit) -> None:
    page = visit.page
    assert page.input_value("#setting-temperature") == "0.7"
    rows = {name: page.locator(f".row:has(#setting-{name})") for name in ("temperature", "top_p", "min_p")}
    assert rows["temperature"].get_by_text("≠ greedy").is_visible()
    assert rows["top_p"].get_by_text("≠ greedy").is_visible()
    assert not rows["min_p"].get_by_text("≠ greedy").is_visible()
    assert "Sampling, temperature 0.7" in page.inner_text(".pane-strategy")

    page.fill("#setting-temperature", "0")
    assert rows["temperature"].get_by_role("button").is_visible()
    assert rows["top_p"].get_by_text("no effect at temperature 0").is_visible()
    assert page.inner_text(".pane-strategy").startswith("1 changed · Greedy")
    page.fill("#setting-stop", "\\n\nEND")
    page.fill("#setting-seed", "7")
    set_max_tokens(page, 4)
    visit.screenshot("desktop-light-settings")
    ask(page, "Hello")
    answered(page)
    sent = visit.bodies()[0]
    assert (sent["temperature"], sent["stop"], sent["seed"], sent["max_tokens"]) == (0, ["\n", "END"], 7, 4)
    assert "top_p" not in sent

    rows["temperature"].get_by_role("button").click()
    assert page.input_value("#setting-temperature") == "0.7"
    page.click("#reset")
    assert page.locator(".row.changed").count() == 0
    page.fill("#setting-max_tokens", "3")
    page.click("text=Run again")
    answered(page)
    assert set(visit.bodies()[1]) - set(sent) == set()
    assert {"temperature", "stop", "seed"} & set(visit.bodies()[1]) == set()


def test_two_versions_and_settings_side_by_side(visit: Visit) -> None:
    page = visit.page
    set_max_tokens(page, 24)
    ask(page, "Name a colour.")
    answered(page)
    page.click("#compare")
    assert page.locator(".pane").count() == 2
    assert page.locator(".pane").nth(1).get_by_text("Name a colour.").is_visible(), "both know what was said"
    page.locator("select.model").nth(1).select_option("smollm2@2")
    expect(page.locator("#setting-temperature")).to_have_value("0")
    assert "Greedy" in page.inner_text(".pane-strategy >> nth=1")
    page.fill("#setting-repetition_penalty", "1.3")
    ask(page, "And another one?")
    for pane in page.locator(".pane").all():
        pane.locator(".running .token").nth(2).wait_for(timeout=PATIENCE)
    visit.screenshot("desktop-light-versions")
    answered(page, 4)
    _, one, other = visit.bodies()
    assert (one["model"], other["model"]) == ("smollm2", "smollm2@2")
    assert "repetition_penalty" not in one
    assert other["repetition_penalty"] == 1.3
    assert other["max_tokens"] == 24
    page.click("#compare")
    assert page.locator(".pane").count() == 1


def test_a_token_tells_what_else_was_likely(visit: Visit) -> None:
    page = visit.page
    set_max_tokens(page, 12)
    ask(page, "Count to ten.")
    answered(page)
    token = page.locator(".token").nth(3)
    token.hover()
    popover = page.locator("#token")
    popover.wait_for()
    assert popover.locator("li").count() == 5
    shares = [float(text.rstrip("%").lstrip("< ")) for text in popover.locator("li span").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert "log-probability" in popover.inner_text()
    visit.screenshot("desktop-light-token")

    page.mouse.move(5, 5)
    popover.wait_for(state="hidden")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 2
    assert popover.is_visible()
    page.keyboard.press("Escape")
    assert popover.is_hidden()
    assert page.evaluate("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1

    page.uncheck("#probabilities")
    ask(page, "Again.")
    answered(page, 2)
    assert "logprobs" not in visit.bodies()[1]
    assert page.locator(".turn").nth(1).locator(".token").count() == 0


def test_settings_without_token_probabilities_are_answered_all_the_same(visit: Visit) -> None:
    """The endpoint refuses log-probabilities beside settings that only `generate()` can honour."""
    page = visit.page
    page.click('label:has(input[value="complete"])')
    page.fill("#setting-num_beams", "2")
    set_max_tokens(page, 6)
    ask(page, "The capital of France is")
    answered(page)
    assert "logprobs" not in visit.bodies()[0]
    assert page.inner_text(".answer")
    page.route("**/v1/completions", refuse_logprobs)
    page.fill("#setting-num_beams", "1")
    ask(page, "The capital of France is")
    answered(page, 2)
    assert "no token probabilities" in page.locator(".meta").nth(1).inner_text()
    visit.problems.clear()  # the browser logs each refused request


def refuse_logprobs(route: Any) -> None:
    """As the endpoint does where a model's own settings are such."""
    if "logprobs" not in route.request.post_data_json:
        route.continue_()
        return
    error = {"message": "not with `typical_p`=0.9", "type": "invalid_request_error", "param": "logprobs", "code": None}
    route.fulfill(status=400, json={"error": error})


def test_the_request_as_code_runs_and_says_the_same(visit: Visit) -> None:
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click('label:has(input[value="complete"])')
    page.fill("#setting-temperature", "0")
    page.fill("#setting-top_k", "5")
    set_max_tokens(page, 8)
    prompt = 'It\'s "odd": $HOME `x`\n\\n é'
    ask(page, prompt)
    answered(page)
    said = page.evaluate("document.querySelector('.answer').textContent")
    page.click("#show-code")
    page.click("#copy")
    curl = page.evaluate("navigator.clipboard.readText()")
    visit.screenshot("desktop-light-code")
    page.click('label:has(input[value="python"])')
    page.click("#copy")
    python = page.evaluate("navigator.clipboard.readText()")

    for code in (curl, python):
        assert "127.0.0.1" in code
    ran = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
    end = page.locator(".token.end").inner_text() if page.locator(".token.end").count() else ""
    assert ran.stdout.removesuffix("\n") == said.removesuffix(end)
    streamed = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert streamed.rstrip().endswith("data: [DONE]")
    assert '"text": ' in streamed


def test_on_a_phone_in_the_dark(visitor: Visitor, endpoint_url: str) -> None:
    visit = visitor.open(endpoint_url, color_scheme="dark", **PHONE)
    page = visit.page
    visit.ready()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 25)"
    assert page.locator("#side").is_hidden()
    page.tap("#show-side")
    set_max_tokens(page, 30)
    page.fill("#setting-temperature", "0.2")
    visit.screenshot("phone-dark-settings")
    page.tap("#hide-side")
    ask(page, "Why is the sky blue?")
    answered(page)
    page.locator(".token").nth(4).tap()
    page.wait_for_selector("#token:visible")
    visit.screenshot("phone-dark-token")
    page.keyboard.press("Escape")
    page.tap("#compare")
    visit.screenshot("phone-dark-compare")
    for selector in ("html", ".log", "#composer"):
        fits = f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{selector}'))"
        assert page.evaluate(fits), selector
    page.tap("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light", "the choice is kept"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(244, 244, 241)"
    visit.screenshot("phone-light-empty")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page

    def press_until(selector: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert selector.startswith("input[name") or style != "none", f"{selector} shows that it has the focus"
                return
        raise AssertionError(f"{selector} cannot be reached")

    press_until(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Hello")
    press_until("#setting-temperature")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#setting-temperature") == "0.75"
    press_until("#setting-max_tokens")
    page.keyboard.type("8")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".turn", timeout=PATIENCE)
    assert visit.bodies()[0]["temperature"] == 0.75
    answered(page)
    press_until(".token", "Shift+Tab")
    assert page.locator("#token").is_visible()
    page.keyboard.press("Escape")
    press_until("#show-code", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator("#code-dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#code-dialog").is_hidden()
    assert page.evaluate("document.activeElement.id") == "show-code"


def test_a_key_is_asked_for_and_kept_in_this_tab_only(visitor: Visitor, endpoint_urls: Urls) -> None:
    visit = visitor.open(endpoint_urls.keyed)
    page = visit.page
    page.wait_for_selector("#key-dialog[open]")
    visit.screenshot("desktop-light-key")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-problem:visible")
    assert "not valid" in page.inner_text("#key-problem")
    page.fill("#key", endpoint_urls.key)
    page.keyboard.press("Enter")
    visit.ready()
    set_max_tokens(page, 4)
    ask(page, "Hello")
    answered(page)
    assert page.inner_text(".answer")
    assert page.evaluate("Object.values(localStorage).join()").find(endpoint_urls.key) == -1

    # The key allows one request a minute: the page says when the next may come.
    ask(page, "Hello again")
    answered(page, 2)
    problem = page.inner_text(".turn .problem")
    assert "try again in" in problem
    assert "status 429" in problem
    visit.screenshot("desktop-light-refused")
    page.click("#show-code")
    code = page.inner_text("#code")
    assert "$HELIOSTAT_API_KEY" in code
    assert endpoint_urls.key not in code
    page.reload()
    visit.ready()
    visit.problems.clear()  # the browser logs each refused request


BROKEN = """data: {"choices": [{"delta": {"content": "half an"}, "finish_reason": null}]}

data: {"error": {"message": "the engine stopped", "type": "server_error", "param": null, "code": "engine_failed"}}

"""


@pytest.mark.parametrize(
    ("events", "words"), [(BROKEN, "the engine stopped"), (BROKEN.partition("\n\n")[0] + "\n\n", "connection ended")]
)
def test_an_answer_that_breaks_off_says_so(visit: Visit, events: str, words: str) -> None:
    """Real faults of replicas are tested elsewhere; here, what the page makes of their last event."""
    page = visit.page
    answer = {"body": events, "content_type": "text/event-stream", "headers": {"x-request-id": "r-1"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    ask(page, "Hello")
    answered(page)
    assert page.inner_text(".answer") == "half an"
    assert words in page.inner_text(".problem")
    page.unroute("**/v1/chat/completions")
    set_max_tokens(page, 4)
    page.click("text=Run again")
    answered(page)
    assert page.locator(".problem:not(.callout)").count() == 1  # the hidden one of the API key


def test_a_refused_setting_is_named_and_marked(visit: Visit) -> None:
    page = visit.page
    page.fill("#setting-temperature", "9")
    ask(page, "Hello")
    answered(page)
    assert "temperature" in page.inner_text(".turn .problem")
    assert page.get_attribute("#setting-temperature", "aria-invalid") == "true"
    page.fill("#setting-temperature", "0.5")
    assert page.get_attribute("#setting-temperature", "aria-invalid") == "false"
    visit.problems.clear()  # the browser logs each refused request


def test_text_is_never_markup_and_the_card_tells_of_the_version(visit: Visit) -> None:
    page = visit.page
    markup = '<img src="x" onerror="alert(1)"><b>bold</b>'
    page.click('label:has(input[value="complete"])')
    set_max_tokens(page, 2)
    ask(page, markup)
    answered(page)
    assert page.inner_text(".turn .prompt") == markup
    assert page.locator(".log img, .log b").count() == 0
    card = page.inner_text("#card")
    for words in ("models:/smollm2@champion", "version 1", "0.4124", "dialogsum", "Version 3 was rejected"):
        assert words in card
    page.click("#clear")
    assert page.locator(".turn").count() == 0


TOKEN_CASES = [
    # Text that was held back comes later than its token.
    ([("", ["a b"]), ("a b c", [" c"])], ["a b", "c"]),
    # Two tokens are one character; what ends the answer has no text.
    ([("", ["\ufffd"]), ("é!", ["\ufffd", "!"]), ("", ["<end>"])], ["é", "!", "end"]),
    # A tokenizer that drops blanks.
    ([("one two", ["one", "two"])], ["one", "two"]),
    # Text without tokens.
    ([("plain", [])], []),
]


@pytest.mark.parametrize(("pieces", "spans"), TOKEN_CASES)
def test_tokens_find_their_place_in_the_text(visit: Visit, pieces: list[Any], spans: list[str]) -> None:
    found = visit.page.evaluate(
        """async ([pieces]) => {
          const { TokenText } = await import("./playground/tokens.js");
          const element = document.createElement("div");
          const shown = new TokenText(element);
          for (const [text, tokens] of pieces) shown.add(text, tokens.map((text) => ({ text, logprob: -1, top: [] })));
          shown.end("stop");
          const spans = [...element.querySelectorAll(".token")].map((one) => one.textContent);
          return [shown.text, element.textContent, spans];
        }""",
        [pieces],
    )
    text = "".join(piece for piece, _ in pieces)
    assert found == [text, text + ("end" if "end" in spans else ""), spans]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_that_axe_knows(visitor: Visitor, endpoint_url: str, scheme: str) -> None:
    """Rules of https://github.com/dequelabs/axe-core, contrast among them, on a page in use."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    visit = visitor.open(endpoint_url, color_scheme=scheme)
    page = visit.page
    visit.ready()
    page.fill("#setting-temperature", "0.3")
    set_max_tokens(page, 20)
    ask(page, "Name three colours.")
    answered(page)
    page.click("#compare")
    page.locator(".token").nth(2).hover()
    page.wait_for_selector("#token:visible")
    result = axe.Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    visit.screenshot(f"desktop-{scheme}-compare")
    page.mouse.move(5, 5)
    page.click("#show-code")
    result = axe.Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
