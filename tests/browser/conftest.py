"""A Chromium of the system's, and the shop's UI with its daemon, both for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import djp_dagster as djp
from tests.browser.visitor import Visitor
from tests.conftest import REPOSITORY, _skip_unless
from tests.servers.dagster_ui import DagsterUi, group_members

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

_CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE_MS = 30_000


@pytest.fixture(scope="package")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """The system's Chromium, with a profile of its own; Playwright downloads none.

    For this folder only: while it lasts, an event loop runs in the thread of the tests.
    """
    path = next(filter(None, map(shutil.which, _CHROMIUMS)), None)
    if path is None:
        _skip_unless("DJP_REQUIRE_BROWSER", f"no Chromium found: none of {', '.join(_CHROMIUMS)}")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=path,
            headless=True,
            args=_FLAGS,
            viewport={"width": 1600, "height": 1000},
        )
        context.set_default_timeout(_PATIENCE_MS)
        yield context
        context.close()


@pytest.fixture(scope="package")
def ui(chromium: BrowserContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterUi]:
    """The shop of `definitions.py` with webserver and daemon; its sensors and schedules are off.

    Its stream is a file of the test's, named by `stream_url`. Only the minute hand beside it is on.
    """
    home = tmp_path_factory.mktemp("dagster_home")
    definitions = (REPOSITORY / "workspace.yaml", Path(__file__).with_name("metronome.yaml"))
    with DagsterUi(home, *definitions, environment={"DJP_STREAM_URL": stream_url(home)}) as ui:
        ui.switch_all_off()
        ui.start_daemon()
        ui.switch_on(ui.automations()["minute_hand"])  # a minute is long: it passes while other tests run
        groups = ui.groups
        yield ui
    assert [group_members(group) for group in groups] == [[], []]


def stream_url(home: Path) -> str:
    """The stream beside a DAGSTER_HOME."""
    return f"sqlite:///{home / 'stream.db'}"


@pytest.fixture(scope="package")
def stream(ui: DagsterUi) -> Iterator[djp.EventStream]:
    """The stream of the shop."""
    with djp.open_stream(stream_url(ui.home)) as stream:
        yield stream


@pytest.fixture
def visitor(chromium: BrowserContext, ui: DagsterUi, tmp_path: Path) -> Iterator[Visitor]:
    """A page of its own for each test. If the test fails, its picture and its console are kept and named."""
    page = chromium.new_page()
    yield Visitor(page, ui.url, tmp_path)
    page.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Name the evidence below the failure; the fixtures are still there."""
    report = yield
    visitor = getattr(item, "funcargs", {}).get("visitor")
    if report.failed and report.when == "call" and isinstance(visitor, Visitor):
        report.longrepr.addsection("browser", visitor.evidence())
    return report
