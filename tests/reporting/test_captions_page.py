from html.parser import HTMLParser

import pandas as pd
import pytest

from sdxl_lora.config import CaptionsConfig
from sdxl_lora.data.captions import clean_captions
from sdxl_lora.reporting.captions_page import MAX_ROWS, differences
from sdxl_lora.reporting.captions_page import render_captions_page as render

CONFIG = CaptionsConfig(
    trigger="<b>style</b>",
    artefacts=["arafed"],
    min_words=2,
    max_tokens=9,
    too_long="truncate",
)
ATTACKS = [
    "<script>alert(1)</script> an arafed man",
    '"><img src=x onerror=alert(1)> an arafed man',
    "{{ 7 * 7 }} {% raw %} an arafed man",
]


class Page(HTMLParser):
    """The elements of a page, and the text of each cell of its tables, by the heading above it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.heading = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("h2", "td", "style"):
            self.inside = tag
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.inside = ""
            self.tables.setdefault(self.heading, []).append([])
        if tag == "td":
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "tr", "style"):
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "h2":
            self.heading += data
        elif self.inside == "td":
            self.tables[self.heading][-1][-1] += data

    def rows(self, heading: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[heading] if row]


def page_of(*captions: str) -> Page:
    frame = pd.DataFrame(
        {"id": f"{n}", "image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)
    )
    _, report = clean_captions(frame, CONFIG, lambda texts: [len(text.split()) + 2 for text in texts])
    return Page(render(report, CONFIG))


def test_page_says_what_was_changed_rejected_and_repeated() -> None:
    page = page_of(
        "an arafed man with a hat", "a man with a hat", "a man with a hat", "cat", "a red fox, a red fox"
    )
    assert page.rows("Changed") == [
        ["0.png", "an arafed a man with a hat", "artefacts"],
        ["4.png", "a red fox, a red fox", "repeated_phrases"],
    ]
    assert page.rows("Rejected") == [["3.png", "cat", "1 words, captions.min_words is 2"]]
    assert page.rows("Captions of several images") == [["a man with a hat", "3", "0.png, 1.png, 2.png"]]
    assert page.rows("Most frequent phrases") == [["a man with a hat", "3"]]
    assert page.rows("Rules") == [["artefacts", "1"], ["repeated_phrases", "1"]]


def test_tables_without_rows_say_so() -> None:
    page = page_of("a man", "one fox")
    assert page.rows("Rejected") == [["None."]]
    assert page.rows("Changed") == [["None."]]
    assert page.rows("Rules") == [["No caption was changed."]]


@pytest.mark.parametrize("attack", ATTACKS)
def test_captions_are_text_and_nothing_else(attack: str) -> None:
    harmless = page_of("xx an arafed man", "xx", "a dog")
    page = page_of(attack, attack.split()[0], "a dog")
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements}
    assert not any(name.startswith("on") or name == "src" for _, names in page.elements for name in names)
    assert attack.split()[0] in page.rows("Changed")[0][1]


def test_nothing_is_loaded_or_run() -> None:
    page = page_of("a man")
    policy = [names["content"] for tag, names in page.elements if names.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    links = [value for _, names in page.elements for name, value in names.items() if name.endswith("href")]
    assert all(value is not None and value.startswith("#") for value in links)


def test_lengths_are_shown_as_a_histogram() -> None:
    page = page_of("a man", "a red fox", "a blue fox")
    ids = [names.get("id") for tag, names in page.elements if tag == "g"]
    assert {"tokens-5", "tokens-6"} <= set(ids)  # with trigger, start and end


def test_differences_join_to_both_captions() -> None:
    before, after = "an arafed man in a hat in a hat", "a man in a hat"
    parts = list(differences(before, after))
    for wanted, caption in ((("kept", "del"), before), (("kept", "ins"), after)):
        text = "".join(part.text for part in parts if part.kind in wanted)
        assert text.split() == caption.split()


def test_long_tables_are_cut_and_say_how_much_is_missing() -> None:
    page = page_of(*(f"an arafed man {number}" for number in range(MAX_ROWS + 5)))
    assert len(page.rows("Changed")) == MAX_ROWS
