"""The page on which people rank, driven in a browser as they do: keys, mouse, reload, download."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from prepare import read_rankings
from tools import annotate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((shutil.which(name) for name in BROWSERS if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
FIELDS = ["id", "prompt", "responses", "ranking", "annotator", "display_order", "skipped",
          "flagged", "repeat", "seconds", "time"]
START, END = 2**21 - 2, 2**21 - 1        # of a tokenizer whose other tokens are characters


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"]               # which root has to do without
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(samples, name) writes their page, opens it in a browser that has kept nothing, and
    enters the name."""
    contexts = []

    def visit(samples, name="Ada", script=""):
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        annotate.main(["page", f"--out_dir={tmp_path}"])
        context = browser.new_context(offline=True)
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.add_init_script(script)
        page.goto((tmp_path / "rank.html").as_uri())
        page.fill("#name", name)
        page.press("#name", "Enter")
        return page

    yield visit
    errors = [error for context in contexts for page in context.pages for error in page.errors]
    for context in contexts:
        context.close()
    assert not errors


def response(text, ended=True):
    return dict(text=text, ended=ended, tokens=[*map(ord, text), END], model="secret-model.pt")


def make_samples(n, n_responses=4):
    samples = []
    for i in range(n):
        responses = [response(f"answer {i}.{j}") for j in range(n_responses)]
        samples.append(dict(id=f"p{i}", prompt=f"question {i}", responses=responses))
    return samples


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def cards(page):
    """The responses from top to bottom."""
    return page.locator(".card .text").all_text_contents()


def groups(page):
    """The same, with tied ones together."""
    return [group.locator(".text").all_text_contents() for group in page.locator(".group").all()]


def prompt(page):
    return page.text_content("#prompt")


def arrange(page, texts):
    """Bring untied cards into this order with the keys alone."""
    for place, text in enumerate(texts):
        at = cards(page).index(text)
        press(page, *["ArrowUp"] * len(texts), *["ArrowDown"] * at)          # selects it
        press(page, *["Shift+ArrowUp"] * (at - place))
    assert cards(page) == texts


def drag(page, start, end, part):
    """Take card `start` with the mouse and drop it on card `end`, at a part of its height."""
    boxes = [card.bounding_box() for card in page.locator(".card").all()]
    page.mouse.move(boxes[start]["x"] + 100, boxes[start]["y"] + boxes[start]["height"] / 2)
    page.mouse.down()
    page.mouse.move(boxes[end]["x"] + 100, boxes[end]["y"] + boxes[end]["height"] * part, steps=4)
    page.mouse.up()


def download(page, name="rankings-Ada.jsonl"):
    """The lines of the downloaded file, after the checks that every line has to pass."""
    with page.expect_download() as downloading:
        press(page, "d")
    assert downloading.value.suggested_filename == name
    path = downloading.value.path()
    text = path.read_bytes().decode("utf-8")
    assert text == "" or text.endswith("\n")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    tokenizer = SimpleNamespace(
        size=2**21, start=START, end=END, encode=lambda text: [ord(letter) for letter in text],
        text=lambda tokens: "".join(chr(token) for token in tokens if token != END))
    assert read_rankings([str(path)], tokenizer) == lines           # training can use every line
    assert annotate.read_rankings(path) == lines
    for line in lines:
        assert list(line) == FIELDS
        indices = list(range(len(line["responses"])))
        ranked = sorted(i for group in line["ranking"] for i in group)
        assert sorted(line["display_order"]) == indices
        assert ranked == ([] if line["skipped"] else indices)
        assert line["seconds"] >= 0 and line["seconds"] == round(line["seconds"], 1)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
    return lines


