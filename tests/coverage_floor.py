"""Fails when a folder's line coverage is under its floor: 100 % where proof depends on it, 95 % elsewhere."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

STRICT = {"core", "stats", "codes", "crypto", "formats"}


def main(report: str) -> int:
    lines: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    for name, file in json.loads(Path(report).read_text())["files"].items():
        parts = Path(name).parts
        inside = parts[parts.index("sealmark") + 1 :]
        folder = inside[0] if len(inside) > 1 else "sealmark"
        lines[folder] += file["summary"]["num_statements"]
        covered[folder] += file["summary"]["covered_lines"]
    failed = False
    for folder in sorted(lines):
        share = 100 * covered[folder] / lines[folder] if lines[folder] else 100.0
        floor = 100 if folder in STRICT else 95
        low = share < floor
        failed |= low
        sys.stdout.write(f"{folder:14} {share:6.2f} %  floor {floor} %{'   TOO LOW' if low else ''}\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
