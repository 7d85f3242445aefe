"""The output of `sdxl-lora plan`."""

import re
from pathlib import Path

import pytest

from sdxl_lora.cli import plan
from sdxl_lora.cli.main import app
from sdxl_lora.cli.plan import CARDS, MEANINGS
from sdxl_lora.config import load_params


@pytest.fixture(scope="module")
def said() -> str:
    """Of the demo's recipe, in fp16 as a GPU would have it."""
    params = load_params(Path("recipes/demo.yaml"))
    training = params.training.model_copy(update={"precision": "fp16", "vram_gib": 0.5})
    return "\n".join(plan.plan_recipe(params.model_copy(update={"training": training})))


def numbers(line: str) -> list[float]:
    return [0.0 if word == " -" else float(word) for word in re.findall(r" -(?= )|\d+\.\d\d", line)]


def test_parts_of_each_phase_add_up(said: str) -> None:
    lines = said.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("peak GPU memory"))
    assert lines[start].split()[-3:] == ["encode", "train", "sample"]
    *parts, total = [numbers(line) for line in lines[start + 1 : start + 9]]
    assert [line.split()[0] for line in lines[start + 1 : start + 9]] == [*MEANINGS, "total"]
    for phase in range(3):
        assert sum(part[phase] for part in parts) == pytest.approx(total[phase], abs=0.05)
        assert total[phase] > 0.04


def test_training_alone_has_optimizer_and_previews(said: str) -> None:
    for name in ("optimizer", "previews"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name}")]
        encode, _, sample = numbers(line)
        assert encode == sample == 0


def test_every_card_has_a_verdict(said: str) -> None:
    verdicts = [line for line in said.splitlines() if " GiB (" in line]
    assert [int(line.split()[0]) for line in verdicts] == list(CARDS)
    assert all("trains" in line and "does not fit" not in line for line in verdicts)
    assert "Settings that lower" not in said


def test_largest_phase_is_named(said: str) -> None:
    (line,) = [line for line in said.splitlines() if line.startswith("  total")]
    phases = dict(zip(numbers(line), ("encode", "train", "sample"), strict=True))
    assert line.endswith(f"most: {phases[max(phases)]}")


def test_plan_can_be_pinned_as_it_says(said: str) -> None:
    first, pins = said.splitlines()[:2]
    assert first.startswith("Within training.vram_gib 0.5: 8 of 8 examples at once in ")
    assert pins == "To pin this plan: training.micro_batch_size 8, training.checkpointing 0."


def test_a_t4_has_what_the_default_recipe_asks_for(said: str) -> None:
    """recipes/sdxl-naruto-16gb.yaml: CUDA takes 0.9 of the 14.75 GiB that a T4 of 16 GiB shows."""
    (line,) = [line for line in said.splitlines() if line.startswith("   16 GiB")]
    asked = load_params(Path("recipes/sdxl-naruto-16gb.yaml")).training.vram_gib
    assert asked == numbers_in_brackets(line)


def numbers_in_brackets(line: str) -> float:
    return float(line.partition("(")[2].partition(")")[0])


def test_budget_that_nothing_fits_is_said_beside_the_forecast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app(["plan", "--recipe", "recipes/demo.yaml", "--vram", "0.01"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "training.vram_gib is 0.01, but training takes" in said
    assert "peak GPU memory" in said
    hints = [line.split() for line in said.partition("Settings that lower")[2].splitlines()[1:]]
    assert ["train", "training.quantization", "nf4"] in hints
    assert {words[0] for words in hints} == {"train"}, "all else fits on every card"


def test_what_lowers_a_phase_is_said_where_a_card_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CARDS", (1,))
    said = "\n".join(plan.plan_recipe(load_params(Path("recipes/demo.yaml"))))
    assert "train does not fit" in said
    assert "  train   training.quantization nf4" in said


def test_missing_recipe_is_named() -> None:
    with pytest.raises(SystemExit, match=r"plan: recipes/nothing\.yaml not found"):
        app(["plan", "--recipe", "recipes/nothing.yaml"])
