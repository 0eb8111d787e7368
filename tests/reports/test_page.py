"""report.html in a real browser: Chromium without a window, driven by playwright.

The plots are drawn, the switches work, a value is shown where the mouse is, and nothing is wider than a phone.
"""

import shutil

import pytest

from bitnet_lit.config import ReportConfig
from bitnet_lit.reports.report_files import report
from tests.reports.making import make_run

pytest.importorskip("plotly", reason="report.html needs plotly")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)"),
]
ODD = "<img src=x onerror=alert(1)> %{x}"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a sweep of two sizes, two quants and two seeds, with one run that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    for model, base in (("small", 3.0), ("large", 2.0)):
        for quant, more in (("none", 0.0), ("b158", 0.2)):
            for seed in (1, 2):
                losses = [(step, base + more + 1 / step + seed / 50) for step in (10, 20, 30, 40)]
                run = make_run(folder / f"{model}-{quant}-{seed}", losses, model=model, quant=quant, seed=seed, tag=ODD)
                if quant == "b158":
                    add_health(run)
    make_run(folder / "failed", seed=3, done=False, error=f"UserError: {ODD}", tag=ODD)
    report(ReportConfig(runs=[str(folder)], by=["quant", "model", "tag"]))
    return (folder / "report.html").as_uri()


def add_health(run):
    lines = ["step,layer,minus,zero,plus,flip_rate,weight_scale"]
    lines += [f"{s},model.layers.{n}.mlp.up_proj,0.3,0.4,0.3,0.1,{s}e-3" for s in (10, 20) for n in (0, 1)]
    (run / "ternary_health.csv").write_text("\n".join(lines) + "\n")
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    names = "ternary/minus,ternary/zero,ternary/plus,ternary/flip_rate,ternary/weight_scale"
    lines = [f"{row}{',,,,,' if row.endswith(',') else ',0.3,0.4,0.3,0.1,0.01'}" for row in rows]
    (run / "metrics.csv").write_text("\n".join([f"{header},{names}", *lines]) + "\n")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, address):
    """A function that opens the page; what goes wrong in it, and what it tries to load, fails the test."""
    wrong, contexts = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(120_000)  # a busy machine takes half a minute to open a page
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(address)
        page.wait_for_selector("#matrices .heatmaplayer image", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def axis_title(page, plot):
    return page.locator(f"{plot} .xtitle").first.text_content()


def test_plots_switches_and_values_under_the_mouse(opened):
    page = opened(viewport={"width": 1200, "height": 900})
    assert page.locator("#rows tbody tr").count() == 4 and ODD in page.locator("#rows").inner_text()
    assert ODD in page.locator(".notes").inner_text()
    assert page.locator("#curves .scatterlayer .trace").count() == 8  # a mean and a band for each row
    page.get_by_role("button", name="every run").click()
    assert page.locator("#curves .scatterlayer .trace").count() == 8  # four rows of two runs
    assert page.get_by_role("button", name="every run").get_attribute("aria-pressed") == "true"
    assert page.get_by_role("button", name="mean of runs").get_attribute("aria-pressed") == "false"
    seen = [axis_title(page, "#curves")]
    for name in ("steps", "time"):
        page.locator("#curves").get_by_role("button", name=name, exact=True).click()
        seen.append(axis_title(page, "#curves"))
    assert seen == ["tokens", "optimizer steps", "training time (seconds)"]
    seen = []
    for name in ("bytes", "bits per weight", "time", "parameters"):
        page.locator("#final").get_by_role("button", name=name, exact=True).click()
        seen.append(axis_title(page, "#final"))
    expected = ["bytes of weights", "bits per weight of the projections", "training time (seconds)", "parameters"]
    assert seen == expected
    assert page.locator("#gaps .scatterlayer .trace").count() == 2
    page.get_by_role("button", name="at equal bytes").click()
    assert page.locator("#gaps .scatterlayer .trace").count() == 1  # the small model lies below the dense ones
    page.get_by_role("button", name="flips", exact=True).click()
    assert "flipped since the last validation" in page.locator("#matrices .gtitle").text_content()
    page.locator("#gaps .plot").scroll_into_view_if_needed()
    page.locator("#gaps .point").first.hover(force=True)
    page.wait_for_selector("#gaps .hoverlayer .hovertext")
    shown = page.locator("#gaps .hoverlayer .hovertext").text_content()
    assert "2 pairs" in shown and ODD in shown


def test_light_and_dark(opened):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = opened(color_scheme="dark", viewport={"width": 1200, "height": 900})
    dark = background(page)
    page.get_by_role("button", name="Light", exact=True).click()
    light = background(page)
    assert dark == "rgb(19, 20, 23)" and light == "rgb(251, 251, 249)"
    page.get_by_role("button", name="Dark", exact=True).click()
    assert background(page) == dark
    assert page.locator("#curves .ytitle").evaluate("text => getComputedStyle(text).fill") == "rgb(157, 161, 168)"


def test_on_a_phone(opened):
    page = opened(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.evaluate(
        "[...document.querySelectorAll('main section')].filter(s => s.scrollWidth > s.clientWidth).length"
    )
    assert wide == 0 and page.locator("#rows").is_visible()
    page.locator("#curves").get_by_role("button", name="training").tap()
    assert page.locator("#curves .ytitle").text_content() == "training loss (nats per token)"
