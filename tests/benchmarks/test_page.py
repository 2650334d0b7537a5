"""The sections of the page are replaced one by one."""

from __future__ import annotations

import pytest

from tests.benchmarks.__main__ import PAGE, PARTS
from tests.benchmarks.page import replace_section, table

TEXT = """# Page

<!-- measured: one -->
old

| a |
<!-- end: one -->

By hand.

<!-- measured: two -->
<!-- end: two -->
"""


def test_a_section_is_replaced_and_nothing_else() -> None:
    """What is written by hand stays, and so does what other parts wrote."""
    page = replace_section(TEXT, "two", ["", r"new \\1", ""])
    assert page == TEXT.replace("two -->\n", "two -->\n\nnew \\\\1\n\n", 1)
    page = replace_section(page, "one", ["1"])
    assert "old" not in page
    assert "By hand." in page
    assert replace_section(page, "one", ["1"]) == page


@pytest.mark.parametrize("name", ["three", "on"])
def test_a_section_must_be_there(name: str) -> None:
    """Nothing is appended where nobody looks for it."""
    with pytest.raises(ValueError, match=f"measured: {name}"):
        replace_section(TEXT, name, [])


def test_a_section_must_be_there_once() -> None:
    """Which of two is meant cannot be known."""
    with pytest.raises(ValueError, match="once"):
        replace_section(TEXT + TEXT, "one", [])


@pytest.mark.parametrize("name", PARTS)
def test_the_page_has_a_section_for_each_part(name: str) -> None:
    """A measurement of an hour shall not fail at its end."""
    assert "text of it" in replace_section(PAGE.read_text(), name, ["text of it"])


def test_a_table_has_a_header_and_rows() -> None:
    """The first heading may be empty."""
    assert table(("", "b"), [["1", "2"]]) == ["| | b |", "| --- | --- |", "| 1 | 2 |"]
