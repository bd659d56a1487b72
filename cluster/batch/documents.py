"""Documents of a batch's lines: files, or whatever fsspec opens.

They are read here, with the rights of whoever runs the batch, and never on the service. Knows
nothing about questions.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import fsspec

from homer.documents import extract_text
from homer.errors import PromptError


def open_raw(address: str) -> Any:
    """A context manager that gives a file to read bytes from."""
    return fsspec.open(address, "rb")


def reason(error: Exception) -> str:
    """Why something could not be read. Each file system of fsspec has errors of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def read_document(address: str) -> str:
    """The text of the document at a path or a URI.

    Raises
    ------
    PromptError, ConfigError
        When it cannot be read, or has no text.
    """
    try:
        with open_raw(address) as file:
            raw = file.read()
    except Exception as error:
        raise PromptError(f"cannot read the document {address}: {reason(error)}") from error
    return extract_text(raw, address)


class DocumentReader:
    """Reads documents in threads. Lines that follow each other and name one document share it.

    Parameters
    ----------
    beside : str
        The file beside which relative paths begin: a path or a URI.
    kept : int
        So many documents stay in memory.
    """

    def __init__(self, beside: str, kept: int) -> None:
        folder, slash, _ = beside.rpartition("/")
        self._folder = folder + slash
        self._kept = kept
        self._read: OrderedDict[str, asyncio.Task[str]] = OrderedDict()

    async def text(self, address: str) -> str:
        """The text of one document; as `read_document`."""
        # fsspec's own forms have one of these: s3://…, zip://part.txt::archive.zip
        if "://" not in address and "::" not in address and not address.startswith("/"):
            address = self._folder + address
        task = self._read.pop(address, None)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(read_document, address))
        self._read[address] = task
        while len(self._read) > self._kept:
            self._read.popitem(last=False)
        # Who is cancelled leaves the document to others.
        return await asyncio.shield(task)
