"""The demo's page: what was claimed, what was measured, what was tried against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sealmark.core.evidence import DEFAULT_ALPHA
from sealmark.evaluate.charts import Bars, NullChart, Table
from sealmark.evaluate.report import READING, Claim, Report, Section, power_of_ten, suspicion_bars
from sealmark.evaluate.steps import USEFUL_MARGIN
from sealmark.stats.nulls import Binomial

FIDELITY = 0.01  # of accuracy: what a mark may cost
HOPELESS = 0.3  # of the plain accuracy: what the luckiest wrong key may reach
NAMES = {"uchida": "white box (uchida)", "adi": "black box (adi)"}


def demo_report(summary: Mapping[str, Any]) -> Report:
    """The page of a demo's summary; every claim is judged here, from the figures."""
    versions, plain = summary["environment"], summary["plain"]
    facts = [
        ("Made", summary["created"]),
        ("Task", f"{summary['task']}: {plain['rows']} rows to train, {plain['tests']} to judge"),
        ("Seed", str(summary["seed"])),
        ("Level alpha", f"{power_of_ten(math.log10(DEFAULT_ALPHA))} for every verdict and accusation"),
        ("Ran on", f"{summary['device']}, {summary['seconds']} s, sealmark {versions['sealmark']}, "
                   f"torch {versions['torch']}, Python {versions['python']}"),
    ]  # fmt: skip
    return Report(
        "A neural network, protected from training to court",
        "A small image classifier is marked, locked, issued to five users and leaked twice. Its owner then "
        "proves that both leaks are this model and names who leaked them. Beside each claim stands what was "
        "measured, and what must not happen.",
        [
            _fidelity(summary),
            _locks(summary),
            _copies(summary),
            _ownership(summary),
            _tracing(summary),
            _controls(summary),
            _integrity(summary),
        ],
        facts,
        [
            *READING,
            "A lock on what a network computes makes a bad model without the key; it is not encryption. The sealed "
            "file is. A mark can be washed out by training a new model on the old one's answers; what each "
            "scheme is broken by stands on its card (sealmark schemes NAME). The secrets of this demo follow "
            "from its seed, so that it can be repeated. Real secrets come from the operating system.",
        ],
    )


def _fidelity(summary: Mapping[str, Any]) -> Section:
    plain, marked = summary["plain"]["accuracy"], summary["marked"]["accuracy"]
    found = summary["marked"]["ownership"]
    claims = [
        Claim(
            "The watermarks cost at most one point of accuracy.",
            f"{plain:.1%} plain, {marked:.1%} marked",
            marked >= plain - FIDELITY,
        )
    ]
    claims += [
        Claim(f"The {NAMES[name]} watermark reads back.", _evidence_text(entry), entry["verdict"] == "MATCH")
        for name, entry in found.items()
    ]
    lead = (
        "Two watermarks went in while the model was trained: 256 bits in the weights of one layer, read with the "
        "weights at hand, and 30 keyed images with random labels, read by asking questions alone."
    )
    return Section("1. Train and mark", lead, claims)


