"""The documentation is true: its snippets, outputs, links, tests and tables are what it says."""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import aioworkq
from aioworkq import ConsumerState, ConsumerStatistics, ProducerStatistics, Queue, WorkerStatistics
from aioworkq.amqp import publish_channel
from aioworkq.message import OUR_HEADERS
from tests.test_examples import OUTPUT, OUTPUT_WITH_OWN_NODE

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
GUARANTEES = ROOT / "docs" / "explanation" / "guarantees.md"

CHECKED_LANGUAGES = {"python", "text", "toml", "ini", "json"}
"""Blocks of these languages say where they come from. Others are what somebody types."""

FREE_BLOCKS = {
    # what `make demo` ends with; tests/test_examples.py checks it to the letter
    "published   180 confirmed\nhandled     180 distinct\nlost          0\nduplicates    0\n",
}


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: The page.
        marker: What the comment above the block says, such as ``from: examples/stop.py``.
        language: What the fence says.
        text: What is in it.
    """

    page: Path
    marker: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.marker or self.text[:40]}"


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    pattern = r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.finditer(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page, match[1] or "", match[2], match[3]) for match in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def is_part(snippet: str, text: str) -> bool:
    """Say whether the snippet is a contiguous run of the text's lines, indented as it may be."""
    wanted = textwrap.dedent(snippet).splitlines()
    lines = text.splitlines()
    return any(
        textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines() == wanted
        for start in range(len(lines) - len(wanted) + 1)
    )


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_what_an_example_says_or_prints(block: Block) -> None:
    """A snippet is a part of an example, and an output is what that example prints."""
    kind, _, name = block.marker.partition(": ")
    if kind == "from":
        assert is_part(block.text, (ROOT / name).read_text())
    elif kind == "output":
        outputs = OUTPUT | OUTPUT_WITH_OWN_NODE
        assert is_part(block.text, outputs[Path(name).name])
    else:
        assert block.language not in CHECKED_LANGUAGES or block.text in FREE_BLOCKS


def anchors_of(page: Path) -> set[str]:
    """Return what a link to this page may point to after its ``#``."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    """Every relative link leads to a file of the repository, and to a heading of it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    defined = set(re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([^]]+)\]", text)) <= defined


def test_every_page_is_linked() -> None:
    """The index of the documentation names every page."""
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*/*.md"):
        assert f"({page.relative_to(ROOT / 'docs')})" in index


def test_pages_that_the_code_names_exist() -> None:
    """A page that a docstring refers to is there."""
    for module in ROOT.glob("aioworkq/**/*.py"):
        for name in re.findall(r"docs/[\w/-]+\.md", module.read_text()):
            assert (ROOT / name).exists(), (module, name)


def test_the_tests_that_show_the_guarantees_exist() -> None:
    """Every test that the table of guarantees names is there."""
    names = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", GUARANTEES.read_text())
    assert names
    for path, test in names:
        assert (ROOT / path).exists(), path
        if test:
            source = (ROOT / path).read_text()
            assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), test


def first_column(page: str, heading: str) -> list[str]:
    """Return the names in backticks of the first column of the tables under a heading."""
    text = (ROOT / "docs" / "reference" / page).read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize(
    "kind", [ProducerStatistics, WorkerStatistics], ids=lambda kind: kind.__name__
)
def test_statistics_are_complete(kind: type[Any]) -> None:
    """The page has every number that a producer and a worker show."""
    assert first_column("statistics.md", f"`{kind.__name__}`") == list(kind.__struct_fields__)


def test_statistics_of_a_consumer_are_complete() -> None:
    """The page has every number that a consumer shows."""
    names = first_column("statistics.md", "`ConsumerStatistics`")
    names.remove("is_subscribed")  # computed
    assert names == list(ConsumerStatistics.__struct_fields__)


def test_sums_of_a_worker_are_complete() -> None:
    """The page has every sum over all consumers."""
    page = (ROOT / "docs" / "reference" / "statistics.md").read_text()
    sums = page.split("by the name of its queue |\n")[1].split("are the sums")[0]
    assert re.findall(r"`(\w+)`", sums) == [
        name for name, value in vars(WorkerStatistics).items() if isinstance(value, property)
    ]


def test_states_are_complete() -> None:
    """The page has every state of a consumer."""
    names = first_column("statistics.md", "`ConsumerState`")
    assert names == [state.name for state in ConsumerState]


def test_attributes_of_a_queue_are_complete() -> None:
    """The page has every attribute of a queue."""
    text = (ROOT / "docs" / "reference" / "queues.md").read_text()
    table = text.split("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert names == [field.name for field in fields(Queue)]


def test_headers_are_complete() -> None:
    """The page has every header that we write."""
    names = first_column("headers.md", "Headers that we write")
    number = publish_channel._NUMBER_HEADER
    assert sorted(names) == sorted([*OUR_HEADERS, number])


def test_the_changelog_has_this_version() -> None:
    """The changelog tells of the version that the package has."""
    assert aioworkq.__version__ in (ROOT / "CHANGELOG.md").read_text()
