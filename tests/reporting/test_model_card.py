from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jinja2 import Environment, meta

from sdxl_lora.config import ExportConfig, ModelConfig, load_params
from sdxl_lora.inference.samples import Sample
from sdxl_lora.reporting.model_card import (
    TEMPLATE,
    CardAdapter,
    CardFiles,
    card_samples,
    card_values,
    model_card,
)

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
FILES = CardFiles("grid.png", "pytorch_lora_weights.safetensors", "naruto.safetensors")
ADAPTER = CardAdapter(16, 8.0, "naruto style", {"sdxl_lora.git.commit": "abc"})


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_params(Path("recipes/sdxl-naruto-16gb.yaml")).model


def card(
    model: ModelConfig,
    failures: tuple[str, ...] = (),
    adapter: CardAdapter = ADAPTER,
    title: str = CONFIG.title,
) -> str:
    config = CONFIG.model_copy(update={"title": title})
    return model_card(config, model, adapter, FILES, card_samples(SAMPLES, 6), METRICS, failures)


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


def test_text_of_others_is_text(model: ModelConfig) -> None:
    hostile = "<b>[style](https://evil.example)\x07\n# **x**"
    facts = {"sdxl_lora.data.repository": "a`b|c\n"}
    text = card(model, ("copied | <i>",), CardAdapter(16, 8.0, hostile, facts), hostile)
    escaped = r"&lt;b&gt;\[style\](https:\//evil.example) \# \*\*x\*\*"
    assert f"\n# {escaped}\n" in text
    assert f"Begin prompts with *{escaped}*." in text
    assert "| sdxl_lora.data.repository | ``a`b\\|c`` |" in text
    assert "copied | &lt;i&gt;" in text
    assert ModelCard(text).data["instance_prompt"] == hostile


def test_lineage_is_told(model: ModelConfig) -> None:
    assert "| sdxl_lora.git.commit | `abc` |" in card(model)
    assert "Begin prompts with *naruto style*." in card(model)
    without = card(model, adapter=CardAdapter(16, 8.0, None, {}))
    assert "Begin prompts with" not in without
    assert "A LoRA for stabilityai/stable-diffusion-xl-base-1.0, rank 16, alpha 8.\n" in without


def test_template_uses_the_values_that_it_is_given_and_no_others(model: ModelConfig) -> None:
    used = meta.find_undeclared_variables(Environment(autoescape=True).parse(TEMPLATE.read_text("utf-8")))
    values = card_values(CONFIG, model, ADAPTER, FILES, SAMPLES, METRICS, [])
    assert used == {"card_data", *values}


def test_first_sample_of_each_prompt_is_shown_up_to_a_limit() -> None:
    assert [sample.file for sample in card_samples(SAMPLES, 6)] == [SAMPLES[1].file, SAMPLES[3].file]
    assert len(card_samples(SAMPLES, 1)) == 1
