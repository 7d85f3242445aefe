"""The whole pipeline on pictures of many shapes, in buckets and mirrored, with several captions."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sdxl_lora.data.aspect_ratio_buckets import bucket_sizes, nearest_size
from sdxl_lora.data.encoded_dataset import EncodedDataset, Split
from sdxl_lora.storage.repository import folder_digest
from tests.support.patterns import pattern
from tests.support.project import REPOSITORY, Project, create_project

SHAPES = [(200, 200), (300, 110), (110, 300), (240, 170)]
COUNT = 24
SMALLER = {
    "encoding": {
        "aspect_ratios": "buckets",
        "flip": True,
        "batch_size": 4,
        "shard_size": 4,
        "held_out": 0.25,
    },
    "lora": {"rank": 2, "alpha": 2.0},
    "training": {"steps": 4, "batch_size": 2, "warmup_steps": 1, "log_every": 1, "preview_every": 4},
    "sampling": {
        "prompts": ["red apple, fluent 3d style"],
        "strengths": [0.0, 1.0],
        "num_inference_steps": 2,
        "resolution": 64,
    },
    "evaluation": {"timesteps": [500], "noises": 1, "resamples": 20},
}
SPLITS: tuple[Split, Split] = ("train", "held_out")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    params = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    for section, changes in SMALLER.items():
        params[section].update(changes)
    source = tmp_path / "pictures"
    source.mkdir()
    lines = []
    for number in range(COUNT):
        pattern(number, SHAPES[number % len(SHAPES)]).save(source / f"{number}.png")
        captions = [f"picture number {number}", f"the number {number}"][: 1 + number % 2]
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (source / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    params["download"].update(repository=str(source), revision=folder_digest(source))
    project = create_project(tmp_path / "project", params)
    (project.root / "demo").symlink_to(REPOSITORY / "demo")
    return project


@pytest.mark.slow
def test_pictures_of_many_shapes_go_through_the_whole_pipeline(project: Project) -> None:
    project.dvc("repro")
    expected = Counter(nearest_size(SHAPES[n % 4], bucket_sizes(128, "buckets")) for n in range(COUNT))
    sizes = {f"{width}x{height}": count for (width, height), count in expected.items()}
    assert len(sizes) == len(SHAPES)
    assert project.read("data/reports/encoding.json")["sizes"] == sizes
    card = (project.root / "data/reports/dataset.md").read_text(encoding="utf-8").splitlines()
    assert {f"| encoded at {size.replace('x', ' x ')} | {count} |" for size, count in sizes.items()} <= {
        *card
    }
    datasets = [EncodedDataset(project.root / "data/encoded", split) for split in SPLITS]
    assert sum(map(len, datasets)) == COUNT
    assert all(example.flipped_digest for dataset in datasets for example in dataset.examples)
    assert project.read("data/reports/encoding.json")["captions"] == COUNT + COUNT // 2
    assert project.read("data/reports/training.json")["steps"] == 4
    assert project.read("data/reports/metrics.json")["held_out_loss"]["base"] > 0
    assert (project.root / "data/previews/step-000004.png").is_file()
    assert (project.root / "data/reports/index.html").is_file()
