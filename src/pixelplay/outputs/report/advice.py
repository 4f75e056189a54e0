"""What to do next, by how much of the error it is about; what is measured is told apart from what is not."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pixelplay.data.audit import FEW_IMAGES
from pixelplay.outputs.console import TITLES
from pixelplay.outputs.report.run_records import RunRecords
from pixelplay.text import counted, percent

N_CLASSES = 3  # whose errors are named one by one
MANY_ERRORS = 0.1  # of all, from which a class is worth a line
FEW_ERRORS = 3  # of a class: one or two may be chance


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing to do.

    Attributes:
        what: in one sentence.
        why: the evidence.
        command: that does it; None where none does.
        share: of all errors that it is about, at most; what it can gain is not known.
    """

    what: str
    why: str
    command: str | None
    share: float


def advise(records: RunRecords) -> list[Advice]:
    """Collect what the records suggest, what concerns most errors first."""
    found = [*_check_labels(records), *_mend_classes(records), *_go_deeper(records), *_mend_files(records)]
    return [*_stay_shallow(records), *sorted(found, key=lambda advice: -advice.share)]


def again(records: RunRecords, *changes: str) -> str:
    """The command of a run, its output and some options changed."""
    words = records.command or ["pixelplay", str(records.config["pixelplay"]), "DATA"]
    dropped = {"--out", *(word for word in changes if word.startswith("--"))}
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in dropped and word not in dropped | {"--force", "--resume"}
    ]
    return shlex.join([*kept, "--out", "NEW_RUN", *changes])


def _check_labels(records: RunRecords) -> list[Advice]:
    label_issues = records.label_issues
    if not label_issues:
        return []
    accused = {suspect.path for suspect in label_issues}
    wrong = [answer for answer in records.answers if not answer.is_right]
    share = sum(answer.path in accused for answer in wrong) / max(len(wrong), 1)
    return [
        Advice(
            what=f"Look at {counted(len(label_issues), 'label')} that may be wrong, and save your corrections.",
            why=f"{percent(share, 0)} of the wrong answers are on images whose label is in doubt.",
            command=again(records, "--relabel", "corrections.csv"),
            share=share,
        )
    ]


def _mend_classes(records: RunRecords) -> list[Advice]:
    """Name the classes that most wrong answers are about, and what they are taken for."""
    wrong = [answer for answer in records.answers if not answer.is_right]
    counts = records.metrics["train_counts"]
    advice = []
    for name, n_wrong in Counter(answer.given for answer in wrong).most_common(N_CLASSES):
        if n_wrong < FEW_ERRORS or n_wrong / len(wrong) < MANY_ERRORS:
            continue
        n = sum(answer.given == name for answer in records.answers)
        taken_for, n_taken = Counter(a.label for a in wrong if a.given == name).most_common(1)[0]
        learned = int(counts.get(name, 0))
        few = f"; it was learned from {counted(learned, 'image')} only" if learned < 5 * FEW_IMAGES else ""
        helps, more = _tell_of_more(records, name)
        advice.append(
            Advice(
                what=f"Add images of {name!r}, above all such as are taken for {taken_for!r}."
                if helps
                else f"See why {name!r} is taken for {taken_for!r}: look at its mistakes below.",
                why=f"{n_wrong} of {n} are answered wrongly, {n_taken} of them as {taken_for!r}{few}.{more}",
                command=None,
                share=n_wrong / len(wrong),
            )
        )
    return advice


def _tell_of_more(records: RunRecords, name: str) -> tuple[bool, str]:
    """Whether a class's second half of images has shown to help, and what was measured."""
    curve = records.metrics.get("learning_curve") or {"by_class": {}}
    if (found := curve["by_class"].get(name)) is None:
        return False, ""
    _, half, whole = found["points"]
    gain = found["gain"]
    told = (
        f" Among those learned from, each held out once, {percent(half['value'], 0)} are right with "
        f"{half['n_train']} to learn from, {percent(whole['value'], 0)} with {whole['n_train']}"
    )
    if gain["low"] > 0:
        return True, f"{told}; as many again may well bring more."
    return False, f"{told}: not clear of chance ({gain['low']:+.2f} to {gain['high']:+.2f})."


def _stay_shallow(records: RunRecords) -> list[Advice]:
    """Where a depth was asked for, and held-out images speak for the probe."""
    chosen, metric = records.metrics["chosen"].get("finetune", {}), records.metrics["headline"]["metric"]
    if records.config["finetune"] not in ("partial", "full") or chosen.get("auto_takes") != "none":
        return []
    # to a depth, or to a head that no probe stands beside
    is_bound = bool({"--recipe", "--plan"} & {*(records.command or ())})
    values, scores = ([chosen[f"{who}_{what}"] for who in ("probe", "tuned")] for what in (metric, "score"))
    return [
        Advice(
            what="Take the probe, as --finetune auto would: held-out images speak for it.",
            why=f"There it had {TITLES[metric]} {values[0]:.3f} (loss {scores[0]:.3f}), what was tuned "
            f"{values[1]:.3f} ({scores[1]:.3f}).",
            command=None if is_bound else again(records, "--finetune", "auto"),
            share=0.0,
        )
    ]


def _go_deeper(records: RunRecords) -> list[Advice]:
    if records.metrics.get("finetune") != "none" or records.config.get("finetune") != "none":
        return []
    return [
        Advice(
            what="Let the network itself be tuned, not only the classifier on top of it.",
            why="This run trained a probe on frozen features; held-out images say whether more helps.",
            command=again(records, "--finetune", "auto", "--time-budget", "15m"),
            share=0.0,
        )
    ]


def _mend_files(records: RunRecords) -> list[Advice]:
    broken: Sequence[object] = records.metrics["data"]["unreadable"]
    if not broken:
        return []
    return [
        Advice(
            what=f"Mend or replace {counted(len(broken), 'image')} that could not be read.",
            why="They were neither learned from nor measured; below they are listed with what is wrong.",
            command="pixelplay scan DATA",
            share=0.0,
        )
    ]
