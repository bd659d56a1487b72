"""Text out of files: plain text, JSON lines, PDF.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from homer.errors import ConfigError, PromptError


def read_documents(paths: list[Path], field: str = "text") -> str:
    """The text of several files, one after the other, a line break between them.

    Parameters
    ----------
    paths : list of Path
        `.jsonl` is one JSON object per line, `.pdf` a PDF with text in it, all else UTF-8 text.
    field : str
        The field of the JSON objects that holds the text.

    Raises
    ------
    PromptError
        When a file cannot be read, with its name and, where it has lines, the line.
    ConfigError
        When PDFs cannot be read here.
    """
    return "\n".join(_read(path, field) for path in paths)


def _read(path: Path, field: str) -> str:
    try:
        match path.suffix.lower():
            case ".pdf":
                return _read_pdf(path)
            case ".jsonl" | ".ndjson":
                return "\n".join(_read_lines(path, field))
            case _:
                return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}") from error


def _read_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
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


def _read_pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs pypdf: pip install 'homer-context[pdf]', or give text"
        ) from error
    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except (PyPdfError, ValueError, KeyError) as error:
        raise PromptError(f"{path} is not a readable PDF: {error}") from error
    text = "\n".join(pages)
    if not text.strip():
        raise PromptError(
            f"{path} has {len(pages)} page(s) and no text, as scans do; give a file with text"
        )
    return text