def _locks(summary: Mapping[str, Any]) -> Section:
    neural, sealed = summary["locks"]["chaotic_weights"], summary["locks"]["sealed"]
    chance, plain = summary["chance"], summary["plain"]["accuracy"]
    useless, wrong = chance + USEFUL_MARGIN, neural["wrong_keys"]
    mean = sum(wrong) / len(wrong)
    rows = [
        ("Plain model", plain, f"{plain:.1%}", "calm"),
        ("Marked", summary["marked"]["accuracy"], f"{summary['marked']['accuracy']:.1%}", "good"),
        ("Locked, right key", neural["authorized"], f"{neural['authorized']:.1%}", "good"),
        ("Locked, no key", neural["no_key"], f"{neural['no_key']:.1%}", "accused"),
        *((f"Locked, wrong key {i}", value, f"{value:.1%}", "accused") for i, value in enumerate(wrong, 1)),
    ]
    claims = [
        Claim(
            "The right key gives the marked model back, bit for bit.",
            f"every tensor equal: {_yes(neural['exact'])}; accuracy {neural['authorized']:.1%}",
            neural["exact"],
        ),
        Claim(
            "Without the key the locked model is no better than guessing.",
            f"{neural['no_key']:.1%}, guessing {chance:.0%}",
            neural["no_key"] <= useless,
            control=True,
        ),
        Claim(
            "With a wrong key it is no better either.",
            f"{mean:.1%} on average over {len(wrong)} wrong keys, {max(wrong):.1%} with the luckiest",
            mean <= useless and max(wrong) <= HOPELESS * plain,
            control=True,
        ),
        Claim("The sealed file opens to the same bits.", f"equal: {_yes(sealed['exact'])}", sealed["exact"]),
        Claim(
            "The sealed file refuses every other key and every flipped bit, and writes nothing.",
            f"{sealed['keys_refused']} of {sealed['keys']} keys, {sealed['flips_refused']} of {sealed['flips']} "
            "damaged copies refused",
            sealed["keys_refused"] == sealed["keys"] and sealed["flips_refused"] == sealed["flips"],
            control=True,
        ),
    ]
    bars = Bars("Accuracy", rows, line=chance, line_label=f"guessing, {chance:.0%}")
    lead = "Two locks: one moves the weights to keyed places, one encrypts the file with authentication."
    return Section("2. Lock", lead, claims, [bars])


def _copies(summary: Mapping[str, Any]) -> Section:
    marked, scores = summary["marked"]["accuracy"], summary["copies"]
    worst = min(entry["accuracy"] for entry in scores.values())
    claim = Claim(
        "A user's mark costs at most one point of accuracy.",
        f"{marked:.1%} before, {worst:.1%} the lowest of {len(scores)} copies",
        worst >= marked - FIDELITY,
    )
    table = Table(
        "Issued",
        ("User", "Accuracy of the copy"),
        [(user, f"{entry['accuracy']:.1%}") for user, entry in scores.items()],
    )
    lead = "Each user's copy carries a code of its own, spread over all weights by changes of 3 % of their spread."
    return Section("3. Issue", lead, [claim], [table])


def _ownership(summary: Mapping[str, Any]) -> Section:
    suspects = [("The marked model", summary["marked"]["ownership"])]
    suspects += [(leak["title"], leak["ownership"]) for leak in summary["leaks"]]
    suspects += [(entry["title"], entry["ownership"]) for entry in summary["controls"] if entry["ownership"]]
    claims = [
        Claim(
            f"{leak['title']} is the owner's, by the {NAMES[name]} watermark.",
            _evidence_text(found),
            found["verdict"] == "MATCH",
        )
        for leak in summary["leaks"]
        for name, found in leak["ownership"].items()
    ]
    rows = [(title, *(power_of_ten(found[name]["log10_p"]) for name in NAMES)) for title, found in suspects]
    table = Table("p-values", ("Suspect", *NAMES.values()), rows)
    lead = "Leak 1: {}. Leak 2: {}.".format(*(leak["story"] for leak in summary["leaks"]))
    charts = [_null_chart(name, [(title, found[name]) for title, found in suspects]) for name in NAMES]
    return Section("4. Prove ownership of the leaks", lead, claims, [*charts, table])


def _null_chart(name: str, found: list[tuple[str, Mapping[str, Any]]]) -> NullChart:
    details = found[0][1]["details"]
    bits = "bits" in details
    n, p = (details["bits"], 0.5) if bits else (details["triggers"], 0.1)
    needed = Binomial(n, p, two_sided=bits).needed(DEFAULT_ALPHA)
    seen = [(title, int(entry["statistic"]), entry["verdict"] == "MATCH") for title, entry in found]
    what = "bits of the message" if bits else "labels of the trigger images"
    return NullChart(f"Matching {what}, {NAMES[name]}", n, p, needed, seen)


