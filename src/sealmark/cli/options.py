"""The options that commands share, and what every command has in common.

A command takes a shared group as one parameter whose type is a dataclass here; `command` turns each
field into an option, and an error of ours into one line and its exit code.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from sealmark.cli.output import Output, report_error
from sealmark.core.errors import ParameterError, SealmarkError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from sealmark.core.task import Task


@dataclass(frozen=True)
class Settings:
    """A scheme's or an attack's parameters: a TOML file, then single values."""

    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter; repeat for more."),
    ] = None
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Parameters as a TOML file.")] = None

    def parameters(self) -> dict[str, Any]:
        """Names and values; the registry checks both.

        Raises:
            ParameterError: not NAME=VALUE, no such file, or not TOML.
        """
        found = {} if self.config is None else _read_toml(self.config)
        for text in self.set or []:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise ParameterError("bad --set", expected="NAME=VALUE", found=repr(text))
            found[name.strip()] = value
        return found


@dataclass(frozen=True)
class Architecture:
    """Which network the weights belong to."""

    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A task: its network and its data."),
    ] = None
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="MODULE:FACTORY", help="Your own network, as package.module:function."),
    ] = None

    @property
    def given(self) -> bool:
        """Whether a network was named at all."""
        return self.task is not None or self.factory is not None

    def load_task(self) -> Task | None:
        """The task with its data, where one was named.

        Raises:
            UnknownNameError: no such task.
        """
        from sealmark.core import registry

        return None if self.task is None else registry.task(self.task)

    def build(self, task: Task | None, *, rng: np.random.Generator) -> nn.Module:
        """An untrained network.

        Raises:
            ParameterError: none was named.
        """
        from sealmark.runtime.models import build_model

        if self.factory is not None:
            return build_model(self.factory, rng=rng)
        if task is None:
            raise ParameterError(
                "which network?", expected="--task NAME or --model package.module:factory", found="neither"
            )
        return task.model(rng)

    def load(self, task: Task | None, weights: Path, *, device: str = "cpu", resize: bool = False) -> nn.Module:
        """The network with stored weights, on a device; with ``resize``, as wide as they are.

        Raises:
            ParameterError: no network was named, or no such file.
            ModelMismatchError: the weights are not of this network.
        """
        import numpy as np

        from sealmark.core.modes import pick_device
        from sealmark.runtime.models import load_weights

        place = pick_device(device)
        model = self.build(task, rng=np.random.default_rng(0))
        load_weights(model, weights, resize=resize)
        return model.to(place)


@dataclass(frozen=True)
class Training:
    """Where and how something trains."""

    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu"
    seed: Annotated[int, typer.Option(min=0, help="For training; secrets never come from it.")] = 0

    def rng(self) -> np.random.Generator:
        """A fresh generator from the seed."""
        import numpy as np

        return np.random.default_rng(self.seed)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command: spread its groups of options, and catch what we raise on purpose.

    A `SealmarkError` becomes one line on stderr and its exit code; any other exception is a fault of
    ours and keeps its traceback.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    }
    fields = {name: _fields(kind) for name, kind in groups.items()}

    @functools.wraps(function)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in fields[name]})
        output = next((value for value in values.values() if isinstance(value, Output)), Output())
        try:
            function(**values)
        except SealmarkError as error:
            report_error(error, json_form=output.json)
            raise typer.Exit(error.exit_code) from None

    own = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=hints[p.name]) for p in own if p.name not in groups]
    spread = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for group in fields.values()
        for name, (kind, default) in group.items()
    ]
    plain = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in plain]
    run.__signature__ = inspect.Signature(plain + spread)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in plain + spread}
    return run


def _fields(kind: type[Any]) -> dict[str, tuple[Any, Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: (hints[field.name], field.default) for field in dataclasses.fields(kind)}


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ParameterError("no such file", expected="a TOML file of parameters", found=path)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not TOML", expected="lines like strength = 0.5", found=error) from None
