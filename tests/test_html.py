"""`flatstep profile --html`: one file that draws itself, offline, for everyone who opens it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from playwright.sync_api import Browser, Locator, Page
from typer.testing import CliRunner

from flatstep.profiling.command import profile
from flatstep.profiling.measure import Timing
from flatstep.profiling.page import render
from flatstep.profiling.page.render import headline, missing, sections
from flatstep.profiling.results import (
    Bucket,
    Case,
    Limit,
    Machine,
    Overhead,
    Pass,
    Point,
    Report,
    Result,
    Sweep,
    Training,
    TrainingResult,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MACHINE = Machine("A CPU", 2, 2, "avx2", "0.1.0", "2.13.0", "Linux 6")
OURS = ("flatstep flat", "flatstep")
CHARTS = {
    *("updates", "roofline", "parameters-0-0", "parameters-0-1", "threads-0-0", "tensors-0-0"),
    *("buckets-0", "training", "passes", "parts"),
}
APP = typer.Typer()
APP.command()(profile)


def timing(seconds: float, noise: float = 0.02) -> Timing:
    low, high = seconds * (1 - noise), seconds * (1 + noise)
    return Timing(seconds, low, high, low, high, 20)


def race(parameters: int, seconds: float, torch: str = "torch fused") -> dict[str, Any]:
    moved = 28 * parameters
    results = []
    for name, factor in ((OURS[0], 1.0), (OURS[1], 1.1), (torch, 2.0)):
        taken = timing(factor * seconds)
        results.append(
            Result(
                name,
                pages="4 KiB",
                first_step=seconds,
                timing=taken,
                ns_per_parameter=taken.median / parameters * 1e9,
                gb_per_s=moved / taken.median / 1e9,
                of_limit=0.9 * seconds / taken.median,
                to_torch=factor / 2,
            )
        )
    limit = Limit("4 KiB", True, timing(0.9 * seconds), moved / (0.9 * seconds) / 1e9)
    return {"parameters": parameters, "bytes_moved": moved, "limits": [limit], "results": results}


def case(name: str = "gpt2", seconds: float = 1e-2, **more: Any) -> Case:
    return Case(
        workload=name,
        title=name,
        optimizer="adam",
        dtype="float32",
        tensors=3,
        states=2,
        **{**race(10**6, seconds), **more},
    )


def full() -> Report:
    """A report of everything that a page shows."""
    sweeps = [
        Sweep(axis, axis, "adam", "float32", [Point(x=x, **race(1000 * x, 1e-5 * x)) for x in xs])
        for axis, xs in {
            "parameters": (10**2, 10**5, 10**8),
            "threads": (1, 2),
            "tensors": (1, 10, 100),
        }.items()
    ]
    clip = Pass(
        name="clip",
        title="clip + AdamW",
        calls="clip_grad_norm_, AdamW",
        workload="gpt2",
        parts=[Result(call, timing=timing(1e-2)) for call in ("clip_grad_norm_", "AdamW")],
        **race(10**6, 1e-2, "torch"),
    )
    ways = [
        TrainingResult(way, None, *map(timing, (0.03, 0.01, 0.001, 0.041)), 1.0, timing(0.02))
        for way in ("torch fused", "flatstep", "flatstep, FlatBuffer")
    ]
    bucket = Bucket(smallest=1, largest=9, tensors=2, **race(18, 1e-6))
    return Report(
        MACHINE,
        cases=[case(buckets=[bucket]), case("mlp", 1e-4, parameters=10**4, bytes_moved=28 * 10**4)],
        passes=[clip],
        training=Training("GPT", 10**6, "adam", ways),
        sweeps=sweeps,
        overheads=[Overhead(name, "adam", 1e-6, 1e-8, 0.01) for name in (*OURS, "limit")],
        warnings=["the machine was busy"],
        seconds=12.0,
    )


# ---- the page in a browser


class Visit:
    """A page that is open, and what it asked for and complained of."""

    def __init__(self, browser: Browser, file: Path, report: Report):
        file.write_text(render(report), encoding="utf-8")
        self.address = file.as_uri()
        self.asked: list[str] = []
        self.broken: list[str] = []
        self.page = browser.new_page(color_scheme="light", offline=True)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.on("console", lambda message: self.broken.append(message.text))
        self.page.goto(self.address)

    def close(self) -> None:
        """Closes the page, which has kept to itself."""
        self.page.close()
        assert not self.broken
        assert self.asked == [self.address]


Open = Callable[[Report], Page]


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    visits: list[Visit] = []

    def open_it(report: Report) -> Page:
        visits.append(Visit(browser, tmp_path / "report.html", report))
        return visits[-1].page

    yield open_it
    for each in visits:
        each.close()


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of everything; each test leaves it as it finds it, but for its tables."""
    visit = Visit(browser, tmp_path_factory.mktemp("page") / "report.html", full())
    yield visit.page
    visit.close()


