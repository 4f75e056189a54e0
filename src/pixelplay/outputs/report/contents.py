"""Texts and values of each section of the report, as input of the page templates."""

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pixelplay import __version__
from pixelplay.data.transforms import describe_size
from pixelplay.evaluation.intervals import wilson
from pixelplay.evaluation.novelty import BENCHMARK_DETECTION
from pixelplay.evaluation.selective import risk_coverage
from pixelplay.model.bundle import ModelBundle
from pixelplay.outputs.console import HEADLINE_METRICS, METRIC_TITLES
from pixelplay.outputs.report import charts, confusion_matrix
from pixelplay.outputs.report.advice import make_advice, rerun_command
from pixelplay.outputs.report.images import ReportImages, interleave
from pixelplay.outputs.report.run_records import DUPLICATE_KINDS, RunRecords
from pixelplay.text import counted, percent

MAX_ERRORS = 24
MAX_LABEL_ISSUES, MAX_ENLARGED = 150, 60
ISSUES_PER_PAGE = 12
MAX_SETS, MAX_IN_SET, MAX_FILES = 40, 8, 200
RARE_BELOW = 30  # training images
FEW_EVALUATED = 50  # images, below which the summary warns that metrics are uncertain
N_WEAKEST = 2  # classes named in the summary
EVALUATED_ON = {"test": "test images", "oof": "images, out of fold", "val": "validation images"}
MEASURED_ON = {
    "test": "Measured on the test split, which was not used for training or to choose settings.",
    "oof": "Measured out of fold: no image was predicted by a model that was trained on it.",
    "val": "Measured on the validation split, which was also used to choose settings: slightly optimistic.",
}
METHODS = {
    "none": "linear probe (logistic regression on the features of a frozen backbone)",
    "partial": "partial fine-tuning (last stages of the backbone and the head)",
    "full": "full fine-tuning (all layers)",
}
MISSING_RUN = (
    "Per-class results, confusion matrix, errors, label issues and data problems are stored in the run "
    "folder, not in the model. To evaluate this model on labelled images: pixelplay evaluate MODEL DATA"
)


def list_images(records: RunRecords) -> list[str]:
    """Return the paths of the images that the page shows, the most important first."""
    cells = confusion_matrix.group_by_cell(records.predictions)
    errors = [paths for (label, prediction), paths in cells.items() if label != prediction]
    correct = [paths for (label, prediction), paths in cells.items() if label == prediction]
    if len(records.evaluation["confusion"]["classes"]) > confusion_matrix.MAX_CLASSES:
        # the page lists only the largest cells
        errors, correct = sorted(errors, key=len, reverse=True)[: confusion_matrix.MAX_CLASSES], []
    sets = [members for kind in DUPLICATE_KINDS for members in _first_sets(records, kind)]
    return [
        *(issue.path for issue in records.label_issues[:MAX_LABEL_ISSUES]),
        *confusion_matrix.find_typical(records.predictions).values(),
        *(row.path for row in confusion_matrix.sort_errors(records.predictions)[:MAX_ERRORS]),
        *interleave(errors, confusion_matrix.MAX_ERRORS_SHOWN),
        *(member["path"] for members in sets for member in members),
        *interleave(correct, confusion_matrix.MAX_CORRECT_SHOWN),
    ]