def test_keyboard_order_with_a_tie(visit):
    """Cards ordered and tied by keys come out as groups of indices into the original responses,
    whatever order was shown, in lines of the agreed form. A prompt with a single response is left
    out."""
    alone = dict(id="alone", prompt="?", responses=[response("only")])
    sample = make_samples(1)[0]
    texts = [r["text"] for r in sample["responses"]]
    page = visit([alone, sample], "Ada Müller ☺")
    assert prompt(page) == "question 0"
    order = [texts.index(text) for text in cards(page)]
    assert order != sorted(order)
    assert page.locator(".grip").all_text_contents() == ["0", "1", "2", "3"]
    arrange(page, [texts[i] for i in (2, 0, 3, 1)])
    press(page, *["ArrowUp"] * 4, "=")                         # the top card has none above
    assert "no response above" in page.text_content("#message") and len(groups(page)) == 4
    press(page, "ArrowDown", "ArrowDown", "=")
    assert groups(page) == [[texts[2]], [texts[0], texts[3]], [texts[1]]]
    press(page, "=")
    assert len(groups(page)) == 4
    press(page, "=", "Enter")
    assert page.locator("#over").is_visible()
    line, = download(page, "rankings-Ada-Müller-.jsonl")
    del line["seconds"], line["time"]
    assert line == dict(
        sample, ranking=[[2], [0, 3], [1]], annotator="Ada Müller ☺", display_order=order,
        skipped=False, flagged=False, repeat=False)


def test_drag_order(visit):
    """The mouse drags cards up, down and into a tie; the card lands where it was dropped, and the
    download shows it."""
    sample = make_samples(1)[0]
    texts = [r["text"] for r in sample["responses"]]
    page = visit([sample])
    a, b, c, d = cards(page)
    drag(page, 3, 0, 0.2)
    assert groups(page) == [[d], [a], [b], [c]]
    drag(page, 0, 2, 0.8)
    assert groups(page) == [[a], [b], [d], [c]]
    drag(page, 1, 1, 0.6)                                      # a click that trembles
    assert groups(page) == [[a], [b], [d], [c]]
    press(page, "=")                                           # ties b, which is selected, with a
    drag(page, 3, 0, 0.8)                                      # between two tied: c joins them
    assert groups(page) == [[a, c, b], [d]]
    drag(page, 2, 3, 0.8)                                      # and b leaves them
    assert groups(page) == [[a, c], [d], [b]]
    press(page, "Enter")
    line, = download(page)
    a, b, c, d = map(texts.index, (a, b, c, d))
    assert line["ranking"] == [sorted([a, c]), [d], [b]] and line["display_order"] == [a, b, c, d]


def test_reload_undo_skip_flag(visit):
    """Judgements and the open arrangement survive a reload; undo takes the last judgement back, to
    be changed; skipped and flagged prompts are recorded as such; the buttons do what the keys
    do."""
    page = visit(make_samples(4))
    assert page.text_content("#progress") == "1 of 4"
    for _ in range(3):
        page.keyboard.down("Enter")                            # a key held down saves once
    page.keyboard.up("Enter")
    press(page, "s", "f", "Shift+ArrowDown")
    arranged = cards(page)
    page.reload()
    assert prompt(page) == "question 2" and cards(page) == arranged
    assert re.fullmatch(r"3 of 4, about \d+ min left", page.text_content("#progress"))
    assert page.get_attribute("[data-key=f]", "aria-pressed") == "true"
    press(page, "Enter")
    page.reload()
    assert prompt(page) == "question 3"
    lines = download(page)
    assert [(line["id"], line["skipped"], line["flagged"]) for line in lines] == [
        ("p0", False, False), ("p1", True, False), ("p2", False, True)]
    press(page, "u")
    assert prompt(page) == "question 2" and cards(page) == arranged
    assert download(page) == lines[:2]
    page.click("[data-key=u]")
    assert prompt(page) == "question 1" and download(page) == lines[:1]
    page.click("[data-key='Shift+ArrowDown']")
    page.click("[data-key=f]")
    page.click("[data-key='=']")
    press(page, "Enter")                                       # saves, presses no button again
    page.click("[data-key=Enter]")
    page.click("[data-key=s]")
    found = download(page)
    assert [(line["id"], line["skipped"], line["flagged"]) for line in found] == [
        ("p0", False, False), ("p1", False, True), ("p2", False, False), ("p3", True, False)]
    shown = found[1]["display_order"]
    assert found[1]["ranking"] == [sorted(shown[:2]), [shown[2]], [shown[3]]]
    assert found[0] == lines[0]
    press(page, *"uuuuu")
    assert prompt(page) == "question 0" and download(page) == []


