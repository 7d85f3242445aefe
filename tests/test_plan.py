"""What `python -m sdxl_lora.plan` says."""

import re
from pathlib import Path

import pytest

from sdxl_lora import plan
from sdxl_lora.config import load_params
from sdxl_lora.plan import CARDS


@pytest.fixture(scope="module")
def said() -> str:
    """Of the demo's recipe, in fp16 as a GPU would have it."""
    params = load_params(Path("recipes/demo.yaml"))
    training = params.training.model_copy(update={"precision": "fp16", "vram_gib": 0.5})
    return "\n".join(plan.plan_recipe(params.model_copy(update={"training": training})))


def numbers(line: str) -> list[float]:
    return [0.0 if word == "-" else float(word) for word in re.findall(r"-|\d+\.\d\d", line)]


def test_parts_of_each_phase_add_up(said: str) -> None:
    lines = said.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("peak GPU memory"))
    assert lines[start].split()[-3:] == ["encode", "train", "sample"]
    *parts, total = [numbers(line) for line in lines[start + 1 :] if re.match(r"  [a-z]+ ", line)]
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
    assert all("trains in" in line and "does not fit" not in line for line in verdicts)


def test_budget_that_nothing_fits_is_said_beside_the_forecast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--recipe", "recipes/demo.yaml", "--vram", "0.01"])
    plan.main()
    said = capsys.readouterr().out
    assert "training.vram_gib is 0.01, and training takes" in said
    assert "peak GPU memory" in said


def test_missing_recipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--recipe", "recipes/nothing.yaml"])
    with pytest.raises(SystemExit, match=r"plan: recipes/nothing\.yaml not found"):
        plan.main()
