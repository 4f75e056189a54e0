"""What a page consists of, section by section: plain values, for the template to lay out."""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixelplay import __version__
from pixelplay.outputs.console import HEADLINES, TITLES
from pixelplay.outputs.label_issues import LabelIssue
from pixelplay.outputs.report.advice import Advice, advise, again
from pixelplay.outputs.report.charts import (
    Chart,
    history_chart,
    learning_chart,
    reliability_chart,
    risk_chart,
)
from pixelplay.outputs.report.confusion_matrix import (
    MAX_MATRIX,
    N_IN_CELL,
    N_RIGHT,
    Cell,
    fill_cells,
    list_confusions,
    make_matrix,
    typical_of,
    worst_first,
)
from pixelplay.outputs.report.images import Pictures, take_turns
from pixelplay.outputs.report.run_records import SETS, Answer, RunRecords
from pixelplay.text import counted, percent


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A suspect and what it stands beside: a typical image of either class."""

    suspect: LabelIssue
    like_label: str | None
    like_proposed: str | None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong answer, with where the model looked if that is known."""

    answer: Answer
    large: str | None
    heat: str | None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is taken for what: a matrix, or of many classes the commonest confusions."""

    names: tuple[str, ...]
    matrix: tuple[tuple[Cell, ...], ...] | None
    confusions: tuple[tuple[str, str, Cell], ...]


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """The most confident wrong answers, of how many, and whose sight is drawn."""

    shown: tuple[Mistake, ...]
    n: int
    who_explains: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Suspects to be judged, of how many; what was corrected before; and what learns from the corrections."""

    doubts: tuple[Doubt, ...]
    n: int
    corrections: tuple[Mapping[str, Any], ...]
    relabel: str


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What probabilities are worth."""

    calibration: Mapping[str, Any] | None
    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the run was made, and what this page lacks."""

    story: tuple[str, ...]
    command: str | None
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template needs, by section; texts are plain, the template makes them safe."""

    title: str
    version: str
    source: str | None
    root: str
    verdict: str
    where: str
    figures: tuple[Mapping[str, Any], ...]
    also: tuple[str, ...]
    advice: tuple[Advice, ...]
    classes: tuple[Mapping[str, Any], ...]
    taken: Taken
    mistakes: Mistakes
    labels: Labels
    trust: Trust
    data: Mapping[str, Any]
    made: Made
    pictures: Pictures


N_MISTAKES = 24
N_LABEL_ISSUES, N_ENLARGED = 150, 60
N_SETS, N_IN_SET, N_FILES = 40, 8, 200
FEW_LEARNED = 30
SPLITS = {
    "test": "the test part, which chose nothing",
    "oof": "images held out in turn, each answered by a classifier that had not seen it",
    "val": "the validation part, which also chose (slightly optimistic)",
}
HELD_OUT_IN = {"test": "from the test part", "oof": "held out in a fold", "val": "from the validation part"}
DEPTHS = {
    "none": "a linear classifier on the features of a frozen network",
    "partial": "the last stages of the network and the classifier on top",
    "full": "all layers of the network",
}


def plan_pictures(records: RunRecords) -> list[str]:
    """Images whose pictures the page wants, the most wanted first."""
    wrong = worst_first(records.answers)
    typical = typical_of(records.answers)
    cells = fill_cells(records.answers)
    off = [paths for (given, label), paths in cells.items() if given != label]
    on = [paths[:N_RIGHT] for (given, label), paths in cells.items() if given == label]
    if len(records.figures["confusion"]["classes"]) > MAX_MATRIX:  # only the largest are shown
        off, on = sorted(off, key=len, reverse=True)[:MAX_MATRIX], []
    copies = [member["path"] for name in SETS for members in _sets(records, name) for member in members]
    return [
        *(suspect.path for suspect in records.label_issues[:N_LABEL_ISSUES]),
        *typical.values(),
        *(answer.path for answer in wrong[:N_MISTAKES]),
        *take_turns(off, N_IN_CELL),
        *copies,
        *take_turns(on, N_RIGHT),
    ]


def make_page(records: RunRecords, pictures: Pictures, mistakes: Sequence[Mistake]) -> Page:
    """Put together what a run's page shows."""
    return Page(
        title=os.path.basename(os.path.abspath(records.folder)),
        version=__version__,
        source=None if records.source is None else os.path.basename(records.source),
        root=records.root,
        verdict=_verdict(records),
        where=SPLITS[records.measured_on],
        figures=tuple(_figure_rows(records)),
        also=tuple(_also_measured(records)),
        advice=tuple(advise(records)),
        classes=tuple(_class_rows(records)),
        taken=_taken(records),
        mistakes=_mistakes(records, mistakes),
        labels=_labels(records),
        trust=Trust(calibration=records.metrics.get("calibration"), charts=tuple(_charts(records))),
        data=_data(records),
        made=Made(
            story=tuple(_story(records)),
            command=shlex.join(records.command) or None,
            notes=tuple(map(records.discreet, records.metrics["notes"])),
            settings=_flat(records.config),
            missing=tuple(_missing(records, pictures)),
        ),
        pictures=pictures,
    )