def test_every_chart_is_drawn_and_nothing_else_is_asked_for(page: Page):
    charts = page.locator(".chart").all()
    assert {chart.get_attribute("data-chart") for chart in charts} == CHARTS
    for chart in charts:
        assert chart.locator("svg.main-svg").count() > 0
        marks = "path.point, .point path, .js-line"
        assert chart.locator(marks).count() > 0, chart.get_attribute("id")
    assert page.locator(".legend").first.inner_text().split("\n")[0].endswith("flatstep flat")


INK = "getComputedStyle(document.querySelector('.ytick text')).fill"
GROUND = "getComputedStyle(document.body).backgroundColor"


def wait_until(page: Page, holds: str) -> None:
    """Waits for a condition; Playwright's own way evaluates text, which the page forbids."""
    until = time.monotonic() + 20
    while not page.evaluate(holds):
        assert time.monotonic() < until, holds
        page.wait_for_timeout(20)


def brightness(page: Page, color: str) -> int:
    return sum(map(int, re.findall(r"\d+", page.evaluate(color))[:3]))


def test_charts_follow_the_theme(page: Page):
    button = page.locator("#theme")
    light = brightness(page, INK) < 384 < brightness(page, GROUND)
    found = {}
    for _ in range(3):
        button.click()
        dark = brightness(page, GROUND) < 384 < brightness(page, INK)
        found[button.locator("span").inner_text()] = "dark" if dark else "light"
    assert light
    assert found == {"light": "light", "dark": "dark", "system": "light"}


def test_charts_follow_the_system_while_the_page_is_open(page: Page):
    before = page.evaluate(INK)
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"{INK} !== '{before}'")
    assert brightness(page, GROUND) < 384 < brightness(page, INK)
    page.emulate_media(color_scheme="light")
    wait_until(page, f"{INK} === '{before}'")


def unfold(part: Locator) -> None:
    """Opens the tables of a part of the page."""
    part.locator("details").evaluate_all("all => all.forEach(each => { each.open = true })")


def test_a_table_is_sorted_by_its_values_by_mouse_and_by_keyboard(page: Page):
    section = page.locator("#updates")
    unfold(section)
    header = section.locator("th", has_text=re.compile("^ms$"))
    place = header.evaluate("cell => cell.cellIndex")

    def values() -> list[float]:
        cells = section.locator(f"tbody td:nth-child({place + 1})")
        return [float(cell) for cell in cells.all_inner_texts()]

    before = values()
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(before) != before
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert values() == sorted(before, reverse=True)
    section.locator("th").first.locator("button").click()
    assert header.get_attribute("aria-sort") == "none"


