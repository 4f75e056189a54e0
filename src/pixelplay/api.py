"""The public functions: train, cross_validate, evaluate, predict, explain (scan: dataset_scan.py)."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from pixelplay.config import (
    CamName,
    ComputeConfig,
    DataConfig,
    SplitName,
    StrPath,
    TrainConfig,
    Tta,
    UncertaintyConfig,
    with_settings,
)
from pixelplay.data.sources import (
    as_list,
    list_all_images,
    list_labelled_images,
    log_dataset_notes,
    open_dataset,
)
from pixelplay.data.tables import read_table
from pixelplay.evaluation.selective import check_precision_arguments, find_positive_class
from pixelplay.inference.explain import Explainer
from pixelplay.inference.predictor import (
    EnsemblePredictor,
    Predictor,
    collect_predictions,
    join_predictions,
)
from pixelplay.inference.sets_and_abstention import Uncertainty
from pixelplay.model.bundle import write_bundle
from pixelplay.outputs.crossval_report import make_crossval_report, write_crossval_records
from pixelplay.outputs.evaluation_report import (
    EvaluationReport,
    check_shared_classes,
    compare_runs,
    evaluate_held_out,
    evaluate_predictions,
    evaluate_test,
    positions_in,
    select_scored,
    write_evaluated,
)
from pixelplay.outputs.explanations import ExplainedImage, new_explanations_dir, write_explanations
from pixelplay.outputs.metrics_json import RunReport
from pixelplay.outputs.predictions_table import (
    PredictionSummary,
    PredictionWriter,
    check_new_file,
    check_output,
    open_output,
)
from pixelplay.outputs.submission import check_submission, write_submission
from pixelplay.outputs.train_report import make_train_report, write_train_records
from pixelplay.run_log import RunLog
from pixelplay.training import cross_validation
from pixelplay.training.finalize import finalize, predict_rows
from pixelplay.training.input_selection import select_input
from pixelplay.training.label_cleaning import remove_label_issues
from pixelplay.training.learning_curve import measure_learning_curve
from pixelplay.training.prepare import prepare, with_bit_range
from pixelplay.training.probe_or_finetune import fit_probe_or_finetune
from pixelplay.training.run_context import RunContext


def train(
    data: StrPath,
    out_dir: StrPath,
    config: TrainConfig | None = None,
    *,
    plan: StrPath | None = None,
    force: bool = False,
    resume: bool = False,
    log: RunLog | None = None,
    command: str | None = None,
    started: float | None = None,
    **settings: Any,
) -> RunReport:
    """Train one classifier: labelled images in, model bundle and honest metrics out.

    Args:
        data: folder, table or zip archive of labelled images.
        out_dir: folder of the run; it appears once it is complete.
        plan: plan.json of another run: the same method, stages, views, epochs and batch size.
        command: the command as typed, for the run's records.
        started: `time.monotonic()` from which the time budget counts (default: now).
        settings: fields of `TrainConfig` and of its groups, such as finetune="none" or epochs=5; they
            replace those of `config`.

    Raises:
        DataError: the images cannot be used to train a classifier.
        ConfigError: a setting, the output folder or the backbone cannot be used.
    """
    config, log = with_settings(config, settings), log or RunLog()
    opened = RunContext.open(out_dir, config, log, force=force, resume=resume, started=started, plan=plan)
    with opened as ctx:
        dataset = list_labelled_images(os.fspath(data), ctx.config, log)
        ctx = with_bit_range(dataset, ctx)
        images, ctx = select_input(prepare(dataset, ctx), ctx)
        if ctx.config.drop_label_issues:
            images = remove_label_issues(images, ctx)
        classifier = fit_probe_or_finetune(images, ctx)  # held-out images decide
        bundle, rule = finalize(classifier, images, ctx)  # temperature, tau, novelty scale
        write_bundle(bundle, os.path.join(ctx.run_dir, "model"))
        held_out = evaluate_held_out(classifier, rule, images, ctx)
        test = evaluate_test(
            classifier, rule, bundle.novelty, images, ctx
        )  # the only time the test split is read
        curve = measure_learning_curve(images, classifier, rule, ctx.config.seed)
        report = make_train_report(
            os.fspath(out_dir), classifier, rule, held_out, test, curve, images, ctx, command
        )
        write_train_records(report, classifier, held_out, test, images, ctx)
    return report


def cross_validate(
    data: StrPath,
    out_dir: StrPath,
    config: TrainConfig | None = None,
    *,
    repeats: int = 1,
    single: bool = False,
    force: bool = False,
    resume: bool = False,
    log: RunLog | None = None,
    command: str | None = None,
    started: float | None = None,
    **settings: Any,
) -> RunReport:
    """Train one classifier per fold, and predict every image with one that was not trained on it.

    The metrics estimate the procedure: classifiers trained on all but one fold. The deployed classifier (the
    ensemble of all folds, or one trained on all images) is evaluated only on a predefined test split.

    Args:
        data: folder, table or zip archive of labelled images; a predefined test split is in no fold.
        out_dir: folder of the run; it appears once it is complete.
        config: as for `train`; the time budget is per fold.
        repeats: repetitions with different folds, 1 to 20.
        single: deploy one classifier trained on everything instead of the ensemble.
        command: the command as typed, for the run's records.
        started: `time.monotonic()` at the start of the command (default: now).
        settings: fields of `TrainConfig` and of its groups, as in `train`.

    Raises:
        DataError: the images cannot be used, or a class has fewer of them than folds.
        ConfigError: a setting, the output folder or the backbone cannot be used.
    """
    log = log or RunLog()
    config = cross_validation.without_test_split(with_settings(config, settings), log)
    cross_validation.check_repeats(config, repeats, single=single)
    options = {"repeats": repeats, "single": single}
    opened = RunContext.open(
        out_dir, config, log, force=force, resume=resume, started=started, options=options
    )
    with opened as ctx:
        dataset = cross_validation.without_val_split(list_labelled_images(os.fspath(data), config, log), log)
        cross_validation.check_fold_sizes(dataset.select(~dataset.in_split("test")), config.n_folds)
        ctx = with_bit_range(dataset, ctx)
        images, ctx = select_input(prepare(dataset, ctx), ctx)
        validation = cross_validation.train_folds(images, ctx, repeats)
        if single:
            classifier, logits = cross_validation.train_single(validation, images, ctx), validation.logits
        else:
            classifier, logits = cross_validation.average_folds(validation, images, ctx)
        bundle, rule = cross_validation.finalize_folds(classifier, logits, validation, images, ctx)
        write_bundle(bundle, os.path.join(ctx.run_dir, "model"))
        test = evaluate_test(
            classifier, rule, bundle.novelty, images, ctx
        )  # the only time a predefined test split is read
        excluded = predict_rows(classifier, images, ctx, images.excluded)
        validation = cross_validation.with_excluded(validation, images.excluded, excluded, rule)
        report = make_crossval_report(
            os.fspath(out_dir), validation, classifier, rule, test, images, ctx, command, single=single
        )
        write_crossval_records(report, validation, classifier, test, images, ctx)
    return report


def evaluate(
    run: StrPath,
    data: StrPath,
    reading: DataConfig | None = None,
    *,
    split: SplitName | None = None,
    at_precision: float | None = None,
    positive: str | None = None,
    against: StrPath | None = None,
    tta: Tta | None = None,
    out: StrPath | None = None,
    force: bool = False,
    compute: ComputeConfig | None = None,
    log: RunLog | None = None,
) -> EvaluationReport:
    """Evaluate a trained classifier on labelled images.

    Args:
        data: folder, table or zip archive of labelled images.
        reading: how paths, labels, splits and groups are read.
        split: predefined split to evaluate (default: test if there is one, else all images).
        at_precision: report the recall that a two-class model reaches at this precision.
        positive: class that precision and recall refer to (default: the second).
        against: another run to compare with, image by image.
        out: table to write, .csv or .parquet: each prediction with its label.

    Raises:
        DataError: no labelled image of a class of the model, or not two classes for a precision.
        ConfigError: a setting is out of range or contradictory, or the table cannot be written.
        BundleError: no model in `run` or `against`.
    """
    log = log or RunLog()
    check_precision_arguments(positive, at_precision)
    if out is not None:
        check_new_file(os.fspath(out), force=force)
    dataset = log_dataset_notes(open_dataset(os.fspath(data), reading), log)
    dataset, scored_split = select_scored(dataset, split, log)
    predictor = Predictor(run, compute, tta=tta)
    check_shared_classes(dataset, predictor.classes)
    other = None if against is None else Predictor(against, compute, tta=tta)
    if at_precision is not None:  # refuse before the first expensive second
        labels = positions_in(dataset.classes, predictor.classes)[dataset.labels]
        find_positive_class(labels, predictor.classes, positive, at_precision)
    predictions = collect_predictions(predictor, dataset, log)
    report = evaluate_predictions(
        predictions,
        dataset,
        predictor.bundle,
        scored_split,
        log,
        at_precision=at_precision,
        positive=positive,
    )
    if out is not None:
        write_evaluated(predictions, dataset, predictor.bundle, os.fspath(out))
    if against is None or other is None:
        return report
    both = predictions, collect_predictions(other, dataset, log)
    bundles, runs = (predictor.bundle, other.bundle), (os.fspath(run), os.fspath(against))
    return replace(report, against=compare_runs(both, bundles, runs, dataset, log))


def predict(
    run: StrPath,
    images: StrPath | Sequence[StrPath],
    out: StrPath | PredictionWriter,
    *,
    submission: StrPath | None = None,
    probability_of: str | None = None,
    path_column: str | None = None,
    images_dir: str | None = None,
    force: bool = False,
    ensemble_with: StrPath | Sequence[StrPath] = (),
    tta: Tta | None = None,
    uncertainty: UncertaintyConfig | None = None,
    compute: ComputeConfig | None = None,
    log: RunLog | None = None,
) -> PredictionSummary:
    """Predict images and write a table with one row per image, in order, unreadable ones included.

    Args:
        images: folders, tables, zip archives and image files, or one of these.
        out: table to write, .csv or .parquet, or an object whose `write` takes each chunk of predictions.
        submission: sample submission; `out` then has exactly its header, ids and order.
        probability_of: class whose probability fills the sample's one column (default: class names do).
        images_dir: folder that the paths in a table are relative to.
        ensemble_with: other runs to average probabilities with.
        uncertainty: prediction sets and abstention.

    Returns:
        Counts of predictions, unreadable, unusual and abstained images.

    Raises:
        DataError: no images, none readable, or too few held-out images for `uncertainty`.
        ConfigError: the table cannot be written, or the runs have different classes.
        BundleError: no model in `run`.
    """
    log = log or RunLog()
    path = check_output(out, force=force, is_submission=submission is not None)
    uncertainty = uncertainty or UncertaintyConfig()
    sample = None if submission is None else read_table(os.fspath(submission))
    datasets = list_all_images(images, DataConfig(path_column=path_column, images_dir=images_dir), log)
    if others := as_list(ensemble_with):
        predictor: Predictor | EnsemblePredictor = EnsemblePredictor([run, *others], compute, tta=tta)
    else:
        predictor = Predictor(run, compute, tta=tta)
    check_submission(sample, predictor.classes, path, probability_of=probability_of, uncertainty=uncertainty)
    thresholds = Uncertainty(uncertainty, predictor.held_out)
    for note in thresholds.notes:
        log.note(note)
    summary, chunks = PredictionSummary(), []
    new_table = open_output(out, predictor.classes) if sample is None else nullcontext()
    with new_table as table, log.progress("predicting", sum(map(len, datasets))) as bar:
        for dataset in datasets:
            for predictions in predictor.predict_stream(dataset):
                chunk = thresholds.apply(predictions)
                bar.update(len(chunk))
                summary.add(chunk)
                if table is not None:
                    table.write(chunk)
                else:
                    chunks.append(chunk)
    if sample is not None:
        whole = join_predictions(chunks, predictor.classes)
        for note in write_submission(whole, sample, path, probability_of=probability_of):
            log.note(note)
    summary.log_unreadable(path if path and sample is None else None, log)
    return summary


def explain(
    run: StrPath,
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    class_name: str | None = None,
    method: CamName | None = None,
    path_column: str | None = None,
    images_dir: str | None = None,
    force: bool = False,
    ensemble_with: StrPath | Sequence[StrPath] = (),
    compute: ComputeConfig | None = None,
    log: RunLog | None = None,
) -> list[ExplainedImage]:
    """Show which image regions support a class: overlays, heat maps and a table.

    Args:
        images: folders, tables, zip archives and image files, or one of these.
        out: folder to write; it appears once it is complete.
        class_name: class to explain (default: the predicted class of each image).
        method: "gradcam", "gradcam++" or "layercam" (default: "layercam", the most faithful).
        images_dir: folder that the paths in a table are relative to.
        force: replace a folder of explanations.
        ensemble_with: other runs to explain together with this one.

    Returns:
        One row per image, as in explanations.csv.

    Raises:
        DataError: no images, or none readable.
        ConfigError: the folder cannot be written, or the class is unknown.
        BundleError: no model in `run`.
    """
    log = log or RunLog()
    with new_explanations_dir(os.fspath(out), force=force) as folder:
        datasets = list_all_images(images, DataConfig(path_column=path_column, images_dir=images_dir), log)
        names = [os.fspath(each) for each in (run, *as_list(ensemble_with))]
        predictor = EnsemblePredictor(names, compute) if len(names) > 1 else Predictor(names[0], compute)
        explainer = Explainer(*predictor.bundles, names=names, compute=compute, method=method)
        return write_explanations(predictor, explainer, datasets, class_name, folder, log)
