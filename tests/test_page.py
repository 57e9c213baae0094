"""
The page in a real browser, with a real server and made models: what a person does with mouse, keyboard and phone, and what
a hostile model tries. After each test nothing was asked of any other server, and nothing was executed, loaded or broken.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from checkpoint import FOLDERS, save_checkpoint
from conftest import ROOT
from model import GPT, GPTConfig
from plumbing import stop
from tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")
pytest.importorskip("fastapi")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")

# what the models say, a token each: none twice, as the next token depends on the last alone
FRIENDLY = ["Hello, ", "I am **no", "body**.\n\n", "```python\nx", " = 1 < 2\n``", "`\n\n- one\n", "- two\n\nSo "]
HOSTILE = ["<img src=x onerror=hacked=1>", "</script>", "<script>hacked=2</script>\n\n", "[click](javascript:hacked=3) ",
           "![picture](http://127.0.0.1:9/p.png) ", "<svg onload=hacked=4> ", "[real](https://example.org/?a=1&b=2)\n\n",
           "<details open ontoggle=hacked=5>\n", "# <b onclick=hacked=6>title</b>\n\n", "`<iframe src=//127.0.0.1:9>`\n\n",
           "| <a href=javascript:hacked=7>a</a> | b |\n|---|---|\n| 1 | 2 |\n\n", ">" * 500 + " deep\n\n", "\u202eevil"]
BASE = [" there was", " a model", " that went on."]
WORDS = [word.encode() for word in dict.fromkeys([*FRIENDLY, *HOSTILE, *BASE])]
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)] + WORDS)
SPECIAL = TOKENIZER.special


def save_model_that_says(folder, tokens, context):
    """A real model whose next token depends on the last alone: each of tokens calls the next."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=context, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=128)
    model = GPT(config)
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding /= embedding.norm(dim=1, keepdim=True)
        for token, follower in zip(tokens, tokens[1:]):
            model.lm_head.weight[follower] += embedding[token]
    meta = dict(stage="sft", num_iterations=5, config={}, tokenizer=TOKENIZER.fingerprint)
    save_checkpoint(str(folder), 5, model, [], meta)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    TOKENIZER.save(str(folder / "tokenizer"), {})
    start, end = [SPECIAL("<|assistant_start|>")], SPECIAL("<|assistant_end|>")

    def ids(words):
        return [256 + WORDS.index(word.encode()) for word in words]

    call = [SPECIAL("<|python_start|>"), *b"6*7", SPECIAL("<|python_end|>"), SPECIAL("<|output_end|>"), *b".", end]
    save_model_that_says(folder / FOLDERS["sft"] / "friendly", [*start, *ids(FRIENDLY), *call], 600)
    save_model_that_says(folder / FOLDERS["sft"] / "hostile", [*start, *ids(HOSTILE), end], 600)
    save_model_that_says(folder / FOLDERS["sft"] / "endless", [*start, *b"xx"], 20_000)
    save_model_that_says(folder / FOLDERS["base"] / "friendly", [*b"e", *ids(BASE), TOKENIZER.bos], 600)
    return folder


@pytest.fixture(scope="module")
def url(base_dir):
    """The address of a server, a process of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_NUM_THREADS="1")
    process = subprocess.Popen([sys.executable, "chat_web.py", f"--port={port}", "--device=cpu", "--slots=3",
                                "--model_tag=friendly"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert "open http" in process.stdout.readline()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


class Page:
    """The page in a window of its own, what has gone out of it, and the hands of a person."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 750}, **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.context.set_default_timeout(20_000)
        self.page, self.url, self.asked, self.wrong, self.bodies = self.context.new_page(), url, [], [], []
        self.page.on("request", self.note)
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("popup", lambda popup: self.wrong.append(f"popup: {popup.url}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type in ("error", "warning") and
                     self.wrong.append(f"console: {message.text}"))

    def note(self, request):
        self.asked.append(request.url)
        if request.method == "POST":
            self.bodies.append((request.url.removeprefix(self.url), json.loads(request.post_data)))

    def open(self, view="#chat", model=""):
        self.page.goto(self.url + "/" + view)
        if view == "#chat":
            self.page.wait_for_selector("#send:enabled")
        if model:
            self.page.select_option("#model", model)
        return self.page

    def ask(self, question):
        """Ask and wait for the end of the answers."""
        turns = self.page.locator(".turn").count()
        self.page.fill("#message", question)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector(f".turn >> nth={turns}")
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0, timeout=20_000)

    def last(self, selector=".text"):
        return self.page.locator(f".turn:last-child .answer {selector}")

    def press(self, name):
        """The button of that name below the last answer."""
        self.page.locator(".turn:last-child .answer").last.get_by_role("button", name=name, exact=True).last.click()

    def close(self, allowed=r"^$"):
        """The laws of every test."""
        hacked = self.page.evaluate("window.hacked")
        self.context.close()
        assert hacked is None
        assert not [url for url in self.asked if not url.startswith(self.url + "/") and not url.startswith("data:")]
        assert not [text for text in self.wrong if not re.search(allowed, text)]


