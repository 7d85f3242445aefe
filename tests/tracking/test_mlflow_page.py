"""The MLflow page of a run, as `make ui` serves it, in Debian's chromium."""

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from sdxl_lora import paths
from sdxl_lora.cli.ui import HOST, address
from sdxl_lora.config import load_params
from sdxl_lora.runtime.stage import record_stage
from sdxl_lora.tracking.live_run import live_run
from sdxl_lora.tracking.pipeline_run import track_run
from tests.support.command import COMMAND
from tests.support.patience import patience
from tests.support.tracked import write_results

CHROMIUM = shutil.which("chromium")
START_SECONDS = patience(20)
PAGE_MILLISECONDS = 1000 * patience(5)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def run_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a finished run with curves and images, in the current folder's database."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = tmp_path_factory.mktemp("page")
        monkeypatch.chdir(root)
        monkeypatch.setenv("DVC_ROOT", str(root))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setattr("sdxl_lora.tracking.live_run.PATIENCE_SECONDS", patience(5))
        write_results()
        params = load_params()
        with record_stage("train_lora"), live_run(params) as run:
            for step in range(1, 21):
                run.log(step, loss=1 / step, learning_rate=0.001)
            run.image("preview", Image.new("RGB", (64, 64), "blue"), 20)
        yield str(track_run(params)["mlflow"]["run"])


@pytest.fixture(scope="module")
def runs_page(run_name: str) -> Iterator[str]:
    """The address that `make ui` prints, once the server answers."""
    assert run_name
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    command = [COMMAND, "ui", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ui:
        assert ui.stdout is not None
        assert ui.stdout.readline().startswith(address(port))
        wait_for(f"http://{HOST}:{port}/health")
        yield address(port)
        ui.terminate()


def wait_for(url: str) -> None:
    """Returns when a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.set_default_timeout(PAGE_MILLISECONDS)
        expect.set_options(timeout=PAGE_MILLISECONDS)
        yield page
        browser.close()


@pytest.fixture
def run_page(runs_page: str, run_name: str, browser_page: Page) -> Page:
    """The run's page, reached from the list of runs."""
    browser_page.goto("about:blank")
    browser_page.goto(runs_page)
    browser_page.get_by_role("link", name=run_name).click()
    expect(browser_page.get_by_role("heading", name=run_name)).to_be_visible()
    return browser_page


def image_is_drawn(page: Page, selector: str) -> None:
    """Wait until an image is loaded and has a size."""
    page.wait_for_function(
        "selector => [...document.querySelectorAll(selector)].some(image => image.naturalWidth > 0)",
        arg=selector,
    )


def test_overview_shows_samples_params_and_peak_memory(run_page: Page) -> None:
    image_is_drawn(run_page, "img[src*='get-artifact'][src*='grid.png']")
    for name, value in {"training/peak_memory_gib": "9.98", "lora.rank": "16", "train/loss": "0.05"}.items():
        row = run_page.get_by_role("row").filter(has=run_page.get_by_text(name, exact=True))
        expect(row).to_contain_text(value)


def test_curves_and_previews_are_drawn(run_page: Page) -> None:
    run_page.get_by_role("tab", name="Model metrics").click()
    search = run_page.get_by_placeholder("Search metric charts")
    search.fill("train/loss")
    expect(run_page.locator(".js-plotly-plot .scatterlayer path.js-line").first).to_be_visible()
    search.fill("preview")
    run_page.locator("img[src*='images%2Fpreview']").first.scroll_into_view_if_needed()
    image_is_drawn(run_page, "img[src*='images%2Fpreview']")


def test_adapter_and_images_are_artifacts(run_page: Page) -> None:
    run_page.get_by_role("tab", name="Artifacts").click()
    for name in ("adapter", "dvc", "images", "reports"):
        expect(run_page.get_by_text(name, exact=True).first).to_be_visible()
    run_page.get_by_text("grid.png").click()
    image_is_drawn(run_page, "img[alt='grid.png']")
    run_page.get_by_text("reports", exact=True).click()
    run_page.get_by_text("captions.html").click()
    expect(run_page.frame_locator("iframe").get_by_role("heading", name="Captions")).to_be_visible()
    run_page.get_by_text("adapter", exact=True).click()
    expect(run_page.get_by_text(paths.EXPORTED_WEIGHTS.name).first).to_be_visible()


def test_page_is_served_to_this_machine_alone(runs_page: str) -> None:
    port = int(runs_page.split(":")[2].split("/")[0])
    own = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in own - {HOST, "127.0.1.1"}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port), timeout=5).close()
