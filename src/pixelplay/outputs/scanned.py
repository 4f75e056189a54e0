"""What a scan found, as text for people and JSON for programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixelplay.data.audit import FEW, Audit, count_kinds, describe_findings, describe_set, find_coverage
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.sampling import imbalance_ratio
from pixelplay.text import SHOWN, align, counted, name_some, printable

SETS = {  # finding → its title
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "look_alikes": "look-alikes in sets too large for copies",
    "conflicts": "conflicts",
    "leaks": "leaks",
}


def scan_to_json(index: ImageIndex, audit: Audit) -> dict[str, Any]:
    """Everything that scan found, each finding with its files."""
    counts = index.class_counts()
    formats, smallest, largest = count_kinds(audit)
    coverage = find_coverage(index)
    return {
        "source": index.source,
        "n": len(index),
        "n_unlabelled": int((index.labels < 0).sum()),
        "classes": {name: int(n) for name, n in zip(index.classes, counts, strict=True)},
        "parts": {
            part: int(index.in_part(part).sum())
            for part in ("train", "val", "test")
            if index.in_part(part).any()
        },
        "imbalance_ratio": imbalance_ratio(counts),
        "formats": dict(formats.most_common()),
        "smallest_px": smallest,
        "largest_px": largest,
        **describe_findings(index, audit.errors.values(), audit.duplicates),
        "leaks": [describe_set(index, members) for members in audit.duplicates.leaks],
        "expected_without_images": list(coverage.absent),
        "expected_with_few_images": dict(coverage.few),
        "reachable_accuracy": coverage.reachable,
        "test_share_with_few_images": coverage.in_few,
        "notes": list(index.notes),
    }


def summarise_scan(index: ImageIndex, audit: Audit) -> str:
    """What scan found, for reading."""
    found = scan_to_json(index, audit)
    lines = [f"{printable(index.source)}: {counted(found['n'], 'photograph')}, {len(index.classes)} classes"]
    if found["n_unlabelled"]:
        lines.append(f"  {found['n_unlabelled']:,} without a label")
    lines += align(
        ["class", "n", "share"],
        [
            [name, f"{n:,}", f"{n / max(sum(found['classes'].values()), 1):.1%}"]
            for name, n in found["classes"].items()
        ],
    )
    lines += ["", f"imbalance  {found['imbalance_ratio']:.1f} : 1"]
    if found["parts"]:
        lines.append("parts      " + ", ".join(f"{part} {n:,}" for part, n in found["parts"].items()))
    if found["formats"]:
        lines.append("formats    " + ", ".join(f"{name} {n:,}" for name, n in found["formats"].items()))
        sizes = [f"{width} × {height}" for width, height in (found["smallest_px"], found["largest_px"])]
        lines.append(f"sizes      {' to '.join(dict.fromkeys(sizes))} px")
    lines += _expectations(found)
    lines += _findings("unreadable", [f"{e['path']}: {e['reason']}" for e in found["unreadable"]])
    for name, title in SETS.items():
        lines += _findings(title, [" = ".join(_name(member, name) for member in s) for s in found[name]])
    if not any(found[name] for name in ("unreadable", *SETS)):
        lines.append("nothing wrong was found with the files")
    return "\n".join(lines)


def _expectations(found: Mapping[str, Any]) -> list[str]:
    """Expected classes that have no or too few photographs."""
    lines = []
    if absent := found["expected_without_images"]:
        bound = found["reachable_accuracy"]
        lines.append(
            f"absent     {len(absent)} expected classes have no photograph: {printable(name_some(absent))}"
            + ("" if bound is None else f"; accuracy cannot pass {bound:.1%}")
        )
    if few := found["expected_with_few_images"]:
        share = found["test_share_with_few_images"]
        named = printable(name_some([f"{name} ({n})" for name, n in few.items()]))
        lines.append(
            f"few        expected classes with fewer than {FEW} photographs: {named}"
            + ("" if share is None else f"; they are {share:.1%} of the test photographs")
        )
    return lines


def _findings(name: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"  … and {len(items) - SHOWN} more (--json lists all)"] if len(items) > SHOWN else []
    return [f"{name}: {len(items)}", *(f"  {printable(item)}" for item in items[:SHOWN]), *more]


def _name(member: dict[str, Any], finding: str) -> str:
    return f"{member['path']} ({member['label']})" if finding == "conflicts" else str(member["path"])
