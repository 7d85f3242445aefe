"""Raw images and captions, from parquet on a Hub on the loopback and from folders."""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from sdxl_lora import paths
from sdxl_lora.config import DownloadConfig, load_params
from sdxl_lora.data.download import RawExample, download_dataset, open_source
from sdxl_lora.storage.repository import folder_digest
from tests.support.hub import Hub
from tests.support.imports import modules_after_run
from tests.support.naruto import png, write_naruto

NARUTO = "lambdalabs/naruto-blip-captions"
CAPTIONS = ["a man with black hair", "", None, "arafed  woman"]


def hub_config(**changes: Any) -> DownloadConfig:
    return load_params(Path("recipes/sdxl-naruto-16gb.yaml")).download.model_copy(update=changes)


def download(config: DownloadConfig, folder: Path) -> list[dict[str, str]]:
    """Downloads all; the lines of captions.jsonl."""
    for _ in download_dataset(open_source(config), folder):
        pass
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def write_listed(folder: Path, captions: list[list[str | None]]) -> None:
    """A data set of the Hub with a list of captions for each image."""
    folder.mkdir()
    structs = [{"bytes": png(number), "path": None} for number in range(len(captions))]
    table = pa.table({"image": structs, "text": pa.array(captions, pa.list_(pa.string()))})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")