def test_cells_without_a_value_stay_below(page: Page):
    section = page.locator("#updates")
    unfold(section)
    header = section.locator("th", has_text="÷ torch")
    place = header.evaluate("cell => cell.cellIndex")
    for _ in range(2):
        header.locator("button").click()
        cells = section.locator(f"tbody td:nth-child({place + 1})").all_inner_texts()
        assert [cell == "" for cell in cells] == sorted(cell == "" for cell in cells)
        assert "" in cells


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    unfold(page.locator("main"))
    wait_until(
        page,
        "[...document.querySelectorAll('.chart svg.main-svg')]"
        ".every(each => each.getBoundingClientRect().right <= innerWidth)",
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_names_are_text_and_never_markup(visit: Open):
    evil = "</script><img src=x onerror=\"document.title='owned'\"><a href='http://a.b'>%{y}</a>"
    report = full()
    report.warnings = [evil]
    report.cases = [case(evil, **race(10**6, 1e-2, evil))]
    report.cases[0].results[0].problem = evil
    for sweep in report.sweeps:
        sweep.title = evil
        for point in sweep.points:
            point.results[-1].implementation = evil
    report.passes[0].parts[0].implementation = evil
    assert report.training is not None
    report.training.results[0].way = evil
    page = visit(report)
    page.wait_for_timeout(200)
    assert "owned" not in page.title()
    assert page.locator("img").count() == 0
    assert page.locator("svg a, main a").count() == 0
    assert evil in page.locator(".note").last.inner_text()
    assert evil in page.locator(".legend").nth(1).inner_text()


def test_figures_of_an_earlier_version_make_a_page(visit: Open):
    values = json.loads((RESULTS / "cpu-amd-epyc-2.json").read_text())
    page = visit(Report.from_dict(values))
    assert page.locator("#chart-updates svg.main-svg").count() > 0
    assert page.locator(".note").count() == 1


# ---- the page as text


class Links(HTMLParser):
    """Collects what a page's tags refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [v or "" for name, v in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_refers_to_itself_alone():
    links = Links()
    text = render(full())
    links.feed(text)
    assert {link[:1] for link in links.found if link != "data:,"} == {"#"}
    assert "default-src 'none'" in text


def test_the_library_is_there_once():
    assert render(full()).count("plotly.js v") == 1


def test_what_was_not_measured_is_named_with_its_command():
    report = Report(MACHINE, cases=[case()])
    named = {title for title, _ in missing(report)}
    assert named == {"Sizes", "Threads", "Tensors", "Size classes", "The whole step", "Passes"}
    text = render(report)
    for _, command in missing(report):
        assert f"<code>{command}</code>" in text
    assert not missing(full())


def test_a_gpu_is_not_asked_for_what_only_the_cpu_has():
    machine = Machine(*["x", 1, 1, "x", "x", "x", "x"], device="cuda", gpu="A GPU")  # type: ignore[arg-type]
    named = {title for title, _ in missing(Report(machine))}
    assert named == {"Updates", "Sizes", "Tensors", "Size classes"}


def test_an_empty_report_makes_a_page():
    report = Report(MACHINE)
    assert sections(report) == []
    assert "What was measured on this machine" in render(report)


def test_the_headline_follows_from_the_figures():
    fast, slow = case("gpt2"), case("mlp")
    for result, share in zip(fast.results, (0.25, 0.5, 1.0), strict=True):
        result.timing, result.to_torch = timing(share), share
    for result in slow.results:
        result.timing, result.to_torch = timing(1.0), 1.0
    lines = headline(Report(MACHINE, cases=[fast, slow]))
    assert lines == [
        "flatstep's updates take 0% to 75% less time than torch's fastest",
        "the least is saved on mlp × adam, float32, the most on gpt2 × adam, float32; the "
        "geometric mean over 2 is 50% less",
        "no gain beyond the noise: mlp × adam, float32",
    ]
    slow.results[0].to_torch = slow.results[1].to_torch = 1.5
    slow.results[0].timing = slow.results[1].timing = timing(1.5)
    lines = headline(Report(MACHINE, cases=[fast, slow]))
    assert lines[0] == "flatstep's updates take 50% more to 75% less time than torch's fastest"


def test_what_went_wrong_stands_on_top():
    report = full()
    report.cases[0].results[0] = Result("flatstep flat", problem="wrong result: parameters")
    report.cases[1].refused = "needs 9 TB"
    report.interrupted = True
    text = render(report)
    start = text.index("<h1>")
    for said in ("wrong result: parameters", "Interrupted", "The machine was busy"):
        assert text.index(said) < start
    assert "refused: needs 9 TB" in text


# ---- the command


def invoke(*args: str) -> tuple[int, str]:
    environment = {"COLUMNS": "300", "NO_COLOR": "1"}
    result = CliRunner().invoke(APP, list(args), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_kept_figures_become_a_page(tmp_path: Path):
    kept, page = tmp_path / "a.json", tmp_path / "a.html"
    kept.write_text(json.dumps(full().as_dict()))
    code, _ = invoke("--load", str(kept), "--html", str(page))
    assert code == 0
    assert page.read_text(encoding="utf-8") == render(full())


def test_a_page_needs_a_directory():
    code, out = invoke("--html", "/no/such/report.html")
    assert code == 2
    assert "there is no directory /no/such" in out
