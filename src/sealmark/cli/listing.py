"""``schemes``, ``attacks``, ``tasks``: what there is, read from the source without importing it."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from sealmark.cli.options import command
from sealmark.cli.output import Output, facts, listing
from sealmark.core import registry

_Name = Annotated[str | None, typer.Argument(help="Show this one whole.")]


@command
def schemes(name: _Name = None, *, output: Output) -> None:
    """List the protection schemes, or show one's card."""
    _show("scheme", name, output, ["name", "function", "scenario", "capacity", "title", "grade"])


@command
def attacks(name: _Name = None, *, output: Output) -> None:
    """List the attacks, or show one's card."""
    _show("attack", name, output, ["name", "goal", "level", "needs_data", "copies", "title"])


@command
def tasks(*, output: Output) -> None:
    """List the ready tasks: a network and its data, for --task."""
    found = [{"name": name, "title": _docstring(item)} for name, item in registry.items("task").items()]
    rows = [[entry["name"], entry["title"]] for entry in found]
    output.product({"tasks": found}, listing(["name", "title"], rows))


def card_of(item: registry.Item) -> dict[str, Any]:
    """A card as plain JSON, with the name and every parameter's default."""
    return {"name": item.name, **item.card().as_dict(), "defaults": _defaults(item)}


def _show(kind: registry.Kind, name: str | None, output: Output, columns: list[str]) -> None:
    if name is not None:
        card = card_of(registry.item(kind, name))
        output.product(card, facts({key: _text(value) for key, value in card.items() if value not in ((), "")}))
        return
    cards = [card_of(item) for item in registry.items(kind).values()]
    rows = [[_text(card[column]) for column in columns] for card in cards]
    output.product({f"{kind}s": cards}, listing([column.replace("_", " ") for column in columns], rows))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key} = {text}" for key, text in value.items()) or "none"
    if isinstance(value, (tuple, list)):
        return "\n".join(map(str, value)) if len(value) > 1 else str(*value)
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _defaults(item: registry.Item) -> dict[str, str]:
    """Each parameter and its default, in Python's spelling."""
    if not isinstance(item.module, str):
        fields = dataclasses.fields(item.load())
        return {field.name: repr(field.default) for field in fields}
    classes = [node for node in _source(item.module).body if isinstance(node, ast.ClassDef)]
    return _fields(item.module, next(node for node in classes if any(map(_assigns_card, node.body))))


def _fields(module: str, node: ast.ClassDef) -> dict[str, str]:
    """Fields and defaults of a class and, before them, of its bases, wherever in the package these stand."""
    tree, found = _source(module), dict[str, str]()
    homes = {
        alias.name: part.module
        for part in tree.body
        if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("sealmark.")
        for alias in part.names
    }
    for base in (ast.unparse(base) for base in reversed(node.bases)):
        home = homes.get(base) or module
        for other in _source(home).body:
            if isinstance(other, ast.ClassDef) and other.name == base:
                found |= _fields(home, other)
    return found | {
        part.target.id: ast.unparse(part.value) if part.value else ""
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        if not ast.unparse(part.annotation).startswith("ClassVar") and part.target.id[0] != "_"
    }


def _assigns_card(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["card"]


def _docstring(item: registry.Item) -> str:
    if not isinstance(item.module, str):
        return str(item.load().__doc__ or "").partition("\n")[0]
    return (ast.get_docstring(_source(item.module)) or "").partition("\n")[0]


def _source(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)  # imports the packages above it, which are empty
    path = Path(str(spec.origin if spec else ""))
    return ast.parse(path.read_text("utf-8"))
