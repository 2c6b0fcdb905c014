"""Tracing by a Tardos code: what it costs, beside its limits; what coalitions lose; how loose the bound is.

    python benchmarks/tracing.py [--users 1000000] [--rounds 3] [--trials 100] [--out docs/results/tracing.md]

Speed is measured in a process of its own for each row, and the limits in the same process: what AES-256-CTR and
HMAC-SHA-256 take by themselves for as many bytes and names, and what it takes to copy the packed words. One
thread, which nothing but memory and processor holds up: processor seconds, which on an idle machine are those of
the clock.
"""

from __future__ import annotations

import argparse
import hmac
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from sealmark.codes.biases import Law, code_length
from sealmark.codes.coalitions import STRATEGIES, pool
from sealmark.codes.tardos import TardosCode
from sealmark.core.secret import Secret
from sealmark.crypto.random import Stream
from sealmark.stats.tails import simulated_tail
from sealmark.stats.thresholds import threshold

USERS, ERROR, AIM = 10**4, 1e-3, 0.95
BLOCK = 1 << 16  # bytes; larger ones are fresh memory each time
FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0)
EXPLAINED = (
    "c: colluders that the code is made for; L: bits of a word. From names: words are drawn anew; from packed "
    "words: a code book of a bit a symbol is kept. Each ratio is ours over the limit in the column before it."
)
CAUTION = (
    "All of 100 coalitions say at least 96 % (exact, 95 % confidence). The last column tries L in steps of a "
    "tenth or fifth of `code_length`, under Nuida's law. `sealmark trace` accuses at a total error of 1e-6, not "
    "1e-3: words must be longer for that, and 1,024 bits are the default for c = 3."
)


def best(call: Callable[[], object], rounds: int) -> float:
    """Processor seconds of the fastest of several calls."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def peak_mib() -> float:
    """The high-water mark of this very process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def child(users: int, colluders: int, length: int, rounds: int) -> dict[str, float]:
    """One row: nanoseconds a user of ours and of the limits, and peak MiB beyond what the imports take."""
    before = peak_mib()
    code = TardosCode(Secret(bytes(32), {"scheme": "benchmark"}), length, colluders)
    names = [f"user{number}" for number in range(users)]
    symbols = 2.0 * code.word(names[77]) - 1
    found = {"scores": best(lambda: code.scores(names, symbols), rounds)}
    found["peak"] = (peak_mib() - before) * users / 1e9  # in the unit of the rest
    book = code.pack(names)
    found["packed"] = best(lambda: code.weigh(book, symbols), rounds)
    stream, size = Stream(bytes(32)), 2 * length * users
    found["aes"] = best(lambda: deque((stream.raw(BLOCK) for _ in range(256)), 0), rounds) * size / (256 * BLOCK)
    tags = (hmac.digest(bytes(32), name.encode(), "sha256") for _ in range(rounds) for name in names)
    found["mac"] = best(lambda: deque(islice(tags, users), 0), rounds)
    found["copy"] = best(book.copy, rounds)
    return {name: value / users * 1e9 for name, value in found.items()}


