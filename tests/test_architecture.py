"""The house as a test: which way imports go, what importing costs, and what no file may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sealmark
from sealmark.core import registry

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sealmark.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}

# Words that everybody uses, and the keyed streams that a secret hands out; they lead to nothing else.
OPEN = {"core.errors", "core.files", "core.canonical", "core.card", "crypto.random"}
LAWS = {"core", "stats"}
SCHEMES = LAWS | {"codes", "blackbox"}
MAY_IMPORT: dict[str, set[str]] = {
    "crypto": set(),
    "core": set(),
    "stats": {"core"},
    "codes": LAWS,
    "blackbox": LAWS | {"codes"},
    "ownership": SCHEMES,
    "authorization": SCHEMES,
    "identity": SCHEMES,
    "integrity": SCHEMES,
    "attacks": SCHEMES,
    "tasks": {"core"},
    "evaluate": SCHEMES | {"ownership", "authorization", "identity", "integrity", "attacks", "tasks"},
    "formats": {"crypto", "core"},
    "vault": {"formats", "crypto", "core"},
}
ABOVE_ALL = {"runtime", "cli", "testing"}  # may import everything; nothing else imports them
EXCEPTIONS = {
    "authorization/sealed.py": {"formats", "crypto"},  # the lock that is encryption
    "evaluate/demo_job.py": {"formats", "crypto"},  # acts out the whole product, evidence included
}


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_module(name: str) -> bool:
    path = PACKAGE / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in a file, by its full name; relative imports start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _ours(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a file imports, such as ``core.errors``."""
    for name in _imported(tree):
        if name.startswith("sealmark."):
            inner = name.removeprefix("sealmark.")
            inner = sealmark._HOMES.get(inner, inner)
            yield inner if _is_module(inner) else inner.rpartition(".")[0]


def _arrows() -> Iterator[tuple[str, str]]:
    """(file, module of ours that it imports), but for what everybody may import."""
    for file, tree in TREES.items():
        yield from ((file, module) for module in _ours(tree) if module and module not in OPEN)


def _calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by its full dotted name with import aliases resolved."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            aliases |= {a.asname or a.name: base + a.name for a in node.names if base or a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            head, dot, rest = name.partition(".")
            yield aliases.get(head, head) + dot + rest, node


def test_the_import_reader_sees_every_form_of_import() -> None:
    tree = ast.parse(
        "import sealmark.crypto.random\nfrom sealmark.stats import nulls\nfrom sealmark import scheme\n"
        "from sealmark.core.errors import FormatError\ndef f():\n    from sealmark.codes.tardos import x\n"
    )
    expected = {"crypto.random", "stats.nulls", "core.registry", "core.errors", "codes.tardos"}
    assert set(_ours(tree)) == expected


def test_the_call_reader_sees_through_aliases() -> None:
    tree = ast.parse("import numpy as np\nfrom torch import load as l\nnp.random.seed(0)\nl('x')\nprint(1)")
    assert {name for name, _ in _calls(tree)} == {"numpy.random.seed", "torch.load", "print"}


def test_every_folder_has_a_place_in_the_house() -> None:
    folders = {Path(file).parts[0] for file in TREES if "/" in file}
    assert folders - MAY_IMPORT.keys() - ABOVE_ALL == set()


def test_no_arrow_runs_back() -> None:
    wrong = []
    for file, module in _arrows():
        own = Path(file).parts[0]
        allowed = MAY_IMPORT.get(own, set()) | EXCEPTIONS.get(file, set()) | {own}
        if own not in ABOVE_ALL and _package(module) not in allowed:
            wrong.append(f"{file} imports {module}")
    assert wrong == []


def test_every_exception_is_still_needed() -> None:
    used = {file: {_package(module) for f, module in _arrows() if f == file} for file in EXCEPTIONS}
    assert all(used[file] & EXCEPTIONS[file] for file in EXCEPTIONS)


def test_the_rules_themselves_have_no_circle() -> None:
    order = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert order.index("core") < order.index("stats") < order.index("ownership") < order.index("evaluate")
    assert order.index("crypto") < order.index("formats") < order.index("vault")


def test_what_everybody_may_import_imports_nothing_else_of_ours() -> None:
    for module in OPEN:
        assert set(_ours(TREES[module.replace(".", "/") + ".py"])) <= OPEN


def test_nobody_imports_relatively() -> None:
    assert [file for file, tree in TREES.items() if any(n.startswith(".") for n in _imported(tree))] == []


def test_only_crypto_imports_cryptography() -> None:
    using = {
        Path(file).parts[0]
        for file, tree in TREES.items()
        if any(_package(name) == "cryptography" for name in _imported(tree))
    }
    assert using == {"crypto"}


def test_importing_sealmark_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time(); import sealmark\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, torch, numpy = run.stdout.split()
    assert float(seconds) < 0.3
    assert (torch, numpy) == ("False", "False")


def test_every_public_name_is_there() -> None:
    assert sealmark.__all__ == sorted(sealmark.__all__)
    assert dir(sealmark) == sealmark.__all__
    for name in sealmark.__all__:
        assert getattr(sealmark, name) is not None
    namespace: dict[str, object] = {}
    exec("from sealmark import *", namespace)  # noqa: S102
    assert namespace.keys() - {"__builtins__"} == set(sealmark.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sealmark.nonsense  # noqa: B018


def test_the_front_door_has_at_most_40_lines() -> None:
    assert len((PACKAGE / "__init__.py").read_text("utf-8").splitlines()) <= 40


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


SEEDING = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed"}
DRAWING = {
    f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal")
}


def test_nobody_touches_global_random_state() -> None:
    wrong = []
    for file, tree in TREES.items():
        wrong += [f"{file}: random" for name in _imported(tree) if _package(name) == "random"]
        for name, call in _calls(tree):
            legacy = re.match(r"numpy\.random\.(?!default_rng|Generator)", name)
            seeding = name in SEEDING and file != "core/modes.py"
            drawing = name in DRAWING and "generator" not in {k.arg for k in call.keywords}
            if legacy or seeding or drawing:
                wrong.append(f"{file}: {name}")
    assert wrong == []


def test_nobody_reads_or_writes_pickles() -> None:
    pickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = [
        f"{file}: {name}"
        for file, tree in TREES.items()
        for name in _imported(tree)
        if _package(name) in pickling and file != "testing/general.py"  # tries whether a secret refuses
    ]
    for file, tree in TREES.items():
        for name, call in _calls(tree):
            safe = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.save" or (name == "torch.load" and safe.get("weights_only") != "True"):
                wrong.append(f"{file}: {name}")
            if name == "numpy.load" and safe.get("allow_pickle", "False") != "False":
                wrong.append(f"{file}: {name}")
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    printing = {file for file, tree in TREES.items() for name, _ in _calls(tree) if name == "print"}
    assert {file for file in printing if not file.startswith("cli/")} == set()


def test_nothing_is_left_to_do() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert [path.name for path in FILES if unfinished.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("kind", ["scheme", "attack"])
def test_every_scheme_and_every_attack_has_a_test_file_of_its_name(kind: registry.Kind) -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(registry.items(kind)) - tested == set()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    place = re.compile(rb"/(?:root|work|home/\w+|Users/\w+|tmp/\w+)\b")
    assert place.search(b"open('/home/" + b"somebody/model')")
    wrong = [
        name
        for name in listed.stdout.splitlines()
        if (ROOT / name).is_file() and place.search((ROOT / name).read_bytes())
    ]
    assert wrong == []
