"""A batch from its input to its results. Knows nothing about terminals or Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from cluster.async_client import AsyncHomerClient
from cluster.batch.asking import Asker
from cluster.batch.documents import DocumentReader, open_raw, reason
from cluster.batch.gate import Gate
from cluster.batch.lines import Key, Line, Question, read_lines
from cluster.batch.options import BatchOptions
from cluster.batch.records import RecordFile, failed
from cluster.http.asking import Served
from cluster.http.errors import HttpError
from homer.errors import ConfigError


@dataclass
class Counts:
    """Lines, by what became of them; `before` were answered by an earlier run."""

    lines: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        return self.lines - self.before - self.answered - self.failed


class BatchView(Protocol):
    """Is told how a batch goes."""

    def began(self, counts: Counts) -> None: ...

    def went_on(self, counts: Counts) -> None: ...

    def problem(self, line: Line, error: HttpError) -> None: ...

    def note(self, text: str) -> None: ...


class Batch:
    """One run of a batch; a context manager that has its files.

    Attributes
    ----------
    counts : Counts

    Raises
    ------
    ConfigError
        When one of the files cannot be used.
    """

    def __init__(self, options: BatchOptions, view: BatchView) -> None:
        self.counts = Counts()
        self._options = options
        self._view = view
        self._pending: set[int] = set()
        self._openai = False
        self._stack = ExitStack()
        with self._stack:
            self._results = self._stack.enter_context(RecordFile(options.output))
            self._errors = self._stack.enter_context(RecordFile(options.errors))
            # Lines that failed are asked again.
            self._errors.clear()
            self._check()
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if not self.counts.failed:
            self._options.errors.unlink(missing_ok=True)

    def _check(self) -> None:
        """Look at every line before the first is asked: mistakes are told now, not after hours."""
        seen: set[Key] = set()
        for line in self._lines():
            self.counts.lines += 1
            if line.key in seen:
                again = f"custom_id {line.custom_id!r} is that of a line above; each needs its own"
                self._fail(line, HttpError(400, again, param="custom_id"))
                continue
            seen.add(line.key)
            if isinstance(line.asks, HttpError):
                self._fail(line, line.asks)
            elif line.key in self._results.keys:
                self.counts.before += 1
            else:
                self._pending.add(line.number)
                self._openai |= not isinstance(line.asks, Question)
        if not self.counts.lines:
            raise ConfigError(f"{self._options.input} has no lines; write a question on each")
        if others := len(self._results.keys - seen):
            self._view.note(
                f"{self._options.output} has {others} result(s) of lines that are not in "
                f"{self._options.input}, or not any more; they stay"
            )

    async def run(self, client: AsyncHomerClient) -> None:
        """Ask all lines that have no result yet.

        Raises
        ------
        HomerError
            When there is no use in asking the lines that are left.
        """
        options = self._options
        self._view.began(self.counts)
        if not self._pending:
            return
        info = await client.server_info()
        served = None
        if self._openai:
            served = await asyncio.to_thread(Served.of, info, options.model_name, options.tokenizer)
        asker = Asker(
            client,
            served,
            DocumentReader(options.input, options.concurrency),
            Gate(options.concurrency),
            priority=options.priority,
            retries=options.retries,
            note=self._view.note,
        )
        lines = (line for line in self._lines() if line.number in self._pending)
        reading = asyncio.Lock()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(options.concurrency, len(self._pending))):
                    tasks.create_task(self._work(asker, lines, reading))
        except ExceptionGroup as group:
            # The first cancelled the others.
            raise group.exceptions[0] from None

    async def _work(self, asker: Asker, lines: Iterator[Line], reading: asyncio.Lock) -> None:
        while True:
            async with reading:
                line = await asyncio.to_thread(next, lines, None)
            if line is None:
                return
            try:
                record = await asker.ask(line)
            except HttpError as error:
                self._fail(line, error)
            else:
                self._results.append(line.key, record)
                self.counts.answered += 1
            self._view.went_on(self.counts)

    def _fail(self, line: Line, error: HttpError) -> None:
        self._errors.append(line.key, failed(line, error))
        self.counts.failed += 1
        self._view.problem(line, error)

    def _lines(self) -> Iterator[Line]:
        try:
            with open_raw(self._options.input) as file:
                yield from read_lines(file)
        except Exception as error:
            raise ConfigError(f"cannot read {self._options.input}: {reason(error)}") from error
