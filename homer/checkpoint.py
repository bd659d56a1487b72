"""The files of a checkpoint: which there are, and whether they are whole.

Reads sizes and headers, never weights: a truncated file is found in a moment, before memory is
taken. Knows nothing about models.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homer.errors import CheckpointError, ConfigError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILES = ("config.json", "adapter_config.json")
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
POLL_SECONDS = 1.0
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a checkpoint, and which weight lies in which.

    `of` maps each weight's name in the checkpoint to the place of its file in `files`.
    """

    files: tuple[Path, ...]
    of: dict[str, int]


def find_shards(folder: str | Path) -> Shards | None:
    """The safetensors files of a model folder; None where it is no folder or has other formats.

    Raises
    ------
    CheckpointError
        When a file is missing, truncated or damaged: which one, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if (folder / INDEX_FILE).is_file():
        return _indexed(folder)
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        return Shards((weights,), dict.fromkeys(_read_header(weights), 0))
    if not any(any(folder.glob(pattern)) for pattern in _OTHER_FORMATS):
        raise CheckpointError(
            f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}; copy them there, "
            "or name the folder that has them"
        )
    return None


def read_json(file: Path) -> dict[str, Any]:
    """An object out of a file of a checkpoint.

    Raises
    ------
    CheckpointError
        When the file has none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not valid JSON: {error}; copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, not an object of settings")
    return value


def check_generation_config(path_or_id: str | Path, revision: str | None = None) -> None:
    """Refuse a `generation_config.json` that cannot be used.

    transformers goes on without one that is no JSON: answers would not end where they should.

    Raises
    ------
    CheckpointError
    """
    folder = model_folder(path_or_id, revision)
    file = None if folder is None else folder / "generation_config.json"
    if file is None or not file.is_file():
        return
    ends = read_json(file).get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise CheckpointError(
            f"{file} has eos_token_id {ends!r}; write a token id, or a list of token ids"
        )


def model_folder(path_or_id: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a model or adapter: itself, or the snapshot of an id in the hub's cache.

    None where there is neither. Asks no hub.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    # Here, so that a folder needs nothing of it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in _CONFIG_FILES:
        try:
            file = try_to_load_from_cache(str(path_or_id), name, revision=revision)
        except HFValidationError:
            break
        if isinstance(file, str):
            return Path(file).parent
    return None


def check_can_write(file: Path) -> None:
    """Refuse a file that could not be written, before there is work to lose.

    Raises
    ------
    ConfigError
        When its folder is not there or may not be written to, or `file` is a folder itself.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}; make it")
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{file} cannot be written: {file.parent} is not yours to write to")


class FileWatch:
    """Takes stock of files, and tells when they are others.

    Parameters
    ----------
    model, *others : str or Path
        Folders, files, or ids, which are watched in the hub's cache.
    revision : str, optional
        The model's, where it is an id.
    """

    def __init__(self, model: str | Path, *others: str | Path, revision: str | None = None) -> None:
        self._places = [(model, revision), *((other, None) for other in others)]
        self._before = self._look()

    async def changed(self) -> None:
        """Returns when a file has come, gone, or has another size or time than at first."""
        while await asyncio.to_thread(self._look) == self._before:
            await asyncio.sleep(POLL_SECONDS)

    def _look(self) -> list[tuple[str, int, int]]:
        found = []
        for place, revision in self._places:
            path = Path(place)
            folder = None if path.is_file() else model_folder(place, revision)
            files = [path] if path.is_file() else sorted(folder.iterdir()) if folder else []
            for file in files:
                # It may go between two looks, and so does what a broken link is for.
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    found.append((str(file), stat.st_size, stat.st_mtime_ns))
        return found


def _indexed(folder: Path) -> Shards:
    index = folder / INDEX_FILE
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of a checkpoint ({error!r}); copy it there again"
        ) from error
    names = sorted(set(named.values()))
    places = {name: place for place, name in enumerate(names)}
    files = tuple(folder / name for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX_FILE} names: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; copy or download them "
            "again"
        )
    for file in files:
        held = set(_read_header(file))
        meant = {weight for weight, at in named.items() if at == file.name}
        if lacks := sorted(meant - held):
            raise CheckpointError(
                f"{file} lacks {len(lacks)} weights that {INDEX_FILE} says are in it, like "
                f"{lacks[0]}: its files are from different checkpoints; copy all of them again"
            )
    return Shards(files, {weight: places[file] for weight, file in named.items()})


def _read_header(file: Path) -> list[str]:
    """The names of a safetensors file's weights, where its size is what its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length:,} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file} ({size:,} bytes) is no safetensors file ({error}); a file that git LFS has "
            "not fetched, or an interrupted copy, looks so: copy or download it again"
        ) from error
    expected = 8 + length + end
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{file} is {kind}: it has {size:,} bytes, and its header says {expected:,}; copy or "
            "download it again"
        )
    return list(header)
