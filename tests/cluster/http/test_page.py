"""The page at the HTTP door, in a real browser: asked about a document by the demo model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from typer.testing import CliRunner

from cluster.cli import app
from cluster.text import PromptTokenizer
from homer.demo import MODEL_DIR
from homer.demo.tasks import Sample, make_sample
from tests.cluster.http.demo_door import TOKEN, Doors, demo_door

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
# It looks up nothing of its own.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
OUT = Path(__file__).parents[3] / "out"
WAIT_MS = 60_000
PHONE: Any = {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    with demo_door() as doors:
        yield doors


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh tab; what the browser complains of fails the test, and so does another host."""
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    hosts: set[str] = set()
    page.on("request", lambda asked: hosts.add(urlsplit(asked.url).netloc))
    yield page
    # A browser says so of every answer that is 401.
    assert [said for said in complaints if "status of 401" not in said] == []
    assert hosts <= {urlsplit(page.url).netloc}
    context.close()


@pytest.fixture(scope="module")
def sample() -> Sample:
    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    assert tokenizer is not None
    return make_sample("passkey", 3000, tokenizer.count_tokens, 3, split="demo")


def fill(page: Page, sample: Sample, copies: int = 1) -> None:
    page.get_by_label("Document", exact=True).fill(" ".join([sample.context] * copies))
    page.get_by_label("Question").fill(sample.suffix.strip())


def assert_evidence(page: Page, sample: Sample) -> None:
    """The tree is complete, and the statement that answers is found, and marked in its place."""
    tree = page.locator("#tree")
    assert int(tree.get_attribute("data-nodes") or 0) > 10
    assert tree.get_attribute("data-done") == tree.get_attribute("data-nodes")
    kept = page.locator("#passages button").filter(has=page.locator("b", has_text=sample.answer))
    kept.first.click()
    marked = "".join(page.locator("#map mark.chosen").all_text_contents())
    assert sample.answer in marked.replace(" ", "")
    # What is marked is where the document says it.
    assert page.locator("#map").evaluate("pane => pane.textContent") == sample.context
    expect(page.locator("#map mark.chosen").first).to_be_in_viewport()
    tree.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".node-line")).to_contain_text("kept")


def picture(page: Page, path: Path) -> None:
    """The whole page, small enough for the documents; what is out of view is not drawn."""
    assert page.viewport_size
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.locator("#map mark.chosen").first.scroll_into_view_if_needed()
    path.parent.mkdir(exist_ok=True)
    drawn = Image.open(BytesIO(page.screenshot())).convert("RGB")
    drawn.quantize(256).save(path, optimize=True)


def test_a_question_is_answered_token_by_token_and_shown_with_what_it_was_made_from(
    page: Page, doors: Doors, sample: Sample
) -> None:
    page.goto(doors.url)
    expect(page.locator("#model")).to_contain_text("a window of 512 tokens")
    page.evaluate(
        """() => {
            window.grown = []; window.filled = [];
            new MutationObserver(() => {
                grown.push(document.getElementById("answer").textContent);
                filled.push(Number(document.getElementById("tree")?.dataset.done ?? 0));
            }).observe(document.body, { subtree: true, childList: true, attributes: true });
        }"""
    )
    fill(page, sample)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#status")).to_have_text("Done.")
    answer = page.locator("#answer").text_content() or ""
    assert sample.is_right(answer)
    assert answer == answer.lstrip()
    lengths = sorted({len(text) for text in page.evaluate("grown")})
    assert len(lengths) > 3, "the answer came at once"
    assert len(set(page.evaluate("filled"))) > 3, "the tree was filled at once"
    assert_evidence(page, sample)
    picture(page, OUT / "page.png")
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, OUT / "page-phone.png")


def test_a_question_can_be_cancelled_and_asked_again_by_keyboard(
    page: Page, doors: Doors, sample: Sample
) -> None:
    page.goto(doors.url)
    fill(page, sample, copies=20)
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url) if sent.method == "POST" else None)
    page.get_by_label("Question").press("Control+Enter")
    page.wait_for_selector("#tree")
    page.get_by_label("Question").press("Control+Enter")
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    expect(page.get_by_label("Question")).to_be_focused()
    assert len(asked) == 1, "it was asked again while it ran"


def test_a_service_that_wants_a_token_is_given_one(
    page: Page, doors: Doors, sample: Sample
) -> None:
    page.goto(doors.guarded_url)
    expect(page.get_by_label("Access token")).to_be_focused()
    # To be asked for a token is no failure.
    expect(page.get_by_role("alert")).to_be_hidden()
    page.get_by_label("Access token").fill("wrong")
    fill(page, sample)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("does not take this access token")
    page.get_by_label("Access token").fill(TOKEN)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#status")).to_have_text("Done.")
    assert sample.is_right(page.locator("#answer").inner_text())
    # It is kept in the tab.
    page.reload()
    expect(page.locator("#model")).to_contain_text("a window of 512 tokens")


def test_files_are_read_in_the_browser_or_refused_in_words(
    page: Page, doors: Doors, tmp_path: Path
) -> None:
    html = tmp_path / "report.html"
    html.write_text(
        "<style>p{}</style><h1 style='color: red'>Dredging</h1><p>It was <b>decided</b>.</p>",
        "utf-8",
    )
    pdf = tmp_path / "report.pdf"
    pdf.write_bytes(b"%PDF-1.7\n")
    page.goto(doors.url)
    page.locator("#file").set_input_files(html)
    expect(page.get_by_label("Document", exact=True)).to_have_value("Dredging\nIt was decided.")
    page.locator("#file").set_input_files(pdf)
    expect(page.get_by_role("alert")).to_contain_text("report.pdf is a PDF")


def test_an_evidence_file_shows_the_same_without_a_network(
    page: Page, doors: Doors, sample: Sample, tmp_path: Path
) -> None:
    document, written = tmp_path / "document.txt", tmp_path / "evidence.html"
    document.write_text(sample.context, "utf-8")
    asked = ["generate", "--server", doors.address, "--context", str(document)]
    asked += ["--prefix", sample.prefix, "--question", sample.suffix, "--max-tokens", "16"]
    ran = CliRunner().invoke(app, [*asked, "--evidence", str(written)])
    assert ran.exit_code == 0, ran.output
    assert sample.is_right(ran.stdout)
    page.context.set_offline(True)
    page.goto(written.as_uri())
    assert page.locator("#answer").inner_text() == ran.stdout.strip()
    assert_evidence(page, sample)
