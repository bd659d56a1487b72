"""What MkDocs does not do by itself: the README as front page, the references, links to sources.

Pages keep the links that work in the checkout; those that leave `docs/` are turned here.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from proto_reference import proto_reference

ROOT = Path(__file__).parents[2]
# Pages of the site that lie elsewhere in the checkout.
ELSEWHERE = {"index.md": "README.md", "deploy.md": "deploy/README.md"}
PROTO_PAGE, PYTHON_PAGE = "reference-grpc.md", "reference-python.md"
SECTIONS = {
    "Start": ["getting-started", "own-model"],
    "Ask": ["cli", "http", "page", "grpc", "batch"],
    "Models": ["families", "loading", "parallel", "demo-model"],
    "Run it": ["cluster", "kubernetes", "deploy", "operations", "security"],
    "Look after it": ["seeing", "troubleshooting"],
    "Reference": ["reference-python", "reference-grpc"],
    "Inside": ["structure", "benchmarks", "log"],
}
PYTHON = {
    "In one process": [
        "homer.HomerConfig",
        "homer.HomerModel",
        "homer.CompressedContext",
        "homer.MergePlan",
    ],
    "Against a service": ["cluster.client.HomerClient", "cluster.async_client.AsyncHomerClient"],
    "A service from a program": ["cluster.options.ServeOptions", "cluster.launch.running_service"],
    "Errors": ["homer.errors", "cluster.errors"],
}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page that is there is in the navigation; one that is new comes last."""
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
    pages |= {Path(name).stem for name in (*ELSEWHERE, PROTO_PAGE, PYTHON_PAGE)} - {"index"}
    nav: list[Any] = ["index.md"]
    for title, names in SECTIONS.items():
        nav.append({title: [f"{name}.md" for name in names if name in pages]})
        pages -= set(names)
    if pages:
        nav.append({"Further": [f"{name}.md" for name in sorted(pages)]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and the sources that pages link to."""
    for page, source in ELSEWHERE.items():
        files.append(_page(config, page, (ROOT / source).read_text(encoding="utf-8")))
    files.append(_page(config, PROTO_PAGE, proto_reference(ROOT / "proto")))
    files.append(_page(config, PYTHON_PAGE, _python_reference()))
    for source in sorted({s for file in files for s in _sources(file)}):
        files.append(File.generated(config, f"source/{source}", abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them."""
    here = page.file.src_uri
    return LINK.sub(lambda link: _target(here, link[0]), markdown)


def _page(config: MkDocsConfig, name: str, text: str) -> File:
    return File.generated(config, name, content=text)


def _sources(file: File) -> set[str]:
    """Files outside the pages to which a page links."""
    if not file.is_documentation_page():
        return set()
    links = LINK.findall(file.content_string)
    targets = {_target(file.src_uri, link) for link in links}
    return {target.removeprefix("source/") for target in targets if target.startswith("source/")}


def _target(page: str, link: str) -> str:
    """A link of a page, which lies at the site's top, as seen from there."""
    folder = posixpath.dirname(ELSEWHERE.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(folder, link))
    for name, source in ELSEWHERE.items():
        if path == source:
            return name
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if (ROOT / path).is_file() else link


def _python_reference() -> str:
    parts = ["# Python\n"]
    for title, names in PYTHON.items():
        parts.append(f"# {title}\n")
        parts += [f"::: {name}\n" for name in names]
    return "\n".join(parts)