def speed(users: int, rounds: int) -> list[str]:
    """A table of costs: growth with the users, with the length, with the colluders."""
    sizes = [(users // 100, 3, 2048), (users // 10, 3, 2048), (users, 3, 2048)]
    sizes += [(users // 10, 3, length) for length in (512, 1024, 4096, 8192)]
    sizes += [(users // 10, colluders, 2048) for colluders in (2, 10, 20)]
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--child", *map(str, size), "--rounds", str(rounds)]
        run = subprocess.run(command, check=True, capture_output=True)
        one = json.loads(run.stdout)
        limit = one["aes"] + one["mac"]
        rows.append(
            f"| {size[0]:,} | {size[1]} | {size[2]:,} | {one['scores'] * size[0] / 1e9:.2f} | {one['scores']:.0f} "
            f"| {limit:.0f} | {one['scores'] / limit:.1f} | {one['packed']:.0f} | {one['copy']:.0f} "
            f"| {one['packed'] / one['copy']:.0f} | {one['peak']:.0f} |"
        )
    return [
        "| users | c | L | from names, s | ns a user | AES + HMAC, ns | ratio | from packed words, ns a user "
        "| copying them, ns | ratio | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def caught(length: int, colluders: int, trials: int, law: Law = "auto") -> dict[str, float]:
    """For each strategy, how often somebody of the coalition is accused at `ERROR` among `USERS`."""
    code = TardosCode(Secret(bytes([colluders] * 32), {"scheme": "benchmark"}), length, colluders, law)
    rates = {}
    for name, strategy in STRATEGIES.items():
        rng, lost = np.random.default_rng(0), 0
        for trial in range(trials):
            words = code.pack([f"{name} {trial} {member}" for member in range(colluders)])
            symbols = pool(np.unpackbits(words, axis=1, count=length), strategy, rng)
            score = float(code.weigh(words, symbols).max())
            lost += code.null(symbols).log_p(score) <= math.log(ERROR / USERS)
        rates[name] = lost / trials
    return rates


def coalitions(trials: int) -> list[str]:
    """A table of what is caught at the lengths of `code_length`, and of the length at which `AIM` is."""
    rows = []
    for colluders in range(2, 11):
        length = code_length(USERS, colluders, ERROR)
        found = caught(length, colluders, trials)
        arcsine = min(caught(length, colluders, trials, "arcsine").values())
        enough = next(
            factor
            for factor in FACTORS
            if min(caught(math.ceil(factor * length), colluders, trials).values()) >= AIM
        )
        rates = " | ".join(f"{found[name]:.0%}" for name in STRATEGIES)
        needed = f"{math.ceil(enough * length):,} ({enough:.1f})"
        rows.append(f"| {colluders} | {length:,} | {rates} | {arcsine:.0%} | {needed} |")
    return [
        f"| c | L | {' | '.join(STRATEGIES)} | worst, arcsine law | L at which the worst reaches {AIM:.0%} |",
        "|---" * (len(STRATEGIES) + 4) + "|",
        *rows,
    ]


def looseness() -> list[str]:
    """A table of the bound beside the tail itself, simulated where it is."""
    rows = []
    for colluders, length in ((3, 1024), (10, 8192), (20, 2048)):
        code = TardosCode(Secret(bytes(32), {"scheme": "benchmark"}), length, colluders)
        words = code.words([f"member {member}" for member in range(colluders)])
        for name in ("interleaving", "all ones", "averaging"):
            null = code.null(pool(words, STRATEGIES[name], np.random.default_rng(0)))
            for decade in (-7, -10, -20):
                score = threshold(null, decade * math.log(10))
                log_p, error = simulated_tail(null, score, 4000, np.random.default_rng(1))
                factor = math.exp(decade * math.log(10) - log_p)
                rows.append(
                    f"| {colluders} | {length:,} | {name} | {score:.2f} | 1e{decade} "
                    f"| {10 ** (log_p / math.log(10)):.2e} (+-{error:.0%}) | {factor:.1f} |"
                )
    return [
        "| c | L | strategy | score | the bound | the tail | bound / tail |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    """Measure and print; with --out also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--users", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        json.dump(child(*options.child, options.rounds), sys.stdout)
        return
    lines = [
        "# Tracing by a Tardos code",
        "",
        f"Written by `benchmarks/tracing.py`; one thread, processor time, best of {options.rounds}.",
        "",
        EXPLAINED,
        "",
        *speed(options.users, options.rounds),
        "",
        f"Coalitions of c, {options.trials} of each strategy, that lose a member at a total error of {ERROR:g} "
        f"over {USERS:,} users by the proven bound. L is `code_length`, Nuida's law.",
        "",
        CAUTION,
        "",
        *coalitions(options.trials),
        "",
        "The bound on an innocent's score beside its tail, by importance sampling.",
        "",
        *looseness(),
        "",
    ]
    text = "\n".join(lines)
    if options.out:
        options.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
