"""The page of a benchmark: whole, on its own, nothing left out and nothing let through."""

import re
from html.parser import HTMLParser
from typing import Any

from fastidmm.bench.figures import Rows, measured, result
from fastidmm.bench.page import html

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text; unclosed tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def loaders() -> dict[str, Any]:
    """A table with a row of every kind."""
    rows: Rows = {
        "<b>bold</b> & 'co'": {
            "status": "ok",
            "images_per_second": measured([50, 100, 80]),
            "stall": measured([0.25]),
        },
        "slow": {"status": "ok", "images_per_second": measured([20.0]), "stall": None},
        "absent": {"status": "missing: <install> it"},
    }
    return result("loader", "three <loaders>", {"loaders": rows}, settings={}, notes=["a <note>"])


def test_the_page_is_complete_in_itself() -> None:
    text = html(loaders())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "srcset"} & {name for _, attrs in page.tags for name in attrs}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text


def test_every_row_is_on_it_and_names_are_escaped() -> None:
    page = Page(html(loaders()))
    for word in ("<b>bold</b> & 'co'", "slow", "absent", "missing: <install> it", "a <note>"):
        assert word in page.words, word
    assert [tag for tag, _ in page.tags].count("b") == 1  # of the legend
    assert "share of a training step spent waiting for data" in page.words
    assert page.words.count("80.0") == 2 and page.words.count("(50.0 to 100)") == 2
    assert "25.0%" in page.words and "images/s, more is better" in page.words


def test_bars_are_to_scale() -> None:
    page = Page(html(loaders()))
    styles = [attrs["style"] for _, attrs in page.tags if "style" in attrs]
    # To the right end of the longest spread, 100 images/s.
    assert styles == [
        "width:80.00%",
        "left:50.00%;width:50.00%",
        "width:20.00%",
        "left:20.00%;width:0.00%",
    ]


def test_several_subjects_share_a_page() -> None:
    one, nothing = loaders(), {"broken": {"status": "failed: x"}}
    bad = result("views", "says more", {"views": nothing}, settings={})
    two: Rows = {"a": {"status": "ok", "milliseconds": 0.0}}
    flat = result("loss", "two tables", {"small": two, "large": two}, settings={})
    subjects = {"loader": one, "views": bad, "loss": flat}
    words = Page(
        html({"subjects": subjects, "subject": "all", "surroundings": one["surroundings"]})
    ).words
    for word in ("Loader", "Views", "Loss", "small", "large", "failed: x", "ms, less is better"):
        assert word in words, word
    assert words.count("Where") == 1
