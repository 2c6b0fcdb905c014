"""Files at full size, each operation beside its limit or its peer.

    python benchmarks/run.py [--mib 1024] [--rounds 5] [--out docs/results/speed.md]

Each figure is the best of all rounds. The rounds take all measurements in turn, and each measurement is a
process of its own, so that ours and the reference meet the same machine: only ratios mean something. We
sync what we write to disk, so the fair reference for writing is `cp` with a sync; without it stands beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from operations import OPERATIONS, prepare

# what is compared: title, ours, reference, the ratio to reach
PAIRS = [
    ("lock (sealed) to disk / cp, both synced", "seal", "cp_synced", 0.9),
    ("lock (sealed) / cp, neither synced", "seal_unsynced", "cp", 0.9),
    ("unlock to disk / cp, both synced", "unseal", "cp_synced", None),
    ("unlock to memory / read to fresh memory", "unseal_memory", "read", 0.8),
    ("unlock to memory / load_file and clone", "unseal_memory", "load_file", None),
    ("issue a marked copy / cp, both synced", "issue", "cp_synced", 0.3),
    ("issue a marked copy / cp, neither synced", "issue_unsynced", "cp", 0.3),
    ("digest / cp", "digest", "cp", None),
]
IN_MEMORY = {"unseal_memory", "read", "load_file"}
HEAD = "| what | MiB | ours, GiB/s | reference, GiB/s | ratio | aim | peak, MiB |\n|---|---|---|---|---|---|---|"


def child(name: str, folder: Path) -> None:
    """One measurement: seconds, and peak MiB above what the imports take, as JSON on stdout."""
    before, seconds = _peak_mib(), math.inf
    for _ in range(3 if name in IN_MEMORY else 1):  # these are over in a blink, and the first one warms up
        start = time.perf_counter()
        kept = OPERATIONS[name](folder)
        seconds = min(seconds, time.perf_counter() - start)
        del kept
    json.dump((seconds, _peak_mib() - before), sys.stdout)


def _peak_mib() -> float:
    """The high-water mark of this very process; getrusage would carry over that of its parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def measure(folder: Path, name: str) -> tuple[float, float]:
    """Seconds and peak MiB of one operation in a fresh process, with nothing waiting to be written."""
    (folder / "new").unlink(missing_ok=True)
    os.sync()
    run = subprocess.run([sys.executable, __file__, "--child", name, str(folder)], check=True, capture_output=True)
    seconds, peak = json.loads(run.stdout)
    return seconds, peak


def compare(mib: int, rounds: int) -> list[str]:
    """One row of a table for each of `PAIRS`, for a model of ``mib`` MiB."""
    names = list(dict.fromkeys(name for _, *pair, _ in PAIRS for name in pair))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, mib)
        results = [{name: measure(folder, name) for name in names} for _ in range(rounds)]
    speed = {name: mib / 1024 / min(result[name][0] for result in results) for name in names}
    peak = {name: max(result[name][1] for result in results) for name in names}
    return [
        f"| {title} | {mib} | {speed[ours]:.2f} | {speed[reference]:.2f} | {speed[ours] / speed[reference]:.2f} "
        f"| {aim or ''} | {peak[ours]:.0f} |"
        for title, ours, reference, aim in PAIRS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    rows = [row for mib in (options.mib // 4, options.mib) for row in compare(mib, options.rounds)]
    table = "\n".join([HEAD, *rows])
    print(table)
    if options.out:
        cores, load = os.cpu_count(), os.getloadavg()[0]
        said = f"Written by `make bench`; {cores} cores, load {load:.1f} at the end. Only ratios mean something."
        options.out.write_text(f"# Speed\n\n{said}\n\n{table}\n", "utf-8")


if __name__ == "__main__":
    main()
