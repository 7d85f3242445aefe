from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sdxl_lora.config import ExportConfig, ModelConfig, load_params
from sdxl_lora.inference.samples import Sample
from sdxl_lora.reporting.model_card import card_pictures, escape_markdown, model_card, picture_name

CONFIG = ExportConfig(title="Naruto <b>style</b>", license="openrail++")
SAMPLES = [
    Sample("strength-0/00-seed-0.png", "a: fox, 'quoted'", 0, 0.0),
    Sample("strength-1/00-seed-0.png", "a: fox, 'quoted'", 0, 1.0),
    Sample("strength-1/00-seed-7.png", "a: fox, 'quoted'", 7, 1.0),
    Sample("strength-1/01-seed-0.png", "b <script>", 0, 1.0),
]
METRICS: dict[str, Any] = {
    "held_out_loss": {
        "base": 0.2,
        "adapter": 0.1,
        "change_percent": -50.0,
        "change_percent_low": -60.0,
        "change_percent_high": -40.0,
    },
    "clip_score": {"base": 30.0, "adapter": 31.0},
    "diversity_kept": 0.9,
    "change": {"clip_score": {"mean": 1.0, "low": 0.5, "high": 1.5}},
    "copied": {"base": 0.0, "adapter": 0.0},
}
DETAILS = {
    "grid": "grid.png",
    "weights": "pytorch_lora_weights.safetensors",
    "kohya": "naruto.safetensors",
    "rank": 16,
    "alpha": 8.0,
    "trigger": "naruto style",
}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_params(Path("recipes/sdxl-naruto-16gb.yaml")).model


def card(model: ModelConfig, failures: tuple[str, ...] = ()) -> str:
    pictures = [(picture_name(sample), sample) for sample in card_pictures(SAMPLES, 6)]
    return model_card(CONFIG, model, pictures, DETAILS, METRICS, failures, {"sdxl_lora.git.commit": "abc"})


def test_hub_reads_the_header_as_it_was_meant(model: ModelConfig) -> None:
    data = ModelCard(card(model)).data
    assert data["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert data["license"] == "openrail++"
    assert data["library_name"] == "diffusers"
    assert data["instance_prompt"] == "naruto style"
    assert data["widget"] == [
        {"text": "a: fox, 'quoted'", "output": {"url": "images/00-seed-0.png"}},
        {"text": "b <script>", "output": {"url": "images/01-seed-0.png"}},
    ]


def test_results_have_their_changes_and_intervals(model: ModelConfig) -> None:
    text = card(model)
    assert "| held out loss | 0.2 | 0.1 | -50 % (-60 to -40) |" in text
    assert "| clip score | 30 | 31 | +1 (+0.5 to +1.5) |" in text
    assert "| copied | 0 | 0 |  |" in text
    assert "diversity kept" not in text


def test_verdict_is_told_with_its_reasons(model: ModelConfig) -> None:
    assert "It passed all of its gates." in card(model)
    assert "**It failed its gates**: copied.adapter is 1" in card(model, ("copied.adapter is 1",))


def test_code_that_it_shows_is_python(model: ModelConfig) -> None:
    code = card(model).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "weight_name='pytorch_lora_weights.safetensors'" in code


def test_folder_is_no_base_model_of_the_hub() -> None:
    demo = load_params(Path("recipes/demo.yaml")).model
    assert ModelCard(card(demo)).data.get("base_model") is None


def test_words_of_others_are_no_markup(model: ModelConfig) -> None:
    assert "# Naruto \\<b\\>style\\</b\\>" in card(model)
    assert escape_markdown("a|b*c") == "a\\|b\\*c"


def test_first_picture_of_each_prompt_is_shown_up_to_a_limit() -> None:
    assert [sample.file for sample in card_pictures(SAMPLES, 6)] == [SAMPLES[1].file, SAMPLES[3].file]
    assert len(card_pictures(SAMPLES, 1)) == 1
