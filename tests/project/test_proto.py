"""`proto/` keeps buf's STANDARD rules, and says of each message, enum and call what it is.

By buf itself where npm can bring it; the same rules on protoc's descriptors, always.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2 as descriptors

from tests.node_tools import node_folder

PROTO = Path(__file__).parents[2] / "proto"
PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Both calls that stream tensors stream the same frames; buf.yaml excepts them too.
SHARED_RESPONSES = {"TensorFrame"}

# Field numbers in FileDescriptorProto, which name places in a file.
MESSAGE, ENUM, SERVICE = 4, 5, 6
NESTED_MESSAGE, NESTED_ENUM, METHOD = 3, 4, 2


def described(folder: Path, out: Path) -> descriptors.FileDescriptorSet:
    files = [str(path) for path in sorted(folder.rglob("*.proto"))]
    assert files
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_source_info"]
    done = subprocess.run(
        [*command, f"--descriptor_set_out={out}", *files], capture_output=True, text=True
    )
    # It warns of imports that nothing needs.
    assert (done.returncode, done.stderr) == (0, "")
    return descriptors.FileDescriptorSet.FromString(out.read_bytes())


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def problems(file: descriptors.FileDescriptorProto) -> Iterator[str]:
    """What buf's rules find wrong with a file."""
    commented = {
        tuple(place.path) for place in file.source_code_info.location if place.leading_comments
    }
    if not SNAKE.fullmatch(Path(file.name).stem):
        yield f"file {file.name}"
    if file.package.replace(".", "/") != str(Path(file.name).parent):
        yield f"folder of package {file.package}"
    if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*\.v\d+", file.package):
        yield f"package {file.package} has no version"
    if file.syntax != "proto3":
        yield "syntax"
    if file.public_dependency or file.weak_dependency:
        yield "import"
    for at, message in enumerate(file.message_type):
        yield from message_problems(message, (MESSAGE, at), commented)
    for at, enum in enumerate(file.enum_type):
        yield from enum_problems(enum, (ENUM, at), commented)
    for at, service in enumerate(file.service):
        if (SERVICE, at) not in commented:
            yield f"no comment: {service.name}"
        for number, method in enumerate(service.method):
            if (SERVICE, at, METHOD, number) not in commented:
                yield f"no comment: {method.name}"
            yield from method_problems(method)
        types = Counter(
            kind.rpartition(".")[2]
            for m in service.method
            for kind in (m.input_type, m.output_type)
        )
        for name, uses in types.items():
            if uses > 1 and name not in SHARED_RESPONSES:
                yield f"used {uses} times: {name}"


def method_problems(method: descriptors.MethodDescriptorProto) -> Iterator[str]:
    if not PASCAL.fullmatch(method.name):
        yield f"call {method.name}"
    for kind, name in ((method.input_type, "Request"), (method.output_type, "Response")):
        short = kind.rpartition(".")[2]
        if short != method.name + name and short not in SHARED_RESPONSES:
            yield f"{method.name} has {short}"


def message_problems(
    message: descriptors.DescriptorProto, path: tuple[int, ...], commented: set[tuple[int, ...]]
) -> Iterator[str]:
    if not PASCAL.fullmatch(message.name):
        yield f"message {message.name}"
    if path not in commented and not message.options.map_entry:
        yield f"no comment: {message.name}"
    optionals = {field.oneof_index for field in message.field if field.proto3_optional}
    oneofs = [one for at, one in enumerate(message.oneof_decl) if at not in optionals]
    for name in (*(one.name for one in message.field), *(one.name for one in oneofs)):
        if not SNAKE.fullmatch(name):
            yield f"field {message.name}.{name}"
    for at, nested in enumerate(message.nested_type):
        yield from message_problems(nested, (*path, NESTED_MESSAGE, at), commented)
    for at, enum in enumerate(message.enum_type):
        yield from enum_problems(enum, (*path, NESTED_ENUM, at), commented)


def enum_problems(
    enum: descriptors.EnumDescriptorProto, path: tuple[int, ...], commented: set[tuple[int, ...]]
) -> Iterator[str]:
    prefix = upper_snake(enum.name) + "_"
    if not PASCAL.fullmatch(enum.name) or enum.options.allow_alias:
        yield f"enum {enum.name}"
    if path not in commented:
        yield f"no comment: {enum.name}"
    if (enum.value[0].number, enum.value[0].name) != (0, prefix + "UNSPECIFIED"):
        yield f"zero of {enum.name}"
    for value in enum.value:
        if not value.name.startswith(prefix) or value.name != value.name.upper():
            yield f"value {value.name}"


def test_the_rules_hold(tmp_path: Path) -> None:
    files = described(PROTO, tmp_path / "set").file
    assert {file.name: list(problems(file)) for file in files} == {file.name: [] for file in files}


def test_each_rule_finds_what_breaks_it(tmp_path: Path) -> None:
    (tmp_path / "Wrong.proto").write_text(
        'syntax = "proto3";\npackage some.where;\n'
        "message bad_name { string camelCase = 1; oneof Or { int32 a = 2; } }\n"
        "// Said.\nenum Colour { RED = 0; COLOUR_blue = 1; }\n"
        "service Thing { rpc get(bad_name) returns (bad_name); }\n"
    )
    (file,) = described(tmp_path, tmp_path / "set").file
    assert set(problems(file)) == {
        "file Wrong.proto",
        "folder of package some.where",
        "package some.where has no version",
        "message bad_name",
        "no comment: bad_name",
        "field bad_name.camelCase",
        "field bad_name.Or",
        "zero of Colour",
        "value RED",
        "value COLOUR_blue",
        "no comment: Thing",
        "no comment: get",
        "call get",
        "get has bad_name",
        "used 2 times: bad_name",
    }


def test_buf_finds_nothing() -> None:
    buf = node_folder() / "node_modules" / ".bin" / "buf"
    done = subprocess.run([buf, "lint"], cwd=PROTO, capture_output=True, text=True, timeout=60)
    if "not find" in done.stderr or done.returncode not in (0, 100):
        pytest.fail(done.stderr)
    assert done.stdout == ""