def eventually(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def window(browser, url):
    """window(**options of the browser context) -> a Page, closed and judged at the end."""
    windows = []

    def new(allowed=r"^$", **options):
        windows.append((Page(browser, url, **options), allowed))
        return windows[-1][0]

    yield new
    for page, allowed in windows:
        page.close(allowed)


def test_send_stream_reload_and_go_on(window):
    me = window()
    page = me.open()
    me.ask("Who are you?")
    assert me.last().inner_text().startswith("Hello, I am nobody.") and me.last("strong").inner_text() == "nobody"
    assert me.last("pre").inner_text() == "x = 1 < 2" and me.last("li").count() == 2
    assert not me.last(".tool code").is_visible()                       # folded, until it is asked for
    me.last("summary").click()
    assert me.last(".tool code").inner_text() == "6*7 = 42"
    me.press("Copy")
    assert page.evaluate("navigator.clipboard.readText()") == "".join(FRIENDLY) + "[6*7 = 42]."
    page.reload()
    assert page.locator("#chats li").all_inner_texts()[0].startswith("Who are you?")
    assert "nobody" in page.locator(".answer .text").inner_text()
    page.wait_for_selector("#send:enabled")
    me.ask("And now?")
    address, body = me.bodies[-1]
    assert address == "/v1/chat/completions"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    call, result = body["messages"][1]["content"][1:3]
    assert call == {"type": "python", "text": "6*7"} and result == {"type": "python_output", "text": "42"}
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0
    page.locator("#chats li").first.hover()
    page.locator("#chats >> text=Rename").first.click()
    page.keyboard.type("First talk")
    page.keyboard.press("Enter")
    assert page.locator("#chats li button").first.inner_text() == "First talk"
    page.locator("#chats li").first.hover()
    page.locator("#chats >> text=Delete").first.click()
    assert page.locator("#chats li").count() == 0
    page.click("text=Undo")
    assert page.locator("#chats li").count() == 1 and page.locator(".turn").count() == 2


def test_stop(window, url):
    me = window()
    page = me.open(model="sft/endless")
    page.click("#settings-button")
    page.fill("#max_tokens", "15000")
    log, height = "document.querySelector('#log')", "document.querySelector('#log').scrollHeight"
    for end in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.fill("#message", "Go on for ever")
        page.keyboard.press("Enter")
        page.wait_for_selector(f".turn:last-child .text:has-text('{'x' * 20}')")
        before = page.evaluate(height)
        eventually(lambda: page.evaluate(height) > before + 100)                     # it streams, and who is at the end stays there
        eventually(lambda: page.evaluate(f"{log}.scrollTop + {log}.clientHeight - {height}") > -100)
        before = page.evaluate(f"{log}.scrollTop = 0, {height}")
        eventually(lambda: page.evaluate(height) > before + 100)
        assert page.evaluate(f"{log}.scrollTop") == 0                                # who reads further up is left alone
        end()
        page.wait_for_selector(".turn:last-child footer :text('stopped')")
    assert page.evaluate("document.activeElement.id") == "message"
    eventually(lambda: json.load(urllib.request.urlopen(f"{url}/health"))["busy"] == 0)      # it writes for nobody
    page.reload()
    assert page.locator("footer :text('stopped')").count() == 2


def test_escape_ends_what_one_is_in(window):
    me = window()
    page = me.open(model="sft/endless")
    page.click("#settings-button")
    page.fill("#max_tokens", "15000")
    page.fill("#message", "go on")
    page.keyboard.press("Enter")
    page.wait_for_selector("[aria-busy=true] p:not(:empty)")
    for name, left in (("Edit", ".question form"), ("Rename go on", "#chats input")):
        page.get_by_role("button", name=name, exact=True).first.dispatch_event("click")
        page.wait_for_selector(left)
        page.keyboard.press("Escape")
        page.wait_for_selector(left, state="detached")
        assert page.locator("[aria-busy=true]").count() == 1, "only the editing is left"
    page.keyboard.press("Escape")
    page.wait_for_selector("footer :text('stopped')")


def test_regenerate_edit_and_settings(window):
    me = window()
    page = me.open()
    me.ask("one")
    me.ask("two")
    first = me.bodies[-1][1]
    page.click("#settings-button")
    assert page.evaluate("(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('#log'))") < 2
    for name, value in dict(temperature="0", top_k="3", max_tokens="5", seed="11", system="Be brief.").items():
        page.fill(f"#{name}", value)
    me.press("Regenerate")
    page.wait_for_selector("footer :text('cut short: max tokens 5')")
    again = me.bodies[-1][1]
    assert again["messages"][0] == {"role": "system", "content": "Be brief."} and again["messages"][1:] == first["messages"]
    # the seed is the next one: asked for again, an answer is not to be the same
    assert (again["temperature"], again["top_k"], again["max_tokens"], again["seed"]) == (0, 3, 5, 12)
    page.locator("text=Edit").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("another one")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert page.locator(".turn").count() == 1 and page.locator(".question p").inner_text() == "another one"
    edited = me.bodies[-1][1]
    assert edited["messages"][1:] == [{"role": "user", "content": "another one"}] and edited["seed"] == 11
    page.reload()
    assert page.input_value("#system") == "Be brief." and page.locator(".question p").inner_text() == "another one"


def test_a_full_context_is_said(window):
    me = window()
    me.open()
    me.ask("y" * 300)
    me.ask("z" * 300)
    assert "the context is full: the oldest turn was left out" in me.last("footer").inner_text()


def test_a_hostile_model_changes_nothing_and_loads_nothing(window):
    me = window()
    page = me.open(model="sft/hostile")
    me.ask("<img src=x onerror=hacked=8>")
    shown = me.last().inner_text()
    for word in ("<img src=x onerror=hacked=1></script><script>hacked=2</script>", "[click](javascript:hacked=3)",
                 "![picture](http://127.0.0.1:9/p.png)", "<svg onload=hacked=4>", "<details open ontoggle=hacked=5>",
                 "<b onclick=hacked=6>title</b>", "<iframe src=//127.0.0.1:9>", "<a href=javascript:hacked=7>a</a>", "deep"):
        assert word in shown
    allowed = {"DIV", "P", "A", "H1", "CODE", "TABLE", "TR", "TH", "TD", "BLOCKQUOTE"}
    assert set(page.evaluate("[...document.querySelectorAll('.answer .text *')].map(e => e.tagName)")) <= allowed
    link = me.last("a")
    assert link.count() == 1 and link.get_attribute("href") == "https://example.org/?a=1&b=2"
    assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"
    me.press("Tokens")
    assert "<img src=x" in me.last(".tokens").inner_text() and not page.locator("#log img, #chats img").count()
    policy = page.request.get(me.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    with open(os.path.join(ROOT, "ui.html"), encoding="utf-8") as f:
        source = f.read()
    assert source.count("<script>") == source.count("<style>") == 1
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc| style=", source)
    assert not re.search(r"(src|href)=\"?(https?:)?//", source)


def test_two_models_side_by_side(window):
    me = window()
    page = me.open()
    page.click("#compare")
    page.select_option("#second", "base/friendly")
    me.ask("Once upon a time")
    chat, base = me.last().all()
    assert "nobody" in chat.inner_text() and base.inner_text() == "Once upon a time there was a model that went on."
    assert base.locator(".prompt").inner_text() == "Once upon a time"
    assert {address for address, _ in me.bodies} == {"/v1/chat/completions", "/v1/completions"}
    left, right = (column.bounding_box() for column in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    page.reload()
    assert page.locator(".answer").count() == 2


def test_tokens_and_their_probabilities(window):
    me = window()
    page = me.open()
    me.ask("Who are you?")
    me.press("Tokens")
    tokens, tip = me.last(".token"), page.locator("#tip")
    assert tokens.first.inner_text() == FRIENDLY[0]
    assert me.last(".forced").all_inner_texts() == ["<|output_start|>", "4", "2", "<|output_end|>"]
    tokens.first.hover()
    assert tip.locator("tr").count() == 5 and tip.locator(".drawn").inner_text().startswith("Hello,·")
    shares = [float(text.removesuffix(" %")) for text in tip.locator("td:last-child").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 50 < shares[0] <= sum(shares) < 101
    tokens.first.focus()
    for _ in FRIENDLY:
        page.keyboard.press("ArrowRight")
    assert tip.locator(".drawn").inner_text().startswith("<|python_start|>")
    me.last(".forced").first.hover()
    assert "calculator" in tip.inner_text()
    me.press("Tokens")
    assert me.last("strong").inner_text() == "nobody"
    told = {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1, "b": -3, "7": -4}]}    # of a base model
    likeliest = page.evaluate("told => legacyTokens(told)[0].top_logprobs.map(each => each.token)", told)
    assert likeliest == ["a", "b", "7"]


def test_keyboard_only(window):
    me = window()
    page = me.open()                                                    # one can write at once
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    for more in ("isComposing: true", "keyCode: 229"):                  # the Enter that ends the choice of a word
        page.evaluate("""document.querySelector("#message").dispatchEvent(
                         new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true, %s}))""" % more)
    assert not me.bodies
    page.keyboard.press("Enter")
    page.wait_for_selector("footer :text('seed')")
    assert me.bodies[0][1]["messages"][0]["content"] == "line one\nline two"
    assert "nobody" in page.locator("[role=status]").inner_text()       # read out when it is there, in one piece
    seen = []
    for _ in range(50):                                                 # more than once around
        page.keyboard.press("Tab")
        seen.append(page.evaluate("""(() => {
            const e = document.activeElement, outline = getComputedStyle(e).outlineStyle, box = e.closest("#box");
            const visible = outline !== "none" || box && getComputedStyle(box).boxShadow !== "none" || e === document.body;
            return [e === document.body ? "" : e.getAttribute("aria-label") || e.innerText || e.id, visible]})()"""))
    assert all(visible for _, visible in seen), seen
    order = [name.split("\n")[0] for name, _ in seen]
    order = order[order.index("Skip the list"):]
    names = "Chat, Training, New chat, Conversation, Edit, Copy, Regenerate, message, Model, Compare, Settings, Send".split(", ")
    places = [order.index(name) for name in names]
    assert places == sorted(places), order
    page.locator("text=Edit").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.innerText") == "Edit"


def test_phone_and_themes(window):
    me = window(viewport={"width": 360, "height": 720}, color_scheme="dark", has_touch=True, is_mobile=True)
    page = me.open(model="sft/hostile")
    page.click("#compare")
    me.ask("w" * 300)
    width = "Math.max(...[...document.querySelectorAll('html, main, #log, #training-view, aside')].map(e => e.scrollWidth))"
    assert page.evaluate(width) <= 360
    page.click("#list-button")
    assert page.locator("#new-chat").is_visible()
    page.click("#new-chat")
    assert not page.locator("#new-chat").is_visible() and page.locator(".turn").count() == 0
    lightness = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).reduce((a, b) => a + Number(b), 0)"
    assert page.evaluate(lightness) < 150
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: light" and page.evaluate(lightness) > 700
    page.reload()
    assert page.evaluate(lightness) > 700
    page.goto(me.url + "/#training")
    page.wait_for_selector("#no-runs:visible, #run:visible")
    assert page.evaluate(width) <= 360


def test_what_the_server_refuses(window):
    me = window(allowed="Failed to load resource")
    me.context.route("**/v1/models", lambda route: route.fulfill(json={"data": []}), times=1)
    page = me.page
    page.goto(me.url)
    page.wait_for_selector("text=There is no model here yet")          # asked again until there is one
    page.wait_for_selector("#send:enabled")
    refusals = [dict(status=503, headers={"Retry-After": "1"}, json={"error": {"message": "full"}}),
                *[dict(status=401, json={"error": {"message": "no key"}})] * 2,
                dict(status=400, json={"error": {"message": "that is too long; say it shorter"}})]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**refusals.pop(0)), times=4)
    page.fill("#message", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Asking again in 1 s")
    for key in ("nö€", "a secret"):                                     # of which a header can hold only one
        expect(page.locator("#key span")).to_be_visible(visible=key == "a secret")
        expect(page.locator("#key-input")).to_have_value("")
        page.fill("#key-input", key)
        page.keyboard.press("Enter")
    page.wait_for_selector("footer :text('say it shorter')")
    with page.expect_request("**/v1/chat/completions") as request:
        page.click("text=Try again")
    assert request.value.headers["authorization"] == "Bearer a secret"
    page.wait_for_selector("footer :text('seed')")
    assert "nobody" in me.last().inner_text() and page.locator(".problem").count() == 0
    page.route("**/v1/**", lambda route: route.abort())
    page.fill("#message", "are you there?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:visible >> text=The server does not answer")
    page.unroute("**/v1/**")
    page.click("text=Try again")
    page.wait_for_selector("#notice", state="hidden")


def test_storage_that_is_damaged_or_full(window):
    me = window()
    answer = {"model": "sft/x", "parts": [], "end": ""}
    chat = {"id": "good", "title": "a good one", "turns": [{"question": "q", "answers": [answer]}]}
    kept = {"settings": "[1", "chat.a": "{", "chat.b": '{"id": 3}', "chat.c": "null", "key": "7",
            "chat.d": '{"id":"d","title":"d","turns":[{}]}', "chat.good": json.dumps(chat)}
    me.context.add_init_script(f"""if (!sessionStorage.done) for (const [key, value] of Object.entries({json.dumps(kept)}))
                                       localStorage.setItem("nanochat." + key, value); sessionStorage.done = 1;""")
    page = me.open()
    assert page.locator("#chats li").count() == 1
    page.evaluate("() => void (Storage.prototype.setItem = () => { throw new Error('full'); })")
    me.ask("hello")
    assert "nobody" in me.last().inner_text() and "no room left" in page.locator("#notice").inner_text()


def test_two_windows_with_the_same_chat(window):
    me = window()
    page = me.open()
    me.ask("first")
    other = me.context.new_page()
    other.goto(me.url + "/#chat")
    other.wait_for_selector("#send:enabled")
    other.fill("#message", "second")
    other.keyboard.press("Enter")
    other.wait_for_selector(".turn >> nth=1")
    expect(other.locator("[aria-busy=true]")).to_have_count(0)
    expect(page.locator(".question > p")).to_have_text(["first", "second"])     # it hears of it
    me.ask("third")
    page.evaluate("document.querySelector('#log').scrollTop = 0")
    other.click("#new-chat")
    other.fill("#message", "of another chat")
    other.keyboard.press("Enter")
    expect(page.locator("#chats li")).to_have_count(2)                          # and this is all that it shows here
    expect(page.get_by_role("button", name="Tokens")).to_have_count(1)
    assert page.evaluate("document.querySelector('#log').scrollTop") == 0
    page.reload()
    page.click("#chats >> text=first")
    assert page.locator(".question > p").all_inner_texts() == ["first", "second", "third"]


@contextlib.contextmanager
def run_in_progress(base_dir, stage, tag, rows):
    """A run's folder whose lock is held; yields a function that appends rows to its log."""
    folder = base_dir / FOLDERS[stage] / tag
    folder.mkdir(parents=True)
    lock = stop.only_one(f"{folder}.lock")

    def write(rows):
        with open(folder / "log.jsonl", "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    write(rows)
    try:
        yield write
    finally:
        lock.close()
        shutil.rmtree(folder)
        os.remove(f"{folder}.lock")


def step_row(step, mfu=None):
    return dict(step=step, loss=8 / (1 + step) ** 0.3, matrix_lr=0.02, embedding_lr=0.4, unembedding_lr=0.01, grad_norm=0.5,
                ms=50.0, tokens_per_second=40_000.0 + step % 7, mfu=mfu, seconds=0.05 * step)


def test_training_while_the_log_grows(window, base_dir):
    me = window(allowed="404")                                          # no report card yet
    first = [step_row(0) | {"num_iterations": 400}, *map(step_row, range(1, 100))]
    with run_in_progress(base_dir, "base", "d3", first) as write:
        page = me.open("#training")
        numbers = page.locator("#numbers")
        page.wait_for_selector("#numbers >> text=100 of 400")                # the row of step 99 is that of the hundredth
        assert page.locator("#run-head span").inner_text() == "running" and "Left" in numbers.inner_text()
        assert page.locator("figure").count() == 4                      # loss, learning rate, speed, gradient norm
        scroll = "document.querySelector('#training-view').scrollTop"
        page.evaluate(f"{scroll} = 50")
        samples = [["The capital of France is", "<img src=x onerror=hacked=9>"]]
        write([*map(step_row, range(100, 200)), dict(step=200, val_bpb=1.75), dict(step=200, samples=samples),
               dict(step=200, test="<b>counts</b>", right=3, total=4)])
        page.wait_for_selector("#numbers >> text=200 of 400", timeout=15_000)
        assert page.evaluate(scroll) == 50                              # who reads further down stays there
        assert "1.75" in numbers.inner_text() and "<img src=x" in page.locator("#samples").inner_text()
        assert "<b>counts</b>\t3 of 4\t75 %\t200" in page.locator("#tests").inner_text()
        page.locator("figure svg").first.hover()
        assert re.match(r"step (9|10)\d: 2\.\d", page.locator("figure .reading").first.inner_text())
        page.locator("figure svg").first.focus()
        page.keyboard.press("ArrowRight")
        assert "step" in page.locator("[role=status]").inner_text()
        write([dict(step=300, val_bpb=1.5), dict(step=300, samples=[["A", " b"]])])
        page.wait_for_selector("figure:has-text('Validation') circle >> nth=1", state="attached")
        assert page.locator("#samples").inner_text().split("\n")[-1] == "A b"
        page.select_option("#samples select", "200")
        assert "France" in page.locator("#samples").inner_text()
    page.wait_for_selector("#no-runs:visible", timeout=15_000)            # its folder was moved away


def test_a_stopped_run_of_20000_steps_beside_another_and_the_report(window, base_dir):
    me = window()
    report = ["# Report card of d9", "", "| a | b |", "| --- | --- |", "| 1 \\| 2 | <img src=x> |", "",
              "![curves](d9/curves.png)", "", "<details><summary>All knobs</summary>", "", "`depth=9`", "", "</details>"]
    (base_dir / "report" / "d9").mkdir(parents=True)
    (base_dir / "report" / "d9.md").write_text("\n".join(report))
    (base_dir / "report" / "d9" / "curves.png").write_bytes(bytes.fromhex(        # one pixel
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0def46b8"
        "0000000049454e44ae426082"))
    with run_in_progress(base_dir, "mid", "d9", [step_row(i, mfu=0.5) for i in range(100)]):
        with run_in_progress(base_dir, "base", "d9", [step_row(i, mfu=0.4) for i in range(20_000)]):
            page = me.open("#training/base%2Fd9")
            page.wait_for_selector("#numbers >> text=20,000")
            lengths = "[...document.querySelectorAll('path')].map(path => path.getAttribute('d').length)"
            assert max(page.evaluate(lengths)) < 30_000                  # not 20,000 points
            page.select_option("#beside", "mid/d9")
            page.wait_for_selector("figure:has-text('MFU') .run1 path >> nth=1", state="attached")
            assert page.locator("figure:has-text('MFU') .reading").inner_text() == "4050"
            assert page.locator("#report td").all_inner_texts() == ["1 | 2", "<img src=x>"]
            eventually(lambda: page.evaluate("document.querySelector('#report img').naturalWidth") == 1)
            assert page.locator("#report summary").inner_text() == "All knobs"
            assert not page.locator("#report code").is_visible()
            page.evaluate("document.querySelector('#training-view').scrollTop = 1e6")
            page.click("#runs >> text=mid/d9")
            page.wait_for_selector("#run-head h2:text-is('mid/d9')")
            assert page.evaluate("document.querySelector('#training-view').scrollTop") == 0    # it is seen to be another


@pytest.mark.full
def test_training_view_of_a_run_that_really_trains(window, base_dir):
    """A tiny run beside the server: its curves, its speed, its samples and its end are seen as they come."""
    code = """
import random
from data import shard_path, VAL_SHARD, write_shard
words = "the a cat dog sees hears and or red green house tree walks runs to from".split()
rng = random.Random(0)
text = lambda: " ".join(rng.choices(words, k=rng.randint(5, 60))).capitalize() + "."
for shard in (0, VAL_SHARD):
    write_shard(shard_path(shard), [text() for _ in range(60)])
"""
    environment = dict(os.environ, NANOCHAT_BASE_DIR=str(base_dir), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    me = window(allowed="404")
    page = me.open("#training")
    trainer = subprocess.Popen([sys.executable, "base_train.py", "--depth=1", "--head_dim=32", "--max_seq_len=128",
                                "--total_batch_size=1024", "--device=cpu", "--dtype=float32", "--num_iterations=150",
                                "--eval_every=50", "--sample_every=50", "--core_metric_every=0"],
                               cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    page.wait_for_selector("#run-head >> text=running", timeout=120_000)
    page.wait_for_selector("#numbers >> text=Left", timeout=120_000)
    page.wait_for_selector("#samples p >> nth=6", timeout=120_000)
    assert trainer.wait() == 0
    page.wait_for_selector("#run-head >> text=finished", timeout=15_000)
    assert "150 of 150" in page.locator("#numbers").inner_text()
    assert page.locator("figure:has-text('Validation') circle").count() == 3
    page.click("#to-chat")
    page.wait_for_selector("#model option[value='base/d1']", state="attached")      # and it can be talked to
