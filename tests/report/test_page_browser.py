"""The page of `lowrank report` in a real browser: Chromium, by its own driver, with no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.summary.build import build_page
from lowrank_kit.summary.find import find_documents
from tests.results import DENSE, EXPERIMENT, make_results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no Chromium with its chromedriver is installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
wait = pytest.importorskip("selenium.webdriver.support.wait")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("page")
    file = top / "report.html"
    file.write_text(build_page(find_documents([make_results(top)]), "Results <of> & all"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """The page just opened, as wide as a desk's screen."""
    _wide(browser, 1280)
    browser.get("about:blank")
    _open(browser, page)
    return browser


def _open(browser: Any, page: Path) -> None:
    """All of it: on a slow machine the driver is done before the page is read to its end."""
    browser.get(page.as_uri())
    whole = "return document.readyState === 'complete' && location.href === arguments[0]"
    wait.WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(whole, page.as_uri()))


def _wide(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_nothing_is_asked_for_and_nothing_is_complained_of(browser: Any, page: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    _open(browser, page)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert browser.get_log("browser") == []


def test_the_policy_forbids_what_is_not_in_the_page(opened: Any) -> None:
    """A script and a picture put in afterwards do not come to life."""
    code = """
        const done = arguments[0];
        const script = document.createElement("script");
        script.textContent = "window.alien = true";
        document.body.append(script);
        const image = new Image();
        image.onload = () => done([window.alien ?? null, "loaded"]);
        image.onerror = () => done([window.alien ?? null, "refused"]);
        image.src = location.href.replace(/[^/]*$/, "picture.svg");
    """
    Path(opened.current_url.removeprefix("file://")).with_name("picture.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    )
    assert opened.execute_async_script(code) == [None, "refused"]


def test_every_picture_is_drawn(opened: Any) -> None:
    sizes = opened.execute_script("return [...document.images].map((i) => [i.alt, i.naturalWidth, i.naturalHeight])")
    assert all(alt and width > 100 and height > 100 for alt, width, height in sizes)
    shown = " ".join(alt for alt, _, _ in sizes)
    for wanted in (
        "Loss and learning rate",
        "Effective rank through training",
        "Singular values of",
        "Effective rank of",
        "Rank fractions of",
        "Through the depth of",
        "Loss against bytes",
        "spectral check",
        "coordinate check",
        "Loss against the learning rate",
        "Loss <against> bytes",
    ):
        assert wanted in shown


def test_the_contents_lead_to_every_section(opened: Any) -> None:
    links = opened.execute_script("return [...document.querySelectorAll('nav a')].map((a) => a.getAttribute('href'))")
    sections = opened.execute_script("return [...document.querySelectorAll('section')].map((s) => '#' + s.id)")
    assert sorted(links) == sorted(sections)
    assert len(set(links)) == len(links) >= 14


def test_text_stays_text(opened: Any) -> None:
    text = opened.execute_script("return document.body.textContent")
    assert opened.title == "Results <of> & all"
    assert f"results/{DENSE}" in text
    assert "numuon <i>" in text
    assert opened.execute_script("return document.querySelectorAll('main b, main i').length") == 0


def _table(browser: Any, heading: str) -> Any:
    """The table of the experiment, which alone has such a heading."""
    code = """
        const has = (table) => [...table.tHead.rows[0].cells].some((cell) => cell.textContent === arguments[0]);
        return [...document.querySelectorAll("table")].find(has);
    """
    return browser.execute_script(code, heading)


def _column(browser: Any, table: Any, heading: str) -> list[str]:
    code = """
        const [table, heading] = arguments;
        const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === heading);
        return [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
    """
    return list(browser.execute_script(code, table, heading))


def _head(browser: Any, table: Any, heading: str) -> Any:
    code = "return [...arguments[0].tHead.rows[0].cells].find((cell) => cell.textContent === arguments[1])"
    return browser.execute_script(code, table, heading)


def test_a_click_sorts_numbers_as_numbers(opened: Any) -> None:
    table = _table(opened, "curve")
    head = _head(opened, table, "bytes")
    assert head.get_attribute("aria-sort") is None
    head.find_element("tag name", "button").click()
    assert _column(opened, table, "bytes") == ["1,000", "9,000", "20,000", "100,000"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.find_element("tag name", "button").click()
    assert _column(opened, table, "bytes") == ["100,000", "20,000", "9,000", "1,000"]
    assert head.get_attribute("aria-sort") == "descending"


def test_what_is_missing_stays_below_and_keys_sort_too(opened: Any) -> None:
    table = _table(opened, "curve")
    button = _head(opened, table, "loss").find_element("tag name", "button")
    opened.execute_script("arguments[0].focus()", button)
    for wanted in (["-4.500", "4.125", "4.250", "-"], ["4.250", "4.125", "-4.500", "-"]):
        opened.switch_to.active_element.send_keys("\ue007")  # Enter
        assert _column(opened, table, "loss") == wanted
    _head(opened, table, "note").find_element("tag name", "button").send_keys(" ")
    assert _column(opened, table, "note") == ["first", "ninth", "tenth", "-"]
    assert _head(opened, table, "loss").get_attribute("aria-sort") is None


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_page(opened: Any, width: int) -> None:
    """Wide tables and pictures scroll in boxes of their own."""
    _wide(opened, width)
    opened.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    code = """
        const room = document.documentElement.clientWidth;
        const inside = (one) => one.parentElement?.closest(".scroll, .picture");
        const wide = (one) => !inside(one) && one.getBoundingClientRect().right > room + 0.5;
        const found = [...document.querySelectorAll("body *")].filter(wide).map((one) => one.outerHTML.slice(0, 99));
        return [document.documentElement.scrollWidth - room, found];
    """
    assert opened.execute_script(code) == [0, []]


def test_dark_and_light(opened: Any) -> None:
    code = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        seen[scheme] = opened.execute_script(code)
    assert seen == {
        "light": ["rgb(38, 38, 38)", "rgb(255, 255, 255)"],
        "dark": ["rgb(230, 230, 230)", "rgb(22, 24, 28)"],
    }


def test_without_scripts_all_is_there(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        assert browser.find_elements("css selector", "th button") == []
        rows = browser.find_elements("css selector", "#experiments tbody tr")
        assert len(rows) == len(EXPERIMENT["rows"])  # type: ignore[arg-type]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
