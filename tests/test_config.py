"""params.yaml's schema: what it refuses and how it says so; and that every recipe fits it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from sdxl_lora.config import Params, Section, load_params
from sdxl_lora.storage.repository import folder_digest, is_local_folder

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
DEFAULT = REPOSITORY / "recipes" / "sdxl-naruto-16gb.yaml"


def keys_of(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a params file in their order, sections included."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def keys_of_schema(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of the schema in their order, sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in sections_in(field.annotation):
            yield from keys_of_schema(section, f"{prefix}{name}.")


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    yield from (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))


def all_sections(model: type[BaseModel] = Params) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for section in sections_in(field.annotation):
            yield from all_sections(section)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """The default recipe with one change, as a file."""
    text = DEFAULT.read_text()
    assert text.count(old) == 1
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
class TestRecipe:
    def test_fits_the_schema(self, recipe: Path) -> None:
        load_params(recipe)

    def test_has_the_keys_of_the_schema_in_their_order(self, recipe: Path) -> None:
        assert list(keys_of(yaml.safe_load(recipe.read_text()))) == list(keys_of_schema(Params))

    def test_has_lists_in_block_style(self, recipe: Path) -> None:
        """`dvc exp run -S` rewrites inline ones."""
        events = yaml.parse(recipe.read_text())
        starts = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
        assert not [
            str(event.start_mark) for event in events if isinstance(event, starts) and event.flow_style
        ]

    def test_opens_with_a_comment_that_says_what_it_is_for(self, recipe: Path) -> None:
        assert recipe.read_text().startswith("# ")

    def test_pins_the_folders_that_it_names(self, recipe: Path) -> None:
        """If this fails after a change of the folder: write its digest into the recipe."""
        params = load_params(recipe)
        pins = {
            "download.revision": (params.download.repository, params.download.revision),
            "model.revision": (params.model.base, params.model.revision),
            "evaluation.clip_revision": (params.evaluation.clip_model, params.evaluation.clip_revision),
        }
        folders = {key: pin for key, pin in pins.items() if is_local_folder(pin[0])}
        digests = {key: folder_digest(REPOSITORY / folder) for key, (folder, _) in folders.items()}
        assert {key: revision for key, (_, revision) in folders.items()} == digests


def test_committed_params_are_the_default_recipe() -> None:
    """As committed: `make demo` selects another recipe in the working tree."""
    command = ["git", "show", "HEAD:params.yaml"]
    committed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert committed == DEFAULT.read_bytes()


@pytest.mark.parametrize("section", list(all_sections()), ids=lambda section: section.__name__)
def test_every_number_is_documented(section: type[BaseModel]) -> None:
    values = {
        name: field for name, field in section.model_fields.items() if not [*sections_in(field.annotation)]
    }
    assert not [name for name, field in values.items() if not field.description]


@pytest.mark.parametrize("section", list(all_sections()), ids=lambda section: section.__name__)
def test_no_key_has_a_default(section: type[BaseModel]) -> None:
    """DVC cannot track a default."""
    assert not [name for name, field in section.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("  rank: 16", "  rnak: 16", "lora.rnak: unknown key; did you mean `rank`?"),
        ("\nlora:", "\nloar:", "loar: unknown key; did you mean `lora`?"),
        (
            "    target: naruto",
            "    targt: naruto",
            "evaluation.style.targt: unknown key; did you mean `target`?",
        ),
        ("  rank: 16", "  zzzzzz: 16", "lora.zzzzzz: unknown key"),
        ("  rank: 16\n", "", "lora.rank: Field required"),
        ("  rank: 16", "  rank: sixteen", "lora.rank: Input should be a valid integer"),
        ("  rank: 16", "  rank: sixteen", "(it is 'sixteen')"),
        ("  rank: 16", "  rank: 0", "lora.rank: Input should be greater than 0 (it is 0)"),
        (
            "  resolution: 1024 # pixels a side\n  aspect_ratios",
            "  resolution: 1000\n  aspect_ratios",
            "multiple of 64 (it is 1000)",
        ),
        (
            "  crop: center",
            "  crop: left",
            "encoding.crop: Input should be 'center' or 'random' (it is 'left')",
        ),
        ("    - 900\n", "    - 1000\n", "evaluation.timesteps.4: Input should be less than or equal to 999"),
        (
            "  warmup_steps: 100",
            "  warmup_steps: 2000",
            "training.warmup_steps (2000) must be below training.steps",
        ),
        (
            "  text_encoders: trained #",
            "  text_encoders: trained_then_frozen #",
            "model.text_encoders is 'trained_then_frozen' but training.text_encoder_steps is None: set the",
        ),
        (
            "  text_encoder_steps: null",
            "  text_encoder_steps: 500",
            "model.text_encoders is 'trained' but training.text_encoder_steps is 500: set the first to",
        ),
        (
            "  text_encoder_steps: null",
            "  text_encoder_steps: 2000",
            "training.text_encoder_steps (2000) must be below training.steps (2000): lower the first",
        ),
        (
            "  text_encoder_steps: null",
            "  text_encoder_steps: 0",
            "text_encoder_steps: Input should be greater",
        ),
        ("  vae_revision: 207b116dae70ace3637169f1ddd2434b91b3a8cd", "  vae_revision: null", "set both"),
        ("  rank: 16", "  rank: [16", "is not valid YAML"),
    ],
)
def test_fault_is_named(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises(ValueError, match=r"params\.yaml") as caught:
        load_params(path)
    assert fault in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = changed(tmp_path, "  rank: 16\n  alpha: 16.0", "  rank: -1\n  alpha: none")
    with pytest.raises(ValueError, match=r"lora\.rank") as caught:
        load_params(path)
    assert "lora.alpha" in str(caught.value)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ValueError, match="does not fit the schema"):
        load_params(tmp_path / "params.yaml")


def test_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="git checkout"):
        load_params(tmp_path / "params.yaml")


def test_exponent_without_a_point_is_the_number_that_dvc_reads(tmp_path: Path) -> None:
    """PyYAML reads 1e-4 as a string."""
    path = changed(tmp_path, "  learning_rate: 0.0001", "  learning_rate: 1e-4")
    assert load_params(path).training.learning_rate == 0.0001


def test_text_encoders_trained_for_fewer_steps_than_the_unet_are_accepted(tmp_path: Path) -> None:
    path = changed(tmp_path, "  text_encoder_steps: null", "  text_encoder_steps: 1999")
    path.write_text(
        path.read_text().replace("  text_encoders: trained #", "  text_encoders: trained_then_frozen #")
    )
    params = load_params(path)
    assert (params.model.text_encoders, params.training.text_encoder_steps) == ("trained_then_frozen", 1999)


def test_params_cannot_be_changed() -> None:
    params = load_params(DEFAULT)
    with pytest.raises(ValidationError, match="frozen"):
        params.lora.rank = 8  # type: ignore[misc]