@pytest.fixture
def naruto(hub: Hub, tmp_path: Path) -> tuple[str, list[bytes]]:
    """The data set on the Hub: its commit and its images."""
    images = write_naruto(tmp_path / "naruto", CAPTIONS)
    return hub.add(NARUTO, tmp_path / "naruto", "datasets").commit, images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imagefolder of three images."""
    images = tmp_path / "pictures" / "images"
    images.mkdir(parents=True)
    rows = []
    for number in range(3):
        (images / f"{number}.png").write_bytes(png(number))
        rows.append({"file_name": f"images/{number}.png", "text": f"picture {number}"})
    (tmp_path / "pictures/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pictures"


def folder_config(folder: Path, **changes: Any) -> DownloadConfig:
    """Pinned to what the folder holds now."""
    pin = {"repository": str(folder), "revision": folder_digest(folder)}
    return load_params(Path("recipes/demo.yaml")).download.model_copy(update=pin | changes)


def test_hub_images_keep_their_bytes_and_captions_their_text(
    naruto: tuple[str, list[bytes]], tmp_path: Path
) -> None:
    rows = download(hub_config(), tmp_path / "raw")
    assert [row["caption"] for row in rows] == ["a man with black hair", "", "", "arafed  woman"]
    assert [(tmp_path / "raw/images" / row["image"]).read_bytes() for row in rows] == naruto[1]


@pytest.mark.parametrize("from_hub", [True, False])
def test_list_of_captions_has_a_line_for_each(hub: Hub, folder: Path, tmp_path: Path, from_hub: bool) -> None:
    captions: list[list[str | None]] = [["one", "two"], [], ["three", None], ["four"]]
    if from_hub:
        write_listed(tmp_path / "listed", captions)
        hub.add(NARUTO, tmp_path / "listed", "datasets")
        config = hub_config()
    else:
        lines = [
            json.dumps({"file_name": f"images/{n % 3}.png", "text": texts})
            for n, texts in enumerate(captions)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        config = folder_config(folder)
    rows = download(config, tmp_path / "raw")
    names = sorted({row["image"] for row in rows})
    found = [[row["caption"] for row in rows if row["image"] == name] for name in names]
    assert found == [["one", "two"], [""], ["three", ""], ["four"]]
    assert json.loads((tmp_path / "raw/source.json").read_text())["examples"] == 4


def test_list_of_anything_else_is_refused(folder: Path, tmp_path: Path) -> None:
    row = {"file_name": "images/0.png", "text": ["a man", 7]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"download\.caption_column: row 0 .* but int"):
        download(folder_config(folder), tmp_path / "raw")


def test_commit_behind_a_branch_is_recorded_and_said(
    naruto: tuple[str, list[bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit, _ = naruto
    download(hub_config(), tmp_path / "raw")
    source = json.loads((tmp_path / "raw/source.json").read_text())
    assert source == {
        "repository": NARUTO,
        "requested_revision": "main",
        "revision": commit,
        "licence": "other",
        "examples": 4,
    }
    assert "set download.revision to that commit in params.yaml" in caplog.text
    assert commit in caplog.text


@pytest.mark.usefixtures("naruto")
def test_stage_reads_parquet_without_torch(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("recipes/sdxl-naruto-16gb.yaml", tmp_path / paths.PARAMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-home"))
    assert "torch" not in modules_after_run("download_dataset")
    assert len(paths.RAW_CAPTIONS.read_text(encoding="utf-8").splitlines()) == len(CAPTIONS)


def test_pinned_commit_gives_no_warning(
    naruto: tuple[str, list[bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(download(hub_config(revision=naruto[0]), tmp_path / "raw")) == 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_source_knows_its_size_before_it_is_read(naruto: tuple[str, list[bytes]]) -> None:
    source = open_source(hub_config(max_examples=3))
    assert source.num_examples == 3
    assert source.num_bytes > sum(map(len, naruto[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, "download.image_column is 'picture'.*has only image, text"),
        ({"caption_column": "caption"}, "download.caption_column is 'caption'.*has only image, text"),
        ({"caption_column": "image"}, "download.caption_column: row 0 .* has no text in 'image' but dict"),
        ({"image_column": "text"}, "download.image_column: row 0 .* has no image bytes in 'text'"),
        ({"split": "test"}, "no data for download.split 'test'"),
    ],
)
def test_wrong_column_or_split_is_named(
    naruto: tuple[str, list[bytes]], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    assert naruto
    with pytest.raises(ValueError, match=message):
        download(hub_config(**changes), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_unknown_revision_is_said_to_be_so(
    naruto: tuple[str, list[bytes]], tmp_path: Path, revision: str
) -> None:
    assert naruto
    with pytest.raises(
        FileNotFoundError, match=f"download.repository: {NARUTO} at revision {revision}: no such"
    ):
        download(hub_config(revision=revision), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_hub_out_of_reach_names_the_recipe_that_needs_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.requests == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=f"{NARUTO} .*cannot be reached.*make recipe NAME=demo"):
        download(hub_config(), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_data_set_that_is_not_parquet_points_to_the_hubs_conversion(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("raise SystemExit")
    hub.add(NARUTO, tmp_path / "script", "datasets")
    with pytest.raises(ValueError, match=r"no parquet file.*refs/convert/parquet"):
        open_source(hub_config())
    assert f"{NARUTO}/script.py" not in hub.downloads()


def test_images_outside_the_parquet_file_are_refused(hub: Hub, tmp_path: Path) -> None:
    write_naruto(tmp_path / "naruto", ["a man"])
    file = next((tmp_path / "naruto/data").iterdir())
    elsewhere = {"bytes": pa.array([None], pa.binary()), "path": pa.array(["/etc/hostname"])}
    image = pa.StructArray.from_arrays(list(elsewhere.values()), list(elsewhere))
    pq.write_table(pa.table({"image": image, "text": ["a man"]}), file)
    hub.add(NARUTO, tmp_path / "naruto", "datasets")
    with pytest.raises(ValueError, match="images must be embedded in the file"):
        download(hub_config(), tmp_path / "raw")


def test_folder_gives_what_its_table_names(folder: Path, tmp_path: Path) -> None:
    rows = download(folder_config(folder, max_examples=2), tmp_path / "raw")
    assert [row["caption"] for row in rows] == ["picture 0", "picture 1"]
    assert (tmp_path / "raw/images" / rows[1]["image"]).read_bytes() == png(1)


def test_table_may_be_csv(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nimages/2.png,"two, by name"\n')
    assert [row["caption"] for row in download(folder_config(folder), tmp_path / "raw")] == ["two, by name"]


def test_path_of_a_private_folder_is_not_recorded(folder: Path, tmp_path: Path) -> None:
    download(folder_config(folder), tmp_path / "raw")
    assert json.loads((tmp_path / "raw/source.json").read_text())["repository"] == "pictures"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "..\\secret.png",
        "/etc/hostname",
        "//etc/hostname",
        ".hidden/0.png",
        "link.png",
        "linked/secret.png",
    ],
)
def test_table_cannot_lead_out_of_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(ValueError, match="is hidden or outside the folder"):
        download(folder_config(folder), tmp_path / "raw")


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000, "images/\ud800.png"])
def test_name_that_no_file_can_have_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(ValueError, match=r"download.repository: row 0 of .* cannot be a file name"):
        download(folder_config(folder), tmp_path / "raw")


@pytest.mark.parametrize(
    "name", ["C:\\Windows\\0.png", "images.zip/0.png", "file:///etc/hostname", "~/0.png"]
)
def test_name_of_another_system_is_a_name_like_any_other(folder: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("0.png", png(0))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(FileNotFoundError, match="which its metadata names"):
        download(folder_config(folder), tmp_path / "raw")


@pytest.mark.parametrize("name", ["-rf", "--help.png", "$(touch owned).png", "; rm 0.png", "a\nb.png"])
def test_odd_name_is_given_to_nobody(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(png(0))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert len(download(folder_config(folder), tmp_path / "raw")) == 1
    (image,) = (tmp_path / "raw/images").iterdir()
    assert image.read_bytes() == png(0)
    assert re.fullmatch(r"00000-[0-9a-f]{12}\.png", image.name)


def test_file_of_a_hub_repository_cannot_lead_out_of_the_cache(hub: Hub, tmp_path: Path) -> None:
    write_naruto(tmp_path / "good", ["a fox"])
    repository = hub.add(NARUTO, tmp_path / "good", "datasets")
    (parquet,) = (content for name, content in repository.files.items() if name.endswith(".parquet"))
    repository.files["../../../../evil.parquet"] = parquet
    with pytest.raises(ValueError, match=r"evil\.parquet|pointer path"):
        download(hub_config(), tmp_path / "raw")
    assert list(tmp_path.rglob("evil.parquet")) == []


def test_missing_image_table_or_row_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "images/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no 'images/1\.png'"):
        download(folder_config(folder), tmp_path / "raw")
    (folder / "metadata.jsonl").write_text("{oops")
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1 is not JSON"):
        download(folder_config(folder), tmp_path / "raw")
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither metadata\.jsonl nor metadata\.csv"):
        download(folder_config(folder), tmp_path / "raw")


def test_new_download_replaces_the_old_one_whole(folder: Path, tmp_path: Path) -> None:
    download(folder_config(folder), tmp_path / "raw")
    download(folder_config(folder, max_examples=1), tmp_path / "raw")
    assert len(list((tmp_path / "raw/images").iterdir())) == 1


def test_interrupted_download_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def interrupted() -> Iterator[RawExample]:
        yield RawExample(png(0), ["one"])
        raise KeyboardInterrupt

    source = replace(open_source(folder_config(folder)), examples=interrupted())
    with pytest.raises(KeyboardInterrupt):
        list(download_dataset(source, tmp_path / "raw"))
    assert not (tmp_path / "raw").exists()
    assert not list(tmp_path.glob(".download-*"))


def test_full_disk_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GiB free"):
        download(folder_config(folder), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