def _taken(records: RunRecords) -> Taken:
    names = tuple(str(name) for name in records.figures["confusion"]["classes"])
    return Taken(
        names=names,
        matrix=make_matrix(records.answers, names) if len(names) <= MAX_MATRIX else None,
        confusions=tuple(list_confusions(records.answers)),
    )


def _mistakes(records: RunRecords, shown: Sequence[Mistake]) -> Mistakes:
    deployed = "the model that came of it, which has learned from these images since,"
    has_learned = records.measured_on == "oof" or records.metrics.get("val_is_before_refit", False)
    is_apart = records.measured_on == "test" or not has_learned
    return Mistakes(
        shown=tuple(shown),
        n=len(worst_first(records.answers)),
        who_explains="the network" if is_apart else deployed,
    )


def _labels(records: RunRecords) -> Labels:
    typical = typical_of(records.answers)
    return Labels(
        doubts=tuple(
            Doubt(suspect=s, like_label=typical.get(s.label), like_proposed=typical.get(s.suggested))
            for s in records.label_issues[:N_LABEL_ISSUES]
        ),
        n=len(records.label_issues),
        corrections=tuple(records.metrics["data"]["corrections"]),
        relabel=again(records, "--relabel", "corrections.csv"),
    )


def _verdict(records: RunRecords) -> str:
    """Say in one sentence how often the classifier is right, and how often a guess would be."""
    accuracy, baseline = records.figures["accuracy"], records.metrics["baseline"]
    guess = baseline["accuracy"]["value"]
    return (
        f"Right on {percent(accuracy['value'])} of {counted(records.figures['n'], 'image')} "
        f"(95 % interval {percent(accuracy['low'])} to {percent(accuracy['high'])}). "
        f"Always answering {baseline['class']!r} would be right on {percent(guess)}."
    )


def _figure_rows(records: RunRecords) -> list[dict[str, Any]]:
    baseline, declared = records.metrics["baseline"], records.metrics["headline"]["metric"]
    rows = []
    for name in HEADLINES:
        guess = baseline[name]
        value = guess["value"] if isinstance(guess, Mapping) else guess
        estimate = records.figures[name]
        rows.append({"name": TITLES[name], "is_declared": name == declared, "baseline": value, **estimate})
    return rows


def _story(records: RunRecords) -> list[str]:
    """What was done, in plain words."""
    metrics, counts = records.metrics, records.metrics["train_counts"]
    told = [f"Learned from {counted(sum(counts.values()), 'image')} of {len(counts)} classes."]
    if metrics.get("repeats", 1) > 1:
        told.append(
            f"Dealt into folds {metrics['n_repeats']} times: figures are means over these; the matrix, the "
            "mistakes and what is taken for what are of the first."
        )
    if "n_folds" in metrics:
        finetune = ", ".join(f"{n} × {DEPTHS[method]}" for method, n in metrics["finetune"].items())
        told.append(f"Cross-validation in {metrics['n_folds']} folds; trained: {finetune}.")
    else:
        told.append(f"Trained: {DEPTHS[metrics['depth']]}.")
    chosen = metrics["chosen"]
    temperature = chosen["temperature"]
    told.append(
        f"Probabilities are divided by a temperature of {temperature['value']:.2f}, which images "
        f"that were not learned from chose ({counted(temperature['n'], 'image')})."
    )
    if tau := chosen["tau"]["value"]:
        told.append(
            f"Decisions lean towards rare classes (τ = {tau:.2g}), for "
            f"{TITLES[metrics['headline']['metric']]}; probabilities do not."
        )
    if removed := metrics["data"]["removed_from_training"]:
        told.append(f"Not learned from, as copies of test images: {len(removed):,}.")
    return told


