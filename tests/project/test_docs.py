"""The documents say what is there: every module, every link, every option of a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import convert_args_to_dict
from ray.serve.scripts import run as serve_run

from cluster.serve import DoorArgs, build_app
from tests.deploy.commands import HOMER
from workers.__main__ import parse_options

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# A block for a shell, or a command that is indented.
SHELL = re.compile(
    r"^ *```(?:sh|console)\n((?s:.*?))^ *```|^    ((?:homer|python) (?:.*\\\n)*.*\n)", re.MULTILINE
)


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page, as words; of those that run another, the other."""
    for fenced, indented in SHELL.findall(page.read_text(encoding="utf-8")):
        for line in (fenced or indented).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["ray", "exec"]:
                words = shlex.split(words[-1])
            elif "--" in words:
                words = words[words.index("--") + 1 :]
            while words and (words[0] == "$" or "=" in words[0]):
                del words[0]
            ends = [at for at, word in enumerate(words) if word in ("<", ">", "|", "&")]
            if words:
                # What the reader puts a number for.
                numbers = ["1" if word == "N" else word for word in words]
                yield [Path(words[0]).name, *numbers[1 : min(ends, default=None)]]


def parse(words: list[str]) -> bool:
    """Have a command line read by its program, which runs nothing; whether it is one of ours."""
    match words:
        case ["homer", *arguments]:
            command = HOMER
            while hasattr(command, "commands"):
                name, *arguments = arguments
                command = command.commands[name]
            command.make_context(words[1], arguments)
        case ["python", "-m", "workers", *arguments]:
            parse_options(arguments)
        case ["serve", "run", *arguments]:
            asked = serve_run.make_context("run", arguments).params
            application: dict[str, Any] = {
                "import_path": asked["config_or_import_path"],
                "args": convert_args_to_dict(asked["arguments"]),
            }
            if (ROOT / application["import_path"]).exists():
                file = yaml.safe_load((ROOT / application["import_path"]).read_text("utf-8"))
                (deployed,) = ServeDeploySchema(**file).applications
                application = deployed.model_dump()
            assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
            door = DoorArgs(**application["args"])
            assert door.service or door.options().model
        case _:
            return False
    return True


@pytest.mark.parametrize("room", ["homer", "workers", "cluster"])
def test_the_structure_page_names_every_module_and_no_other(room: str) -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    section = page.split(f"\n`{room}/`:")[1].split("\n`")[0]
    named = re.findall(r"`(\w+\.py)`", section)
    modules = {file.name for file in (ROOT / room).glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_that_the_documents_name_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8")))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_are_what_their_programs_take(page: Path) -> None:
    ours = [words for words in commands(page) if parse(words)]
    # A page that names a program in a block has at least one command that was found.
    blocks = "".join("".join(found) for found in SHELL.findall(page.read_text(encoding="utf-8")))
    assert bool(ours) == bool(re.search(r"\b(homer|serve run|-m workers) ", blocks))


def test_a_command_that_no_program_takes_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["homer", "serve", "--model", "m", "--wrokers", "2"])
    with pytest.raises(ValueError, match="wrokers"):
        parse(["serve", "run", "cluster.serve:build_app", "model=m", "wrokers=2"])