def test_typed_ranking(visit):
    """A typed ranking names the numbers on the cards; what is not one is refused in a line and
    changes nothing."""
    page = visit(make_samples(1))
    a, b, c, d = cards(page)
    for wrong in ("2>0=3", "2>0=3>3", "2>0=3>1>", "2,0,3,1", "a", "4>0=3>1", "02>0=3>1"):
        page.fill("#typed", wrong)
        page.press("#typed", "Enter")
        assert "Name each of 0, 1, 2, 3 once" in page.text_content("#message")
        assert groups(page) == [[a], [b], [c], [d]]
    page.fill("#typed", " 2 > 0=3>1")
    page.press("#typed", "Enter")
    assert groups(page) == [[c], [a, d], [b]] and page.text_content("#message") == ""
    press(page, "Enter")
    order = download(page)[0]["display_order"]
    assert download(page)[0]["ranking"] == [[order[2]], sorted([order[0], order[3]]), [order[1]]]


def test_hostile_texts(visit):
    """Markup in prompts and responses is shown as text and executes nothing, and every character
    comes back as it was; a response that has not ended is marked on the page alone."""
    texts = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
             "</script><script>window.hacked=1</script>", "<!--<script>",
             "a\u2028b\u2029c\r\n\td\x00\x85\ufeff\\u003c", "__SAMPLES__ $& $1 ${1}", "",
             "שלום \u202eעולם\u202c 👩‍👩‍👧 é e\u0301"]
    asked = "<b onmouseover=window.hacked=1>?</b><svg onload=window.hacked=1></svg></script>&lt;"
    responses = [response(text, ended=bool(text)) for text in texts]
    sample = dict(id="<i>p</i>", prompt=asked, responses=responses)
    page = visit([sample], "<img src=x onerror=window.hacked=1>")
    assert prompt(page) == asked
    shown = cards(page)
    assert sorted(shown) == sorted(text or " […]" for text in texts)
    for _ in texts:
        press(page, "Shift+ArrowDown", "=", "ArrowDown", "f")
    page.hover("#prompt")
    press(page, "Enter")
    line, = download(page, "rankings--img-src-x-onerror-window-hacked-1-.jsonl")
    assert {key: line[key] for key in sample} == sample
    assert [texts[i] or " […]" for i in line["display_order"]] == shown
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("b b, img, svg").count() == 0 and page.locator("script").count() == 2


def test_no_request(visit):
    """The page asks for nothing but itself, and its policy forbids what a script on it might ask
    for."""
    page = visit(make_samples(2))
    own = page.url
    press(page, "Enter", "Enter")
    download(page)
    page.reload()
    assert own.startswith("file:///")
    assert {url for url in page.requests if not url.startswith("blob:file:")} == {own}
    refused = page.evaluate("""() => new Promise(resolve => {
        const refused = [];
        document.addEventListener("securitypolicyviolation", event => {
            if (refused.push(event.effectiveDirective) === 3) resolve(refused); });
        setTimeout(() => resolve(refused), 3000);
        document.body.append(Object.assign(new Image(), { src: "http://localhost:9/image" }));
        document.body.append(
            Object.assign(document.createElement("iframe"), { src: "http://localhost:9/frame" }));
        fetch("http://localhost:9/fetch").catch(() => null); })""")
    assert sorted(refused) == ["connect-src", "frame-src", "img-src"]


