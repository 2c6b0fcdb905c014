"""Properties of seals that work on weight files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from sealmark.core.errors import TamperedError
from sealmark.core.evidence import Verdict
from sealmark.core.integrity import WeightSeal
from sealmark.core.weights import ModelWeights
from sealmark.testing.bench import Bench
from sealmark.testing.general import refuses


def check_file_form(scheme: WeightSeal, bench: Bench) -> None:
    """A file is sealed, checked and restored to the very same bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, sealed, opened = (folder / stem for stem in ("a.safetensors", "b.safetensors", "c.safetensors"))
        save_file(dict(ModelWeights(bench.plain)), plain)
        secret = scheme.seal_file(plain, sealed)
        assert scheme.check(sealed, secret).verdict is Verdict.MATCH
        scheme.restore_file(sealed, opened, secret)
        assert opened.read_bytes() == plain.read_bytes()
        assert refuses(TamperedError, lambda: scheme.restore_file(plain, folder / "d", secret))
        assert not (folder / "d").exists()
