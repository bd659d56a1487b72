"""Text out of documents: plain text and Markdown as they are, HTML, PDF; JSON lines.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Literal

from homer.errors import ConfigError, PromptError

STDIN = "-"
Kind = Literal["text", "html", "pdf"]
_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}


def read_document(source: str | Path) -> str:
    """The text of one document.

    Parameters
    ----------
    source : str or Path
        A file, or `-` for stdin.

    Raises
    ------
    PromptError
        When it cannot be read, or there is no text in it.
    ConfigError
        When the package that reads such a document is not installed.
    """
    try:
        raw = sys.stdin.buffer.read() if str(source) == STDIN else Path(source).read_bytes()
    except OSError as error:
        raise PromptError(
            f"cannot read the document {source}: {error.strerror or error}"
        ) from error
    return extract_text(raw, "stdin" if str(source) == STDIN else str(source))


def extract_text(raw: bytes, name: str) -> str:
    """The text in a document's bytes; as `read_document`.

    The end of `name` says what it is: `.pdf`, `.html`, `.md`, `.txt`. Where it says nothing, the
    content does.
    """
    match _KINDS.get(PurePath(name).suffix.lower()) or _kind_of(raw):
        case "pdf":
            text = _pdf_text(raw, name)
        case "html":
            text = _html_text(raw, name)
        case _:
            try:
                text = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise PromptError(f"the document {name} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise PromptError(f"the document {name} is empty; give one with text")
    return text


def read_documents(paths: list[Path], field: str = "text") -> str:
    """The text of several files, one after the other, a line break between them.

    Parameters
    ----------
    paths : list of Path
        `.jsonl` is one JSON object per line, all else as for `read_document`.
    field : str
        The field of the JSON objects that holds the text.

    Raises
    ------
    PromptError
        When a file cannot be read, with its name and, where it has lines, the line.
    ConfigError
        As `read_document`.
    """
    return "\n".join(
        "\n".join(_read_lines(path, field))
        if path.suffix.lower() in (".jsonl", ".ndjson")
        else read_document(path)
        for path in paths
    )


def _kind_of(raw: bytes) -> Kind:
    begin = raw[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith(b"%pdf-"):
        return "pdf"
    return "html" if begin.startswith((b"<!doctype html", b"<html")) else "text"


def _read_lines(path: Path, field: str) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise PromptError(f"{path}, line {number} is no JSON object with a field {field!r}")
        if not isinstance(record.get(field), str):
            raise PromptError(
                f"{path}, line {number} has no text in the field {field!r}; its fields are "
                f"{', '.join(sorted(record)) or 'none'}: name the one with the text by --field"
            )
        yield record[field]


def _html_text(raw: bytes, name: str) -> str:
    """What a browser would show, in lines; tables in columns, no scripts, no addresses of links."""
    try:
        import lxml.html
        from inscriptis.html_engine import Inscriptis
        from lxml import etree
    except ImportError as error:
        raise _not_installed(name, "inscriptis", "html") from error
    try:
        raw.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        # The document says its encoding itself.
        encoding = None
    try:
        tree = lxml.html.fromstring(raw, parser=lxml.html.HTMLParser(encoding=encoding))
    except (etree.ParserError, ValueError) as error:
        raise PromptError(f"{name} is not readable HTML: {error}") from error
    return str(Inscriptis(tree).get_text())


def _pdf_text(raw: bytes, name: str) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise _not_installed(name, "pypdf", "pdf") from error
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(raw)).pages]
    except (PyPdfError, ValueError, KeyError) as error:
        raise PromptError(f"{name} is not a readable PDF: {error}") from error
    text = "\n".join(pages)
    if not text.strip():
        raise PromptError(
            f"{name} has {len(pages)} page(s) and no text, as scans do; give a file with text"
        )
    return text


def _not_installed(name: str, package: str, extra: str) -> ConfigError:
    return ConfigError(
        f"reading {name} needs {package}: pip install 'homer-context[{extra}]', or give text"
    )
