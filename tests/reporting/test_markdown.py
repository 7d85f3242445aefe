import pytest

from sdxl_lora.reporting.markdown import code, escape, table


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain words, 1.5 % of a b_c-d", "plain words, 1.5 % of a b_c-d"),
        ("[click](https://evil.example)", r"\[click\](https:\//evil.example)"),
        ("www.evil.example, a@evil.example", r"www\.evil.example, a\@evil.example"),
        ("**bold** _slanted_ ~~struck~~ `code`", r"\*\*bold\*\* \_slanted\_ \~\~struck\~\~ \`code\`"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("# a\n\n## b\x00\x07\u202e", r"\# a \#\# b"),
        ("back\\slash", "back\\\\slash"),
        ("👩\u200d🚀 寿司", "👩\u200d🚀 寿司"),
    ],
)
def test_text_of_others_stays_text(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("text", "span"),
    [("c0ffee", "`c0ffee`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a\n``b", "```a ``b```")],
)
def test_code_span_cannot_be_closed_by_its_text(text: str, span: str) -> None:
    assert code(text) == span


def test_cell_cannot_be_closed_by_its_text() -> None:
    assert table(["a", "b"], [[1, escape("x | y")], [code("p|q"), "\\\\|"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| 1 | x \| y |",
        r"| `p\|q` | \\\| |",
    ]
