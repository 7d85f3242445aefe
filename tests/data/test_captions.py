import pandas as pd
import pytest

from sdxl_lora.config import CaptionsConfig
from sdxl_lora.data.captions import (
    add_trigger,
    clean_captions,
    collapse_whitespace,
    duplicate_captions,
    frequent_phrases,
    remove_artefacts,
    remove_repeated_phrases,
    remove_repeated_words,
    repair_unicode,
)

ARTEFACTS = ["arafed", "araffe"]


def config(**changes: object) -> CaptionsConfig:
    values = {
        "trigger": None,
        "artefacts": ARTEFACTS,
        "min_words": 2,
        "max_tokens": 20,
        "too_long": "truncate",
    }
    return CaptionsConfig.model_validate({**values, **changes})


def count_tokens(texts: list[str]) -> list[int]:
    return [len(text.split()) + 2 for text in texts]


def table(*captions: str) -> pd.DataFrame:
    rows = [{"id": f"{n}", "image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cafÃ© in paris", "a café in paris"),
        ("Naruto&#39;s friend", "Naruto's friend"),
        ("a man\x00 smiling", "a man smiling"),
        ("cafe\u0301", "café"),
        ("“quoted”", '"quoted"'),
    ],
)
def test_unicode_is_repaired(caption: str, expected: str) -> None:
    assert repair_unicode(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("  a   man ,\n smiling ", "a man, smiling"), ("a man .", "a man."), ("a man", "a man")],
)
def test_whitespace_is_collapsed(caption: str, expected: str) -> None:
    assert collapse_whitespace(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("arafed man with a hat", "man with a hat"),
        ("there is an arafed image of a fox", "there is an image of a fox"),
        ("an araffe man", "a man"),
        ("An arafed dog", "A dog"),
        ("a giraffe in a field", "a giraffe in a field"),
        ("ARAFED cat", "cat"),
        ("arafed, a man", "a man"),
        ("a man, arafed, in a hat", "a man, in a hat"),
        ("an arafed", ""),
    ],
)
def test_words_that_captioners_make_up_are_removed(caption: str, expected: str) -> None:
    assert remove_artefacts(caption, ARTEFACTS) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a a man with with a hat", "a man with a hat"), ("cat cat cat", "cat"), ("that hat", "that hat")],
)
def test_repeated_words_are_kept_once(caption: str, expected: str) -> None:
    assert remove_repeated_words(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a man in a hat in a hat in a hat", "a man in a hat"),
        ("a red car, a red car and a red car", "a red car"),
        ("a man and a woman and a dog", "a man and a woman and a dog"),
    ],
)
def test_repeated_phrases_are_kept_once(caption: str, expected: str) -> None:
    assert remove_repeated_phrases(caption) == expected


def test_trigger_is_put_in_front_once() -> None:
    assert add_trigger("a man", "naruto style") == "naruto style, a man"
    assert add_trigger("Naruto style, a man", "naruto style") == "Naruto style, a man"
    assert add_trigger("style guides", "style guide") == "style guide, style guides"


def test_report_names_every_change_and_rejection() -> None:
    frame = table("arafed man with a hat", "", "cat", "a fine caption", "a a dog")
    cleaned, report = clean_captions(frame, config(), count_tokens)
    assert cleaned["caption"].tolist() == ["man with a hat", "a fine caption", "a dog"]
    assert cleaned["image"].tolist() == ["0.png", "3.png", "4.png"]
    assert [change["rules"] for change in report.changes] == ["artefacts", "repeated_words"]
    assert [(r["image"], r["reason"]) for r in report.rejections] == [
        ("1.png", "empty"),
        ("2.png", "1 words, captions.min_words is 2"),
    ]
    assert report.metrics()["changed_by"] == {"artefacts": 1, "repeated_words": 1}


def test_long_captions_are_counted_with_their_trigger_and_rejected_on_demand() -> None:
    frame = table("one two three four", "one two")
    _, report = clean_captions(frame, config(max_tokens=6, trigger="in style"), count_tokens)
    assert report.truncated == 1
    assert report.tokens == [8, 6]
    strict = config(max_tokens=6, trigger="in style", too_long="reject")
    cleaned, report = clean_captions(frame, strict, count_tokens)
    assert cleaned["caption"].tolist() == ["in style, one two"]
    assert report.rejections[0]["reason"] == "8 tokens, captions.max_tokens is 6"


def test_captions_of_several_images_are_found() -> None:
    kept = [
        ("0.png", "a man"),
        ("1.png", "a dog"),
        ("2.png", "a man"),
        ("3.png", "a man"),
        ("4.png", "a dog"),
    ]
    found = [(duplicate.caption, duplicate.images) for duplicate in duplicate_captions(kept)]
    assert found == [("a man", ["0.png", "2.png", "3.png"]), ("a dog", ["1.png", "4.png"])]


def test_frequent_phrases_are_counted_once_a_caption_and_parts_of_them_left_out() -> None:
    captions = ["A man with a hat, a man with a dog", "a man with a hat", "a man on a horse", "cat"]
    found = dict(frequent_phrases(captions, 10))
    assert found == {"a man": 3, "a man with a hat": 2}
    assert frequent_phrases(captions, 1) == [("a man", 3)]


def test_nothing_left_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(ValueError, match=r"all 1 captions were rejected.*download\.caption_column"):
        clean_captions(table(""), config(), count_tokens)
