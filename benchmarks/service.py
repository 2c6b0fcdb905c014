"""Requests a second of the example service, bare and behind the watermark.

    python benchmarks/service.py [--rounds 7] [--requests 1500] [--out docs/results/service-speed.md]

Both servers are processes of their own and idle while the other is asked; rounds alternate, and the ratios are
of medians: only ratios mean something. A server works on one core, so what it does in a second of processor time
says on a busy machine what requests a second say on a quiet one. A few keep-alive connections ask for one row at
a time, or for a batch, at the published rate of wrong answers, with the detector on and the store in a file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import runpy
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import uvicorn

from sealmark.core import registry
from sealmark.ownership.dawn import Dawn
from sealmark.runtime.answer_store import AnswerStore

EXAMPLE = Path(__file__).parents[1] / "examples" / "service.py"
CONNECTIONS = 4
AIM = 0.8
CASES = [
    ("one row, labels", 1, "labels"),
    ("one row, probabilities", 1, "probabilities"),
    ("32 rows, labels", 32, "labels"),
]


def serve(told: Connection, store: str) -> None:
    """One server; sends its port, and works until the pipe is closed. ``store`` empty for the bare one."""
    torch.set_num_threads(1)
    example, task = runpy.run_path(str(EXAMPLE)), registry.task("digits")
    model = task.model(np.random.default_rng(0))  # untrained: what it answers does not matter here
    if store:
        secret = Dawn().keygen(model, task, rng=np.random.default_rng(1))
        app = example["guarded"](model, secret, AnswerStore(store))
    else:
        app = example["bare"](model)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        told.send(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(run())


def requests_of(rows: int, returns: str, count: int, generator: torch.Generator) -> list[bytes]:
    """Whole requests, as bytes: asking shall cost little. No query comes twice; pixels have 16 levels."""
    made = []
    for i in range(count):
        images = torch.randint(17, (rows, 1, 8, 8), generator=generator) / 16
        body = json.dumps({"inputs": images.tolist()}).encode()
        head = f"POST /predict?returns={returns} HTTP/1.1\r\nhost: x\r\nx-client: c{i % 50}\r\n"
        made.append(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return made


async def ask(port: int, requests: list[bytes]) -> float:
    """Requests a second, over a few connections."""
    waiting = iter(requests)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return len(requests) / (time.perf_counter() - began)


def processor_seconds(pid: int) -> float:
    """What a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(servers: list[tuple[int, int]], rounds: int, count: int) -> list[tuple[str, list[float], list[float]]]:
    """Of each case, bare and guarded: requests a second, the median of rounds, and a second of the server's work.

    Args:
        servers: process and port of the bare and of the guarded one.
        rounds: counted; one more warms up.
        count: requests of one row in a round; fewer of many rows.
    """
    results, generator = [], torch.Generator().manual_seed(0)
    for title, rows, returns in CASES:
        many = max(100, count // (1 + rows // 8))
        speeds: list[list[float]] = [[], []]
        worked = [0.0, 0.0]
        for turn in range(rounds + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                (pid, port), requests = servers[which], requests_of(rows, returns, many, generator)
                before = processor_seconds(pid)
                speed = asyncio.run(ask(port, requests))
                if turn:
                    speeds[which].append(speed)
                    worked[which] += processor_seconds(pid) - before
        results.append((title, [statistics.median(each) for each in speeds], [rounds * many / w for w in worked]))
    return results


def main() -> None:
    """Measure and print; with --out also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    spawn, processes, servers = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for store in ("", f"sqlite:///{folder}/answers.db"):
            ours, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(theirs, store), daemon=True))
            processes[-1].start()
            if not ours.poll(120):
                sys.exit("a server did not start")
            servers.append((processes[-1].pid or 0, ours.recv()))
        try:
            results = measure(servers, chosen.rounds, chosen.requests)
        finally:
            for process in processes:
                process.terminate()
                process.join()
    lines = [
        "# Speed of a watermarked service",
        "",
        f"Written by `python benchmarks/service.py`; one process a server, {CONNECTIONS} connections, "
        f"{chosen.rounds} rounds.",
        "",
        "| request | bare, a second | marked | ratio | aim | bare, a processor second | marked | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {title} | {wall[0]:.0f} | {wall[1]:.0f} | {wall[1] / wall[0]:.3f} | {AIM} "
            f"| {work[0]:.0f} | {work[1]:.0f} | {work[1] / work[0]:.3f} |"
            for title, wall, work in results
        ),
        "",
    ]
    text = "\n".join(lines)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
