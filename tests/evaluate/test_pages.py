"""Pages made from the cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealmark.core import registry
from sealmark.evaluate.pages import main, pages

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_committed_page_is_what_the_cards_say(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == pages()[name], "run make pages"


def test_no_page_is_left_of_a_scheme_that_is_gone() -> None:
    found = {path.relative_to(DOCS).as_posix() for path in (DOCS / "schemes").glob("*.md")}
    assert found == {name for name in pages() if name.startswith("schemes/")}


def test_a_page_says_what_breaks_the_scheme(tmp_path: Path) -> None:
    main(tmp_path)
    for name, item in registry.items("scheme").items():
        text = (tmp_path / "schemes" / f"{name}.md").read_text("utf-8")
        assert f"# {name}\n" in text
        assert all(f"- {attack}" in text for attack in item.card().broken_by)


def test_every_patent_of_a_card_is_listed() -> None:
    for name, item in registry.items("scheme").items():
        for claim in item.card().patents:
            assert f"| [{name}](schemes/{name}.md) | {claim} |" in pages()["patents.md"]
