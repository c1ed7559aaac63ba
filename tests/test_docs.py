"""The site of documentation: all is in it, its links lead somewhere, and it is for everyone."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Browser, Page
from typer.main import get_command

import flatstep
from flatstep.cli import application

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SPHINX = ("sphinx", "myst_parser", "furo", "sphinx_copybutton")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as tools/docs.sh builds it: without a warning."""
    for package in SPHINX:
        pytest.importorskip(package)
    built = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [ROOT / "tools" / "docs.sh", built], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == built / "index.html"
    return built


def entries(site: Path) -> set[tuple[str, str]]:
    """What the site can be asked for: names and their kinds."""
    listed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(listed).decode().splitlines()
    return {(name, kind) for name, kind in (re.findall(r"(.+?) (\S+:\S+) ", x)[0] for x in lines)}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    documented = {id(found) for name, kind in entries(site) if (found := resolve(name, kind))}
    for name in ("", ".functional", ".profiling", ".recording", ".testing"):
        module = importlib.import_module(f"flatstep{name}")
        missing = [each for each in module.__all__ if id(getattr(module, each)) not in documented]
        assert not missing, module.__name__
    for name, found in inspect.getmembers(flatstep.reference, inspect.isfunction):
        if found.__module__ == "flatstep.reference" and not name.startswith("_"):
            assert id(found) in documented, name


def resolve(name: str, kind: str) -> Any:
    """What a Python name of the site's stands for."""
    if not kind.startswith("py:"):
        return None
    owner: Any = flatstep
    for part in name.split(".")[1:]:
        if isinstance(owner, ModuleType) and not hasattr(owner, part):
            importlib.import_module(f"{owner.__name__}.{part}")
        owner = getattr(owner, part, None)
    return owner


def test_every_option_of_every_command_is_in_the_reference(site: Path) -> None:
    found = {name for name, kind in entries(site) if kind == "std:cmdoption"}
    for name, command in get_command(application()).commands.items():
        for option in command.params:
            for each in (*option.opts, *option.secondary_opts):
                if each.startswith("-"):
                    assert f"flatstep-{name}.{each}" in found


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A site of one page, and a repository of one file."""
    pytest.importorskip("myst_parser")
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "_ext", docs / "_ext")
    (docs / "conf.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(docs / '_ext')!r})\n"
        "extensions = ['myst_parser', 'repository_links']\n"
        "myst_heading_anchors = 2\n"
        "repository = 'https://there'\n"
    )
    (tmp_path / "there.md").write_text("# There\n\n## It is\n")
    return docs


def build(docs: Path, text: str) -> subprocess.CompletedProcess[str]:
    (docs / "index.md").write_text(f"# Here\n\n{text}\n")
    command = [sys.executable, "-m", "sphinx", "-qW", docs, docs.parent / "site"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_link_out_of_the_docs_leads_to_the_repository(words: Path) -> None:
    done = build(words, "[it](../there.md#it-is) [all](..) [here](#here)")
    assert done.returncode == 0, done.stderr
    page = (words.parent / "site" / "index.html").read_text()
    assert 'href="https://there/blob/main/there.md#it-is"' in page
    assert 'href="https://there/tree/main/."' in page


def test_links_that_lead_nowhere_fail_the_build(words: Path) -> None:
    links = ("../gone.py", "../there.md#gone-1", "gone.md", "index.md#gone-2", "#gone-3")
    done = build(words, " ".join(f"[it]({link})" for link in links))
    assert done.returncode != 0
    for name in ("gone.py", "gone-1", "gone.md", "gone-2", "gone-3"):
        assert name in done.stderr


def test_the_links_of_the_texts_outside_lead_somewhere() -> None:
    pytest.importorskip("myst_parser")
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        from repository_links import anchors
    finally:
        sys.path.pop(0)
    for text in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")):
        for link in links(text.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = text.parent / path if path else text
            assert target.exists(), f"{text.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{text.name}: {link}"


def links(text: str) -> Iterator[str]:
    """The relative links of a text."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or []:
            address = str(child.attrGet("href") or child.attrGet("src") or "")
            if address and ":" not in address:
                yield address


# ---- the site in a browser


class Visitor:
    """Opens pages, and notes what they ask for and complain of."""

    def __init__(self, browser: Browser, width: int, scheme: Any):
        self.asked: list[str] = []
        self.broken: list[str] = []
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.on("console", lambda message: self.broken.append(message.text))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_the_screen_and_asks_nobody(
    site: Path, browser: Browser, width: int, scheme: str
) -> None:
    visitor = Visitor(browser, width, scheme)
    wide = []
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        visitor.page.goto(page.as_uri())
        if visitor.page.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(page.name)
    visitor.page.close()
    assert wide == []
    assert visitor.broken == []
    assert {url for url in visitor.asked if not url.startswith(("file:", "data:"))} == set()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_search_finds_an_option_without_a_server(
    site: Path, browser: Browser, width: int
) -> None:
    page = Visitor(browser, width, "light").page
    page.goto((site / "index.html").as_uri())
    if width < 1000:
        page.locator(".nav-overlay-icon").click()
    page.locator(".sidebar-search").fill("max_grad_norm")
    page.locator(".sidebar-search").press("Enter")
    for address in ("precision.html", "flatstep.Extras.max_grad_norm"):
        # The results come one after the other; what never comes is an error, after a while.
        page.locator(f"#search-results li a[href*='{address}']").first.wait_for()
    page.close()
