"""The reference of the gRPC API: services, messages and enums of `proto/`, with their comments."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

# Where descriptors keep what: numbers of fields in descriptor.proto.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _MESSAGE_NESTED, _MESSAGE_ENUM = 2, 3, 4
_MEMBER = 2


def read_protos(folder: Path) -> FileDescriptorSet:
    """All files below `folder`, with their comments."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "set"
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}"),
                *("--include_source_info", f"--descriptor_set_out={out}", *files),
            ],
            check=True,
        )
        return FileDescriptorSet.FromString(out.read_bytes())


def proto_reference(folder: Path) -> str:
    """The page, in Markdown."""
    lines = [
        "# gRPC",
        "",
        "Made from the comments of the `.proto` files. How to call it is in [gRPC](grpc.md)."
        if (folder.parent / "docs" / "grpc.md").exists()
        else "Made from the comments of the `.proto` files.",
        "",
    ]
    # What users call comes before what workers say to each other.
    files = sorted(read_protos(folder).file, key=lambda file: "long_context" not in file.name)
    for file in files:
        lines += [f"## {file.name}", ""]
        lines += _File(file).lines()
    return "\n".join(lines)


class _File:
    def __init__(self, file: Any) -> None:
        self._file = file
        self._comments = {
            tuple(one.path): (one.leading_comments or one.trailing_comments).strip()
            for one in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        for number, service in enumerate(self._file.service):
            path = (_FILE_SERVICE, number)
            yield from self._heading("service", service.name, path)
            yield from ("| method | takes | gives | |", "| --- | --- | --- | --- |")
            for index, method in enumerate(service.method):
                takes = _arrow(method.input_type, method.client_streaming)
                gives = _arrow(method.output_type, method.server_streaming)
                text = self._comment((*path, _MEMBER, index), in_table=True)
                yield f"| `{method.name}` | {takes} | {gives} | {text} |"
            yield ""
        for number, message in enumerate(self._file.message_type):
            yield from self._message(message, (_FILE_MESSAGE, number), "")
        for number, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (_FILE_ENUM, number), "")

    def _message(self, message: Any, path: tuple[int, ...], outer: str) -> Iterator[str]:
        name = outer + message.name
        yield from self._heading("message", name, path)
        if message.field:
            yield from ("| field | number | type | |", "| --- | ---: | --- | --- |")
        entries = {
            f".{self._file.package}.{name}.{one.name}": one
            for one in message.nested_type
            if one.options.map_entry
        }
        for index, field in enumerate(message.field):
            text = self._comment((*path, _MESSAGE_FIELD, index), in_table=True)
            if field.HasField("oneof_index") and not field.proto3_optional:
                choice = message.oneof_decl[field.oneof_index].name
                text = f"One of `{choice}`. {text}".strip()
            kind = _kind(field, entries)
            yield f"| `{field.name}` | {field.number} | {kind} | {text} |"
        yield ""
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._message(nested, (*path, _MESSAGE_NESTED, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, _MESSAGE_ENUM, index), f"{name}.")

    def _enum(self, enum: Any, path: tuple[int, ...], outer: str) -> Iterator[str]:
        yield from self._heading("enum", outer + enum.name, path)
        yield from ("| value | number | |", "| --- | ---: | --- |")
        for index, value in enumerate(enum.value):
            text = self._comment((*path, _MEMBER, index), in_table=True)
            yield f"| `{value.name}` | {value.number} | {text} |"
        yield ""

    def _heading(self, kind: str, name: str, path: tuple[int, ...]) -> Iterator[str]:
        yield f"### {kind} {name}"
        yield ""
        yield self._comment(path)
        yield ""

    def _comment(self, path: tuple[int, ...], in_table: bool = False) -> str:
        text = self._comments.get(path, "")
        if in_table:
            text = " ".join(text.split()).replace("|", "\\|")
        # Comments are text, not HTML.
        return text.replace("<", "&lt;")


def _arrow(type_name: str, streaming: bool) -> str:
    return f"{'stream of ' if streaming else ''}`{type_name.rpartition('.')[2]}`"


def _kind(field: Any, entries: dict[str, Any]) -> str:
    if field.type_name in entries:
        key, value = entries[field.type_name].field
        return f"map of {_kind(key, {})} to {_kind(value, {})}"
    if field.type_name:
        name = f"`{field.type_name.split('.', 4)[-1]}`"
    else:
        name = f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name