def _tracing(summary: Mapping[str, Any]) -> Section:
    claims, blocks = [], []
    for leak in summary["leaks"]:
        names = [entry["user"] for entry in leak["accusation"]["accused"]]
        innocent = sorted(set(names) - set(leak["culprits"]))
        claims += [
            Claim(
                f"{leak['title']} is traced to {'its leaker' if len(leak['culprits']) == 1 else 'a colluder'}.",
                f"accused: {_list(names)}; in truth: {_list(leak['culprits'])}",
                bool(set(names) & set(leak["culprits"])),
            ),
            Claim(
                f"{leak['title']} accuses nobody innocent.",
                f"innocent and accused: {_list(innocent)}",
                not innocent,
                control=True,
            ),
        ]
        blocks.append(suspicion_bars(f"{leak['title']}: suspicion, -log₁₀ p", leak["accusation"]))
    rows = [
        (
            leak["title"],
            f"{leak['accuracy']:.1%}",
            f"{leak['scratch']:.1%}",
            str(leak["rows"]),
            f"{leak['seconds']:.2g} s",
        )
        for leak in summary["leaks"]
    ]
    head = ("", "Accuracy", "The same attacker from scratch", "Rows used", "Processor time")
    lead = (
        "Whose copy was it? The bound holds for all five users together, whatever was done to the copy and by "
        "however many: an innocent user's code was drawn without looking at the leak."
    )
    return Section(
        "5. Trace the leakers", lead, claims, [*blocks, Table("What the attacks left, and cost", head, rows)]
    )


def _controls(summary: Mapping[str, Any]) -> Section:
    claims = []
    for entry in summary["controls"]:
        accused = [found["user"] for found in entry["accusation"]["accused"]]
        claims += [
            Claim(
                f"{entry['title']}: no match, {NAMES[name]}.",
                _evidence_text(found),
                found["verdict"] == "NO_MATCH",
                control=True,
            )
            for name, found in entry["ownership"].items()
        ]
        least = min(found["log10_p"] for found in entry["accusation"]["ranking"])
        claims.append(
            Claim(
                f"{entry['title']}: nobody is accused.",
                f"accused: {_list(accused)}; smallest p-value {power_of_ten(least)}",
                not accused,
                control=True,
            )
        )
    return Section(
        "6. Try to be wrong", "Suspects that are innocent, and secrets that are not the owner's.", claims
    )


def _integrity(summary: Mapping[str, Any]) -> Section:
    found, plain = summary["integrity"], summary["plain"]["accuracy"]
    changed = found["tampered"]["details"]["changed"]
    claims = [
        Claim(
            "The sealed model is intact, and as good.",
            f"{_evidence_text(found['intact'])}; accuracy {found['accuracy']:.1%}",
            found["intact"]["verdict"] == "MATCH" and found["accuracy"] >= plain - FIDELITY,
        ),
        Claim(
            "One flipped bit is found, in the tensor where it is.",
            f"flipped in {found['flipped_in']}, found in {_list(changed)}",
            found["tampered"]["verdict"] == "NO_MATCH" and changed == [found["flipped_in"]],
            control=True,
        ),
        Claim("The original comes back bit for bit.", f"equal: {_yes(found['restored'])}", found["restored"]),
        Claim(
            "Restoring the changed copy is refused.",
            f"refused: {_yes(found['restore_refused'])}",
            found["restore_refused"],
            control=True,
        ),
    ]
    lead = "A seal that any change breaks, hidden in the weights themselves, and that comes off without a trace."
    return Section("7. Seal against change", lead, claims)


def _evidence_text(found: Mapping[str, Any]) -> str:
    details = found["details"]
    count = details.get("bits") or details.get("triggers")
    seen = f"{found['statistic']:.0f} of {count} match, " if count else ""
    return f"{seen}p = {power_of_ten(found['log10_p'])}"


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