def test_blind_and_shuffled(visit):
    """Orders differ between prompts and between annotators, but not between two visits of the same
    one; nothing on the page tells the models."""
    samples = make_samples(4)                                  # few enough for none to be repeated

    def orders(name):
        page, found = visit(samples, name), []
        for _ in samples:
            found.append([text[-1] for text in cards(page)])
            page.reload()
            assert [text[-1] for text in cards(page)] == found[-1]
            assert "secret" not in page.inner_text("body")
            assert "secret" not in page.inner_html("#work")
            press(page, "Enter")
        assert page.locator("#over").is_visible()
        return found

    ada = orders("Ada")
    assert orders("Ada") == ada != orders("Ben")
    assert len(set(map(tuple, ada))) > 1


def test_annotators_share_a_browser(visit):
    """Another name begins anew; the first one, entered again, goes on where it stopped."""
    page = visit(make_samples(3))
    press(page, "Enter")
    page.click("#change")
    page.fill("#name", "Ben")
    page.press("#name", "Enter")
    assert prompt(page) == "question 0"
    press(page, "s", "s")
    lines = download(page, "rankings-Ben.jsonl")
    assert [line["annotator"] for line in lines] == ["Ben", "Ben"]
    page.click("#change")
    page.fill("#name", "Ada")
    page.press("#name", "Enter")
    assert prompt(page) == "question 1"
    assert [line["annotator"] for line in download(page)] == ["Ada"]


def test_name_of_the_simulated_annotator(visit):
    """A person who enters this name is not taken for the annotator that is no person."""
    page = visit(make_samples(1), "simulated")
    press(page, "Enter")
    line, = download(page, "rankings-simulated-person-.jsonl")
    assert line["annotator"] == "simulated (person)"


def test_conversation(visit):
    """A prompt of several messages is shown turn by turn, and comes back as it was."""
    sample = make_samples(1)[0]
    sample["prompt"] = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
    page = visit([sample])
    assert prompt(page) == "system: Be brief.\nuser: Hi"
    press(page, "Enter")
    line, = download(page)
    assert line["prompt"] == sample["prompt"]


def test_repeats(visit):
    """About one judged prompt in ten comes a second time, not at once and in another order, and is
    marked; neither skipped nor flagged prompts do."""
    samples = make_samples(17, n_responses=2)                  # so there is one other order
    page = visit(samples)
    for i in range(19):
        press(page, "s" if i == 0 else "f" if i == 1 else "ArrowUp", *["Enter"] * (i > 0))
    assert page.locator("#over").is_visible()
    lines = download(page)
    first_time = [line["id"] for line in lines if not line["repeat"]]
    assert first_time == [sample["id"] for sample in samples]
    repeats = [i for i, line in enumerate(lines) if line["repeat"]]
    assert len({lines[i]["id"] for i in repeats}) == len(repeats) == 2 and repeats[0] == 6
    for i in repeats:
        first = next(j for j, line in enumerate(lines) if line["id"] == lines[i]["id"])
        assert i - first > 3
        assert not lines[first]["skipped"] and not lines[first]["flagged"]
        assert lines[i]["display_order"] == lines[first]["display_order"][::-1]


def test_repeats_run_out(visit):
    """The only prompt fit to be repeated comes again once only, however many repeats are due."""
    page = visit(make_samples(16, n_responses=2))
    for i in range(17):
        press(page, *["f"] * (i not in (1, 5)), "Enter")
    assert page.locator("#over").is_visible()
    lines = download(page)
    unflagged = [i for i, line in enumerate(lines) if line["repeat"] or not line["flagged"]]
    assert unflagged == [1, 5] and lines[1]["id"] == lines[5]["id"] == "p1"


def test_without_storage(visit):
    """A browser that stores nothing is warned of in a line, and judgements can be made and
    downloaded all the same."""
    page = visit(make_samples(2), script="""Object.defineProperty(window, "localStorage", {
        get() { throw new DOMException("denied", "SecurityError"); } })""")
    assert "stores nothing" in page.text_content("#warning")
    press(page, "Enter", "u", "Enter", "s")
    assert [line["skipped"] for line in download(page)] == [False, True]
