"""What the tests of reports share: reading a page strictly."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

import pytest

_VOID = {"meta", "link", "br", "hr", "img", "input"}
_LINKS = {"src", "href", "srcset", "xlink:href", "action", "data", "poster", "formaction", "background"}


class Page(HTMLParser):
    """A page whose tags must close in order; remembers its text, tags and links."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.classes: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"unclosed {self.open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in _LINKS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.classes += [value or "" for name, value in attrs if name == "class"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.pieces.append(data)


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Page]:
    return Page
