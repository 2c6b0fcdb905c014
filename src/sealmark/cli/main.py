"""The program ``sealmark``: every command, in panels that say what it is for."""

from __future__ import annotations

import typer

from sealmark import __version__
from sealmark.cli import (
    authorization,
    credentials,
    evaluation,
    guidance,
    identity,
    integrity,
    licenses,
    listing,
    ownership,
    tracing,
    vaults,
)

_PANELS = {
    "Vault: start here": [vaults.init],
    "Ownership: is this model mine?": [ownership.keygen, ownership.embed, ownership.verify],
    "Authorization: who may use it?": [authorization.lock, authorization.unlock, licenses.open_, licenses.device],
    "Identity: who has it, who leaked it?": [
        identity.issue,
        credentials.authenticate,
        licenses.list_,
        licenses.renew,
        identity.revoke,
        tracing.trace,
    ],
    "Integrity: was it changed?": [integrity.seal, integrity.check, integrity.restore],
    "Evaluate and show": [evaluation.demo, evaluation.attack, evaluation.report],
    "What there is": [guidance.recommend, listing.schemes, listing.attacks, listing.tasks],
}

# a traceback with local variables would show secrets
app = typer.Typer(
    name="sealmark",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(vaults.app, name="vault", rich_help_panel="Vault: start here")
for _panel, _commands in _PANELS.items():
    for _function in _commands:
        # open_ and list_, as Python has these names
        app.command(_function.__name__.rstrip("_"), rich_help_panel=_panel)(_function)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sealmark {__version__}")
        raise typer.Exit


@app.callback()
def _sealmark(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    """Protect trained neural networks as intellectual property, from training to court.

    Keys, secrets, users and evidence live in a vault: `sealmark init` makes one. `sealmark demo` shows the
    whole job. Results go to stdout, everything else to stderr.

    Exit codes: 0 done or match, 1 no match or refused, 2 wrong call, 3 bad file, 4 service or disk.
    """


def main() -> None:
    """Run the command line."""
    app()
