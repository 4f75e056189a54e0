"""Recommendations on what to do next, ordered by the share of errors they concern."""

import shlex
from collections import Counter
from typing import Any

from pixelplay.data.audit import FEW_IMAGES
from pixelplay.outputs.console import METRIC_TITLES
from pixelplay.outputs.report.run_records import RunRecords
from pixelplay.text import counted, percent

MAX_CLASSES = 3  # classes that get their own advice
MIN_ERROR_SHARE = 0.1  # of all errors, for a class to get advice
MIN_ERRORS = 3  # of a class; fewer may be chance


def make_advice(records: RunRecords) -> list[dict[str, Any]]:
    """Return the recommendations that follow from a run, the most important first.

    Each has an action, the reason for it, a command that does it or None, and the share of all errors
    that it concerns; it need not fix any of them.
    """
    advice = _advise_classes(records)
    if records.label_issues:
        suspicious = {issue.path for issue in records.label_issues}
        n_suspicious = sum(row.path in suspicious for row in records.errors)
        review = _advise(
            f"Review {counted(len(records.label_issues), 'possible label error')}",
            "Correct them under Label issues, save corrections.csv and train again. "
            + _describe_effect(records),
            rerun_command(records, "--relabel", "corrections.csv"),
            n_suspicious / max(len(records.errors), 1),
        )
        advice.insert(0, review)
    if records.metrics.get("finetune") == "none" and records.config.get("finetune") == "none":
        finetune = _advise(
            "Fine-tune: this run used a linear probe",
            "The fine-tuned model is kept only if held-out images show that it is better.",
            rerun_command(records, "--finetune", "auto", "--time-budget", "15m"),
        )
        advice.append(finetune)
    if unreadable := records.metrics["data"]["unreadable"]:
        action = f"Repair or replace {counted(len(unreadable), 'unreadable image')}"
        reason = "They were skipped; Data lists them with the reasons."
        advice.append(_advise(action, reason, "pixelplay scan DATA"))
    return [*_advise_probe(records), *sorted(advice, key=lambda each: -each["error_share"])]


def _describe_effect(records: RunRecords) -> str:
    """Say what corrected labels change in the metrics, where the measured labels stay as they are."""
    where = {"test": "in the test split", "val": "in the validation split", "oof": "in held-out images"}
    return (
        "Corrections change training labels only. Errors caused by wrong labels "
        f"{where[records.measured_on]} stay in the metrics; the next report also has metrics with the "
        "corrected labels."
    )


def _advise(action: str, reason: str, command: str | None = None, error_share: float = 0.0) -> dict[str, Any]:
    return {"action": action, "reason": reason, "command": command, "error_share": error_share}


def rerun_command(records: RunRecords, *changes: str) -> str:
    """Return the command of the run with another output folder and some options replaced."""
    words = records.command or ["pixelplay", str(records.config["pixelplay"]), "DATA"]
    dropped = {"--out", *(word for word in changes if word.startswith("--"))}
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in dropped and word not in dropped | {"--force", "--resume"}
    ]
    return shlex.join([*kept, "--out", "NEW_RUN", *changes])


def _advise_classes(records: RunRecords) -> list[dict[str, Any]]:
    errors = records.errors
    advice = []
    for name, n_errors in Counter(sorted(row.label for row in errors)).most_common(MAX_CLASSES):
        if n_errors < MIN_ERRORS or n_errors / len(errors) < MIN_ERROR_SHARE:
            continue
        n = sum(row.label == name for row in records.predictions)
        predicted = sorted(row.prediction for row in errors if row.label == name)
        other, n_other = Counter(predicted).most_common(1)[0]
        n_train = int(records.metrics["train_counts"].get(name, 0))
        few = f" It has only {counted(n_train, 'training image')}." if n_train < 5 * FEW_IMAGES else ""
        more_helps, learning_curve = _describe_learning_curve(records, name)
        action = f"Check the errors of {name!r}, most often predicted as {other!r}"
        if more_helps:
            action = f"Collect more images of {name!r}, especially ones confused with {other!r}"
        evidence = (
            f"{n_errors} of its {counted(n, 'image')} are misclassified, {n_other} of them as {other!r}."
        )
        advice.append(_advise(action, f"{learning_curve}{evidence}{few}", error_share=n_errors / len(errors)))
    return advice


def _describe_learning_curve(records: RunRecords, name: str) -> tuple[bool, str]:
    """Return whether the second half of a class's images raised its recall, and a sentence on it."""
    by_class = (records.metrics.get("learning_curve") or {}).get("by_class", {})
    if (found := by_class.get(name)) is None:
        return False, ""
    _, half, full = found["points"]
    gain = found["gain"]
    before, after = percent(half["value"], 0), percent(full["value"], 0)
    if gain["low"] > 0:
        return True, f"Doubling the training data raised its recall from {before} to {after}. "
    low, high = (f"{100 * gain[end]:+.0f}".replace("-", "−") for end in ("low", "high"))
    return False, (
        f"Doubling the training data did not clearly raise its recall ({before} to {after}; "
        f"95 % CI of the change {low} to {high} points). "
    )


def _advise_probe(records: RunRecords) -> list[dict[str, Any]]:
    """Recommend the linear probe if fine-tuning was requested but held-out images favour the probe."""
    chosen, metric = records.metrics["chosen"].get("finetune", {}), records.metrics["headline"]["metric"]
    if records.config["finetune"] not in ("partial", "full") or chosen.get("auto_selects") != "none":
        return []
    needs_finetuning = bool({"--recipe", "--plan"} & {*(records.command or ())})
    probe, finetuned = (
        f"{METRIC_TITLES[metric]} {chosen[f'{model}_{metric}']:.3f} (loss {chosen[f'{model}_loss']:.3f})"
        for model in ("probe", "finetuned")
    )
    reason = f"On held-out images the linear probe has {probe}, the fine-tuned model {finetuned}."
    command = None if needs_finetuning else rerun_command(records, "--finetune", "auto")
    return [_advise("Use the linear probe, as --finetune auto would", reason, command)]
