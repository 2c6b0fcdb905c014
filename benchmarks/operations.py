"""What is measured: each takes a folder that holds a model, and does one thing to it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch

from sealmark.core.weights import weights_of
from sealmark.formats.sealed import open_sealed, seal_file
from sealmark.formats.secret import read_secret, write_secret
from sealmark.identity.spread_spectrum import SpreadSpectrum

KEY = bytes(range(32))
TENSOR_MIB = 64


def prepare(folder: Path, mib: int) -> None:
    """Normal float32 matrices of 64 MiB, ``mib`` MiB in all; the same sealed; a secret for issuing."""
    size = TENSOR_MIB << 20
    header = {
        f"layer{i:03d}.weight": {
            "dtype": "F32",
            "shape": [4096, size // 4 // 4096],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(mib // TENSOR_MIB)
    }
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "plain").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in header:
            file.write((0.02 * rng.standard_normal(size // 4, np.float32)).data)
    seal_file(folder / "plain", folder / "sealed", KEY, model="m")
    write_secret(SpreadSpectrum().enroll(folder / "plain"), folder / "secret")


def seal(folder: Path) -> None:
    seal_file(folder / "plain", folder / "new", KEY, model="m")


def seal_unsynced(folder: Path) -> None:
    with mock.patch("os.fsync"):
        seal(folder)


def unseal(folder: Path) -> None:
    with open_sealed(folder / "sealed") as file:
        file.decrypt_to(KEY, folder / "new")


def unseal_memory(folder: Path) -> object:
    with open_sealed(folder / "sealed") as file:
        return file.read_all(KEY)


def issue(folder: Path) -> None:
    SpreadSpectrum().issue_file(folder / "plain", folder / "new", read_secret(folder / "secret"), "alice")


def issue_unsynced(folder: Path) -> None:
    with mock.patch("os.fsync"):
        issue(folder)


def digest(folder: Path) -> None:
    weights_of(folder / "plain").digest()


def cp(folder: Path) -> None:
    subprocess.run(["cp", folder / "plain", folder / "new"], check=True)


def cp_synced(folder: Path) -> None:
    cp(folder)
    with (folder / "new").open("rb") as file:
        os.fsync(file.fileno())


def read(folder: Path) -> object:
    """Into fresh memory."""
    target = np.empty((folder / "plain").stat().st_size, np.uint8)
    with (folder / "plain").open("rb", buffering=0) as file:
        done = 0
        while count := file.readinto(memoryview(target)[done:]):
            done += count
    return target


def load_file(folder: Path) -> object:
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / "plain").items()}


_WRITING = (seal, seal_unsynced, unseal, issue, issue_unsynced, cp, cp_synced)
_READING = (unseal_memory, digest, read, load_file)
OPERATIONS: dict[str, Callable[[Path], object]] = {work.__name__: work for work in (*_WRITING, *_READING)}
