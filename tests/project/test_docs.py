"""The documents say what is there: every module in the structure page, every link to a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("room", ["homer", "workers", "cluster"])
def test_the_structure_page_names_every_module_and_no_other(room: str) -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    section = page.split(f"\n`{room}/`:")[1].split("\n`")[0]
    named = set(re.findall(r"`(\w+\.py)`", section))
    modules = {file.name for file in (ROOT / room).glob("*.py")} - {"__init__.py"}
    assert named == modules


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
