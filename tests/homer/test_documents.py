"""Text out of files of several formats, and what is said of files that hold none."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from homer.documents import extract_text, read_document, read_documents
from homer.errors import ConfigError, PromptError

WORDS = "The mill was quiet."


def write_pdf(path: Path, text: str) -> None:
    """One page, by the letter of the format: objects, a table of where they start, a trailer."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, starts = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, start=1):
        starts.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n"
    out += b"".join(b"%010d 00000 n \n" % start for start in starts)
    out += b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % table
    path.write_bytes(out)


def test_text_json_lines_and_pdf_are_read_one_after_the_other(tmp_path: Path) -> None:
    plain, lines, pdf = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.PDF"))
    plain.write_text("One näive line.", encoding="utf-8")
    lines.write_text('{"body": "Two."}\n\n{"body": "Three\\nfour.", "id": 7}\n', encoding="utf-8")
    write_pdf(pdf, WORDS)
    text = read_documents([plain, lines, pdf], field="body")
    assert text == f"One näive line.\nTwo.\nThree\nfour.\n{WORDS}"


PAGE = """<!DOCTYPE html><html><head><meta charset="{charset}"><title>No part of it</title>
<script>var no = 1</script><style>p {{}}</style></head><body><h1>Über mills</h1>
<p>The mill was <b>quiet</b> &amp; <a href="http://elsewhere">small</a>.</p>
<ul><li>one<li>two</ul><!-- never --></body></html>"""


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1"])
def test_of_html_is_read_what_a_browser_shows(charset: str, tmp_path: Path) -> None:
    raw = PAGE.format(charset=charset).encode(charset)
    (tmp_path / "page.HTM").write_bytes(raw)
    text = read_document(tmp_path / "page.HTM")
    assert [line.strip() for line in text.split("\n") if line.strip()] == [
        "Über mills",
        "The mill was quiet & small.",
        "* one",
        "* two",
    ]
    assert extract_text(raw, "a name that says nothing") == text
    # UTF-8 needs no word of it.
    assert "naïve" in extract_text("<html><p>naïve".encode(), "stdin")


def test_without_a_telling_name_the_content_says_what_a_document_is(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", WORDS)
    raw = (tmp_path / "a.pdf").read_bytes()
    assert extract_text(raw, "stdin") == WORDS
    assert extract_text(b"\xef\xbb\xbf# Mills\n", "stdin") == "# Mills\n"
    # A name goes before the content.
    assert extract_text(PAGE.encode(), "page.txt") == PAGE


@pytest.mark.parametrize("content", [b"", b" \n", b"<html><body></body></html>"])
def test_a_document_with_nothing_in_it_is_refused(content: bytes) -> None:
    with pytest.raises(PromptError, match="the document stdin is empty"):
        extract_text(content, "stdin")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "its fields are body, id: name .* by --field"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has no text in the field 'text'"),
        ("a.pdf", b"no PDF at all", "not a readable PDF"),
    ],
)
def test_a_file_without_text_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_documents([tmp_path / name])


def test_a_scan_is_refused(tmp_path: Path) -> None:
    write_pdf(tmp_path / "scan.pdf", "")
    with pytest.raises(PromptError, match=r"has 1 page\(s\) and no text"):
        read_documents([tmp_path / "scan.pdf"])


@pytest.mark.parametrize(("package", "extra"), [("pypdf", "pdf"), ("inscriptis", "html")])
def test_without_its_reader_a_document_is_refused_with_what_to_install(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith(package):
            raise ImportError(name)
        return really(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"pip install 'homer-context\[{extra}\]'"):
        extract_text(b"", f"a.{extra}")