def _also_measured(records: RunRecords) -> list[str]:
    """Figures of the same classifier on other images or other labels."""
    titles = {
        "test_without_copies": "Without test images that had a copy in training",
        f"{records.measured_on}_corrected": "On the labels as you have corrected them",
        "test": "What is deployed, on the given test part",
    }
    also = {name: figures for name in titles if (figures := records.metrics.get(name)) is not None}
    if records.measured_on == "test":
        also.pop("test", None)
    if (known := records.figures.get("known_only")) is not None:
        titles["known"], also["known"] = "On classes that it has learned, alone", known
    found = []
    for name, figures in also.items():
        accuracy = figures["accuracy"]
        interval = f"{accuracy['low']:.3f}–{accuracy['high']:.3f}"
        n = counted(figures["n"], "image")
        found.append(f"{titles[name]}: accuracy {accuracy['value']:.3f} ({interval}) on {n}.")
    return found


def _class_rows(records: RunRecords) -> list[dict[str, Any]]:
    counts = records.metrics["train_counts"]
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in records.answers:
        if not answer.is_right:
            taken[answer.given][answer.label] += 1
    return [
        {
            **scores,
            "learned": int(counts.get(scores["class"], 0)),
            "is_rare": int(counts.get(scores["class"], 0)) < FEW_LEARNED,
            "taken_for": taken[scores["class"]].most_common(1),
        }
        for scores in records.figures["per_class"]
    ]


def _depth_of(records: RunRecords, fold: float | None) -> str | None:
    """How deep a fold of the first repeat was trained in the end, or a run that has none."""
    if fold is None:
        return records.metrics.get("finetune")
    first = [each for each in records.metrics["folds"] if each["repeat"] == 0 and each["fold"] == fold]
    return first[0]["finetune"] if first else None


def _charts(records: RunRecords) -> list[Chart]:
    charts = []
    if (calibration := records.metrics.get("calibration")) is not None:
        charts.append(reliability_chart(calibration))
    charts.append(risk_chart(records.figures["risk_coverage"]))
    if (curve := records.metrics.get("learning_curve")) is not None:
        charts.append(learning_chart(curve["all"]["points"]))
    first = [row for row in records.history if row.get("repeat", 0) == 0]
    fold = first[0].get("fold") if first else None
    history = [row for row in first if row.get("fold") == fold]
    of = "" if fold is None else f" of fold {fold:.0f}"
    if _depth_of(records, fold) == "none":
        of += " of a tuning that was not taken,"
    for columns, title in (
        ({"train_loss": "training", "val_loss": "validation"}, f"Loss{of} by epoch"),
        ({"val_macro_f1": "macro-F1", "val_accuracy": "accuracy"}, f"Validation figures{of} by epoch"),
    ):
        if (chart := history_chart(history, columns, title)) is not None:
            charts.append(chart)
    return charts


def _data(records: RunRecords) -> dict[str, Any]:
    """What is wrong with the images, as much of it as can be looked at."""
    data = records.metrics["data"]
    return {
        **{f"n_{name}": len(data[name]) for name in SETS},
        **{name: _sets(records, name) for name in SETS},
        "unreadable": data["unreadable"][:N_FILES],
        "n_unreadable": len(data["unreadable"]),
        "skipped": data["skipped"],
        "removed": data["removed_from_training"][:N_FILES],
        "n_removed": len(data["removed_from_training"]),
    }


def _sets(records: RunRecords, name: str) -> list[list[Mapping[str, str]]]:
    """The first sets of one kind, and the first images of each."""
    return [members[:N_IN_SET] for members in records.metrics["data"][name][:N_SETS]]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in one level; of a file its name alone, for where it lies is nobody's business."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in ("source", "command", "images_dir", "pixelplay"):
            is_place = isinstance(value, str) and os.path.isabs(value)
            flat[prefix + name] = os.path.basename(value) if is_place else value
    return flat


def _missing(records: RunRecords, pictures: Pictures) -> list[str]:
    missing = []
    if pictures.missing is not None:
        why = records.discreet(pictures.missing)
        missing.append(f"Pictures: {why}. Say where they are: pixelplay report RUN --data DATA.")
    if records.config.get("command") is None:
        missing.append("The command: the run was made from Python, or by an older PixelPlay.")
    return missing
