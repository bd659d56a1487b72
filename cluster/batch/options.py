"""Settings of a batch; the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from homer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What is asked, and where the answers go.

    Parameters
    ----------
    input : str
        A path, or a URI that fsspec opens.
    output, errors : Path
        Answers, and lines that have none; the last of an earlier run that did not come to its end.
    concurrency : int
        Lines that are asked at once, while the service takes as many.
    priority : int
        Of lines that name none.
    retries : int
        How often a line is asked again when workers or the service were lost under it.
    model_name, tokenizer : str
        As for `Served.of`; for lines in OpenAI's format.
    """

    input: str
    output: Path
    errors: Path
    concurrency: int = 8
    priority: int = -1
    retries: int = 5
    model_name: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        files = [Path(self.input).resolve(), self.output.resolve(), self.errors.resolve()]
        if len(set(files)) < len(files):
            raise ConfigError("input, output and errors are not three files; name one for each")
