"""The run's page, as text and in Debian's chromium."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from sdxl_lora.inference.samples import Sample
from sdxl_lora.reporting.run_page import Results, render_run_page

CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>document.title='taken'</script> \"' & 寿司"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples at two strengths, and training images."""
    folder = tmp_path_factory.mktemp("report")
    for number, colour in enumerate(("red", "lime", "blue", "yellow")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    Image.new("RGB", (600, 300), "black").save(folder / "train.png")
    return folder


@pytest.fixture(scope="module")
def results() -> Results:
    samples = [Sample(f"{n}.png", HOSTILE if n % 2 else "pizza", 0, float(n > 1)) for n in range(4)]
    samples += [replace(sample, prompt="a learned caption", origin="training") for sample in samples[::2]]
    metrics: dict[str, Any] = {
        "clip_score": {"base": 30.0, "adapter": 31.25},
        "copied": {"base": 0.0, "adapter": 0.5},
        "change": {"clip_score": {"mean": 1.25, "low": -0.5, "high": 2.5}},
        "copy_threshold": 0.9,
        "held_out_loss": {
            "base": 0.2,
            "adapter": 0.1,
            "change_percent": -50.0,
            "change_percent_low": -60.0,
            "change_percent_high": -40.0,
        },
        "training_captions": {
            "clip_score": {"base": 21.0, "adapter": 22.5},
            "change": {"clip_score": {"mean": 1.5, "low": 1.0, "high": 2.0}},
        },
    }
    gates = {
        "name": ["copied", "diversity_kept"],
        "figure": ["copied.adapter", "diversity_kept"],
        "value": [0.5, None],
        "limit": [0.1, 0.5],
        "passed": [False, False],
        "reason": ["copied.adapter is 0.5, should be at most 0.1", "diversity_kept was not measured"],
    }
    copies = {
        "file": [f"{n}.png" for n in range(4)],
        "strength": [0.0, 0.0, 1.0, 1.0],
        "origin": ["free", "free", "training", "free"],
        "training_image": ["train.png"] * 4,
        "similarity": [0.3, 0.4, 0.85, 0.95],
        "copied": [False, False, False, True],
    }
    by_timestep = {"timestep": [100, 900], "base": [0.5, 0.01], "adapter": [0.3, 0.01]}
    return Results(
        samples=samples,
        metrics=metrics,
        training={
            "seconds": 12.5,
            "trainable_parameters": 1234567,
            "plan": {"micro_batch_size": 3},
            "peak_memory_gib": 9.5,
            "forecast_gib": {"weights": 6.25, "previews": 0.0, "activations": 3.75, "total": 10.0},
        },
        gates=pd.DataFrame(gates),
        copies=pd.DataFrame(copies),
        loss=pd.DataFrame({"step": [10, 20], "loss": [0.5, 0.25]}),
        loss_by_timestep=pd.DataFrame(by_timestep),
        facts={"git.commit": "c0ffee"},
    )


@pytest.fixture(scope="module")
def html(results: Results, folder: Path) -> str:
    return render_run_page("Style <1>", results, folder, folder)


def test_words_of_others_are_no_markup(html: str) -> None:
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3  # a caption and its two images
    assert "<title>Style &lt;1&gt;</title>" in html


def test_page_needs_no_other_file(html: str) -> None:
    assert not re.findall(r"https?://|src=\"(?!data:)|url\((?!#)|<link|@import", html)


def test_figures_gates_and_lineage_are_told(html: str) -> None:
    assert "fails 2 of 2 gates" in html
    for words in ("+1.25 (-0.5 to +2.5)", "1,234,567", "plan, micro batch size", "c0ffee", ">none<"):
        assert words in html


def test_captions_are_kept_apart_from_free_prompts(html: str) -> None:
    free, captions = html.split("Before and after: ")[1:]
    assert free.startswith("free prompts")
    assert "a learned caption" not in free
    assert captions.startswith("captions of training images")
    table = captions[: captions.index("A change whose interval")]
    order = ["a learned caption", "held out loss", "+1.25 (-0.5", "captions of training images", "+1.5 (+1 "]
    assert sorted(order, key=lambda words: table.rindex(words)) == order


def test_forecast_is_beside_the_measured_peak_of_memory(results: Results, html: str, folder: Path) -> None:
    assert "measured 9.50 GiB, forecast 10.00 GiB (95%)" in html
    parts = re.findall(r">(\w+): ([\d.]+) GiB<", html)
    assert parts == [("weights", "6.25"), ("activations", "3.75")]  # no part is of 0
    on_a_cpu = replace(results, training={"seconds": 12.5, "peak_memory_gib": 1.5})
    assert "GPU memory" not in render_run_page("", on_a_cpu, folder, folder)


def test_adapters_samples_are_beside_their_nearest_image_copies_marked(html: str) -> None:
    pairs = re.findall(r'<div class="pair( copied)?">.*?(\d\.\d{4}), adapter', html, re.S)
    assert pairs == [(" copied", "0.9500"), ("", "0.8500")]


def test_run_without_gates_has_no_verdict(results: Results, folder: Path) -> None:
    html = render_run_page("Style", replace(results, gates=results.gates.head(0)), folder, folder)
    assert not re.findall(r"(passes|fails) \w+ ", html)


def test_same_results_are_the_same_page(html: str, results: Results, folder: Path) -> None:
    assert render_run_page("Style <1>", results, folder, folder) == html


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_browser_shows_every_image_without_asking_for_anything(html: str, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(html, encoding="utf-8")
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        widths = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
        title, overflow = tab.title(), tab.evaluate("document.body.scrollWidth > window.innerWidth")
        browser.close()
    assert len(widths) == 10
    assert all(widths)
    assert max(widths) == 256
    assert title == "Style <1>"
    assert not overflow
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
