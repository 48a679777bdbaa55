"""Tables as text: columns that line up, notes past them, Markdown that holds any cell."""

from antidote_fast.system.text import number, table

ROWS = [("model", "HS"), ("base", "98.3"), ("a longer one", "6.7", "<- best", None, "noted")]


def test_columns_line_up_and_notes_follow():
    assert table(ROWS).splitlines() == [
        "model           HS",
        "base          98.3",
        "a longer one   6.7  <- best  noted",
    ]
    assert table(ROWS[:2], left=2).splitlines() == ["model  HS  ", "base   98.3"]


def test_markdown_escapes_what_ends_a_cell():
    assert table([("a|b", "c\\d"), ("1", "2")], markdown=True).splitlines() == [
        r"| a\|b | c\\d |",
        "| --- | ---: |",
        "| 1 | 2 |",
    ]


def test_numbers():
    assert [number(2.345), number(None), number(1, 2)] == ["2.3", "-", "1.00"]