def run_contents(
    records: RunRecords, images: ReportImages, heat_maps: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """Collect what the page of a run shows; heat maps are path → image and overlay, as data URLs."""
    metrics, predictions = records.metrics, records.predictions
    classes = [str(name) for name in records.evaluation["confusion"]["classes"]]
    has_matrix = len(classes) <= confusion_matrix.MAX_CLASSES
    per_class, calibration = _class_rows(records), metrics.get("calibration")
    reliability = None if calibration is None else charts.reliability_chart(calibration)
    risk = charts.risk_chart(records.evaluation["risk_coverage"])
    return {
        "title": os.path.basename(os.path.abspath(records.folder)),
        "version": __version__,
        "source": None if records.source is None else os.path.basename(records.source),
        "summary": _summarize(records, per_class),
        "advice": make_advice(records),
        "metrics": _metric_rows(records),
        "other_metrics": _other_metrics(records),
        "per_class": per_class,
        "rare_below": RARE_BELOW,
        "classes": classes,
        "matrix": confusion_matrix.make_matrix(predictions, classes) if has_matrix else None,
        "confusions": confusion_matrix.list_confusions(predictions),
        "errors": confusion_matrix.sort_errors(predictions)[:MAX_ERRORS],
        "n_errors": len(records.errors),
        "heat_maps": heat_maps,
        # the model that draws the heat maps may have been trained on these images after they were predicted
        "is_trained_on_errors": records.measured_on == "oof"
        or (records.measured_on == "val" and metrics.get("val_is_before_refit", False)),
        "label_issues": records.label_issues[:MAX_LABEL_ISSUES],
        "n_label_issues": len(records.label_issues),
        "issues_per_page": ISSUES_PER_PAGE,
        "typical": confusion_matrix.find_typical(predictions),
        "corrections": metrics["data"]["corrections"],
        "relabel_command": rerun_command(records, "--relabel", "corrections.csv"),
        "export_command": "pixelplay label-issues RUN --relabel corrections.csv --out corrected.csv",
        "novelty": _describe_novelty(metrics.get("novelty")),
        "calibration": calibration,
        "calibration_charts": [chart for chart in (reliability, risk) if chart is not None],
        "data": _describe_data(records),
        "training": _describe_training(records),
        "training_charts": _training_charts(records),
        "command": shlex.join(records.command) or None,
        "missing": _describe_missing(records, images),
        "log": [records.redact(note) for note in metrics["notes"]],
        "settings": _flatten(records.config),
    }


def model_contents(bundle: ModelBundle, folder: str) -> dict[str, Any]:
    """Collect what the page of a model without run records shows."""
    held_out = bundle.held_out
    n = len(held_out.is_right)
    accuracy = wilson(int(held_out.is_right.sum()), n)
    where = "out-of-fold" if held_out.split == "oof" else "validation"
    points, _ = risk_coverage(held_out.confidence, held_out.is_right.astype(bool))
    name = os.path.basename(folder)
    return {
        "title": os.path.basename(os.path.dirname(folder)) or name if name == "model" else name,
        "version": __version__,
        "verdict": f"Accuracy {percent(accuracy.value)} on {n:,} {where} images (95 % CI "
        f"{percent(accuracy.low)} to {percent(accuracy.high)}), which were also used to choose settings: "
        "slightly optimistic.",
        "facts": {
            "backbone": bundle.backbone.name,
            **bundle.made_by,
            "input size": f"{describe_size(bundle.preprocessing.input_size)} px, {bundle.preprocessing.fit}",
            "distinct training images": f"{len(bundle.trained_on):,}",
            "temperature": f"{bundle.temperature:.3f}",
            "tau": f"{bundle.tau:.2g}",
            "selection metric": bundle.metric,
        },
        "priors": {name: float(p) for name, p in zip(bundle.classes, bundle.priors, strict=True)},
        "risk_chart": charts.risk_chart([{"coverage": c, "risk": r} for c, r in points]),
        "missing": MISSING_RUN,
    }


def _summarize(records: RunRecords, per_class: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the headline, the selection metric and the weakest classes, a sentence each."""
    evaluation, baseline = records.evaluation, records.metrics["baseline"]
    accuracy, name = evaluation["accuracy"], records.metrics["headline"]["metric"]
    sentences = [
        f"Accuracy {percent(accuracy['value'])} on {evaluation['n']:,} {EVALUATED_ON[records.measured_on]} "
        f"(95 % CI {percent(accuracy['low'])} to {percent(accuracy['high'])}). Always predicting the most "
        f"common class, {baseline['class']!r}, would reach {percent(baseline['accuracy']['value'])}.",
        MEASURED_ON[records.measured_on],
    ]
    if evaluation["n"] < FEW_EVALUATED:
        sentences[0] += (
            f" With only {counted(evaluation['n'], 'image')}, all metrics are uncertain; see their intervals."
        )
    if records.measured_on == "oof" and "n_folds" not in records.metrics:
        sentences[-1] += " Settings were chosen on the same images: slightly optimistic."
    if name != "accuracy":
        metric = evaluation[name]
        sentences.append(
            f"Selection metric, {METRIC_TITLES[name]}: {metric['value']:.3f} "
            f"(95 % CI {metric['low']:.3f}–{metric['high']:.3f})."
        )
    weak = [row for row in per_class if row["confused_with"] and row["recall"]]
    if weak:
        named = [
            f"{row['class']!r} (recall {row['recall']['value']:.2f}, most often predicted as "
            f"{row['confused_with'][0]!r})"
            for row in sorted(weak, key=lambda row: row["recall"]["value"])[:N_WEAKEST]
        ]
        sentences.append(f"Weakest {'class' if len(named) == 1 else 'classes'}: {', '.join(named)}.")
    return sentences


def _metric_rows(records: RunRecords) -> list[dict[str, Any]]:
    baseline = records.metrics["baseline"]
    return [
        {
            "name": METRIC_TITLES[name] + _describe_average(records, name),
            "is_target": name == records.metrics["headline"]["metric"],
            "baseline": value["value"] if isinstance(value := baseline[name], Mapping) else value,
            **records.evaluation[name],
        }
        for name in HEADLINE_METRICS
    ]


def _describe_average(records: RunRecords, name: str) -> str:
    """Return " (over 1 of 2 classes)" for a macro average that lacks classes without images, else ""."""
    averaged, n = records.evaluation[name].get("n_classes"), len(records.evaluation["confusion"]["classes"])
    return "" if averaged in (None, n) else f" (over {averaged} of {n} classes)"


def _other_metrics(records: RunRecords) -> list[str]:
    """Return sentences on the accuracy of the same model on other images or with other labels."""
    metrics = records.metrics
    evaluations = {
        "Without test images that have duplicates in training": metrics.get("test_without_duplicates"),
        "With your corrected labels": metrics.get(f"{records.measured_on}_corrected"),
        "Final model on the test split": None if records.measured_on == "test" else metrics.get("test"),
        "Images of known classes only": records.evaluation.get("known_only"),
    }
    return [
        f"{title}: accuracy {accuracy['value']:.3f} (95 % CI {accuracy['low']:.3f}–{accuracy['high']:.3f}) "
        f"on {counted(evaluation['n'], 'image')}."
        for title, evaluation in evaluations.items()
        if evaluation is not None and (accuracy := evaluation["accuracy"])
    ]


def _class_rows(records: RunRecords) -> list[dict[str, Any]]:
    counts = records.metrics["train_counts"]
    confusions = Counter(sorted((row.label, row.prediction) for row in records.errors)).most_common()
    confused_with = {label: (prediction, n) for (label, prediction), n in reversed(confusions)}
    return [
        {
            **scores,
            "n_train": (n_train := int(counts.get(scores["class"], 0))),
            "is_rare": n_train < RARE_BELOW,
            "confused_with": confused_with.get(scores["class"]),
        }
        for scores in records.evaluation["per_class"]
    ]


def _training_charts(records: RunRecords) -> list[charts.Chart]:
    """Plot the learning curve and the training history, of a cross-validation that of the first fold."""
    curve = records.metrics.get("learning_curve")
    first_repeat = [row for row in records.history if row.get("repeat", 0) == 0]
    fold = first_repeat[0].get("fold") if first_repeat else None
    history = [row for row in first_repeat if row.get("fold") == fold]
    details = [] if fold is None else [f"fold {fold:.0f}"]
    by_fold = {(each["repeat"], each["fold"]): each["finetune"] for each in records.metrics.get("folds", ())}
    if by_fold.get((0, fold), records.metrics["finetune"]) == "none":
        details.append("fine-tuning that was not used")
    suffix = f" ({', '.join(details)})" if details else ""
    losses = {"train_loss": "training", "val_loss": "validation"}
    scores = {"val_macro_f1": "macro F1", "val_accuracy": "accuracy"}
    found = [
        None if curve is None else charts.learning_chart(curve["all"]["points"]),
        charts.history_chart(history, losses, f"Loss by epoch{suffix}"),
        charts.history_chart(history, scores, f"Validation metrics by epoch{suffix}"),
    ]
    return [chart for chart in found if chart is not None]


def _describe_novelty(novelty: Mapping[str, Any] | None) -> list[str]:
    """Return the threshold for images of none of the classes, and what is known about it, a sentence each."""
    if novelty is None:  # a run of an older version
        return []
    alarms, detected = novelty["false_alarm_rate"], novelty["detection_rate"]
    mean, low, high = (percent(share, 0) for share in BENCHMARK_DETECTION)
    expected = percent(1 - novelty["threshold"], 0)
    sentences = [
        f"If novelty is above {novelty['threshold']}, an image may belong to none of the classes. By "
        f"definition, {expected} of the images that selected settings are above."
    ]
    if alarms is None:
        sentences.append("The rate of false alarms was not measured: there is no test split.")
    else:
        sentences.append(f"False alarms: {_describe_rate(alarms)} of known classes.")
    if detected is not None:
        sentences.append(f"Detected: {_describe_rate(detected)} of classes without training images.")
    sentences.append(
        f"In our benchmark on ten other datasets, {mean} of the images of classes left out of training "
        f"were above, from {low} to {high} by dataset. For your unknown classes the rate may be very "
        "different: the more they look like known ones, the fewer of their images are detected."
    )
    return sentences


def _describe_rate(rate: Mapping[str, Any]) -> str:
    interval = f"95 % CI {percent(rate['low'])} to {percent(rate['high'])}"
    return f"{percent(rate['value'])} ({interval}) of {counted(rate['n'], 'test image')}"


def _describe_data(records: RunRecords) -> dict[str, Any]:
    data = records.metrics["data"]
    return {
        "n_usable": data["n_usable"],
        "sets": {kind: _first_sets(records, kind) for kind in DUPLICATE_KINDS},
        "n_sets": {kind: len(data[kind]) for kind in DUPLICATE_KINDS},
        "unreadable": data["unreadable"][:MAX_FILES],
        "n_unreadable": len(data["unreadable"]),
        "skipped": data["skipped"],
        "removed": data["removed_from_training"][:MAX_FILES],
        "n_removed": len(data["removed_from_training"]),
    }


def _first_sets(records: RunRecords, kind: str) -> list[list[Mapping[str, str]]]:
    return [members[:MAX_IN_SET] for members in records.metrics["data"][kind][:MAX_SETS]]


def _describe_training(records: RunRecords) -> list[str]:
    """Describe the method and the decisions made on held-out images, a sentence each."""
    metrics, chosen = records.metrics, records.metrics["chosen"]
    if "n_folds" in metrics:
        methods = ", ".join(f"{n} × {METHODS[method]}" for method, n in metrics["finetune"].items())
        sentences = [f"{metrics['n_folds']}-fold cross-validation: {methods}."]
    else:
        sentences = [f"Method: {METHODS[metrics['finetune']]}."]
    made = records.environment
    sentences.append(
        f"Trained on {made['date'][:10]} in {made['seconds']:.0f} s on {made['device']} "
        f"({made['n_cores']} cores), with PixelPlay {made['pixelplay']}, PyTorch {made['torch']} and "
        f"timm {made['timm']}."
    )
    sentences.append(
        f"Backbone: {made['backbone']}; weights: {made['weights']}, licence {made['weights_licence']}."
    )
    n_train = counted(sum(metrics["train_counts"].values()), "image")
    sentences.append(f"Training data: {n_train} in {len(metrics['train_counts'])} classes.")
    if (repeats := metrics.get("repeats", 1)) > 1:
        sentences.append(
            f"The cross-validation was repeated {repeats} times with different folds. Metrics are means over "
            "the repeats; the confusion matrix and the errors are those of the first."
        )
    for setting in ("backbone", "fit"):
        if found := chosen.get(setting):
            scores = ", ".join(f"{value} {nll:.3f}" for value, nll in found["nll_by_value"].items())
            name = setting.capitalize()
            sentences.append(f"{name}: {found['value']}; out-of-fold log loss of linear probes: {scores}.")
    if nlls := chosen.get("features", {}).get("nll_by_value"):
        outcome = "used" if chosen["features"]["value"] == "by_group" else "not used"
        sentences.append(
            f"Weights for each group of features: {outcome}; out-of-fold log loss "
            f"{nlls['by_group']:.3f}, with equal weights {nlls['equal']:.3f}."
        )
    temperature = chosen["temperature"]
    sentences.append(
        f"Temperature: {temperature['value']:.2f}, fitted on {counted(temperature['n'], 'held-out image')}."
    )
    if tau := chosen["tau"]["value"]:
        sentences.append(
            f"Logit adjustment: τ = {tau:.2g} favours rare classes to raise "
            f"{METRIC_TITLES[metrics['headline']['metric']]}; probabilities are not adjusted."
        )
    return sentences


def _describe_missing(records: RunRecords, images: ReportImages) -> list[str]:
    missing = []
    if images.missing is not None:
        why = records.redact(images.missing)
        missing.append(f"Images: {why}. Use pixelplay report RUN --data DATA to say where they are.")
    if records.config.get("command") is None:
        missing.append("Command: the run was started from Python or by an older version.")
    return missing


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings as one level of dotted names; of absolute paths only the file name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif name not in ("source", "command", "images_dir", "pixelplay"):
            is_local = isinstance(value, str) and os.path.isabs(value)
            flat[prefix + name] = os.path.basename(value) if is_local else value
    return flat
