"""The story: train, cross-validate, evaluate, predict, explain; stages work. It begins in `data/scan.py`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from pixelplay.config import CautionConfig, ComputeConfig, DataConfig, Method, Part, StrPath, TrainConfig, Tta
from pixelplay.data.sources import as_several, name_images, name_labelled, say_what_was_assumed, scan_source
from pixelplay.data.tables import read_table
from pixelplay.evaluation.selective import check_asked, find_positive
from pixelplay.inference.explain import Explainer, explain_all
from pixelplay.inference.predictor import (
    JointPredictor,
    Predictions,
    Predictor,
    collect_predictions,
    join_predictions,
)
from pixelplay.inference.uncertainty import Caution
from pixelplay.model.bundle import read_bundle, write_bundle
from pixelplay.model.device import find_device
from pixelplay.outputs.crossval_report import CrossvalReport, make_crossval_report, write_crossval_records
from pixelplay.outputs.evaluation_report import (
    EvaluationReport,
    answer_rows,
    choose_scored,
    compare_runs,
    evaluate_predictions,
    judge_held_out,
    judge_test,
    labels_among,
    write_judged,
)
from pixelplay.outputs.explanations import new_explanations_dir, write_explanations
from pixelplay.outputs.predictions_table import Tally, check_new_file, write_predictions
from pixelplay.outputs.submission import check_submission, write_submission
from pixelplay.outputs.train_report import TrainReport, make_report, write_records
from pixelplay.run_log import Journal
from pixelplay.training.compatibility import check_depth
from pixelplay.training.cross_validation import (
    check_enough,
    check_repeats,
    learn_folds,
    with_left_out,
    without_test,
    without_val,
)
from pixelplay.training.finalize import deploy_folds, deploy_learned, make_bundle
from pixelplay.training.label_cleaning import without_suspects
from pixelplay.training.prepare import prepare_material
from pixelplay.training.probe_or_finetune import learn
from pixelplay.training.resume import check_settings, repeat_plan
from pixelplay.training.run_context import Workplace
from pixelplay.training.run_dir import new_run_dir
from pixelplay.training.schedule import fix_workspaces


def train(
    source: StrPath,
    out_dir: StrPath,
    config: TrainConfig | None = None,
    *,
    plan: StrPath | None = None,
    is_forced: bool = False,
    is_resumed: bool = False,
    journal: Journal | None = None,
) -> TrainReport:
    """Learn one classifier: labelled photographs in, model bundle and honest metrics out.

    Args:
        source: folder, table or zip archive of labelled photographs.
        out_dir: folder of the run; it appears once everything in it is there.
        plan: plan.json of another run: the same depth, stages, views, epochs and batch size, at any speed.
        is_forced: replace an existing run.
        is_resumed: go on where a killed process stopped.

    Raises:
        DataError: the photographs cannot make a classifier.
        ConfigError: a setting, the output folder or the backbone cannot be used.
    """
    config, journal = config or TrainConfig(), journal or Journal()
    repeated, config = (None, config) if plan is None else repeat_plan(os.fspath(plan), config, journal)
    check_depth(config)
    with new_run_dir(os.fspath(out_dir), is_forced=is_forced, is_resumed=is_resumed) as folder:
        # What names alone can show is checked before the first expensive second.
        device = find_device(config.compute)
        fix_workspaces(config, device)
        workplace = Workplace(folder=folder, device=device, started=journal.started, plan=repeated)
        check_settings(workplace.checkpoints, config, device, repeated, journal)
        index = name_labelled(os.fspath(source), config, journal)
        material, backbone = prepare_material(index, config, workplace, journal)

        if config.drop_suspects:
            material = without_suspects(material, config, journal)

        # Held-out photographs of the learning part choose how deep to train, then T and tau.
        learned = learn(material, backbone, config, workplace, journal)
        deployed = deploy_learned(learned, material, backbone, config, device, journal)
        bundle = make_bundle(deployed, material, backbone, config, device)
        write_bundle(bundle, os.path.join(folder, "model"))

        # The test part is read once, here, and chooses nothing.
        answer, decision = deployed.answer, deployed.decision
        ask = partial(answer_rows, answer, material, backbone, config, device)
        decided = decision.apply(learned.logits)
        held_out = judge_held_out(material, learned, decided, ask, decision, config.seed)
        judged = held_out, judge_test(material, ask, decision, config.seed)
        report = make_report(os.fspath(out_dir), config, material, learned, decision, judged, journal)
        write_records(folder, config, material, learned, report, judged)
    return report


def cross_validate(
    source: StrPath,
    out_dir: StrPath,
    config: TrainConfig | None = None,
    *,
    n_repeats: int = 1,
    is_single: bool = False,
    is_forced: bool = False,
    is_resumed: bool = False,
    journal: Journal | None = None,
) -> CrossvalReport:
    """Learn a classifier without each of `config.n_folds` folds in turn; every photograph measures once.

    The figures are of the procedure: of classifiers that learn from all but a fold. What is deployed,
    the mean of all of them or one that learned from everything, is measured on a given test part only.

    Args:
        source: folder, table or zip archive of labelled photographs; a given test part takes no part.
        out_dir: folder of the run; it appears once everything in it is there.
        config: as for `train`; its time budget is that of each fold.
        n_repeats: deal the photographs into folds so often, 1 to 20.
        is_single: deploy one classifier that learned from everything instead of the folds' mean.
        is_forced: replace an existing run.
        is_resumed: go on where a killed process stopped.

    Raises:
        DataError: the photographs cannot make classifiers, or a class has fewer of them than folds.
        ConfigError: a setting, the output folder or the backbone cannot be used.
    """
    config, journal = config or TrainConfig(), journal or Journal()
    config = without_test(config, journal)
    check_repeats(config, n_repeats, is_single=is_single)
    check_depth(config)
    with new_run_dir(os.fspath(out_dir), is_forced=is_forced, is_resumed=is_resumed) as folder:
        device = find_device(config.compute)
        fix_workspaces(config, device)
        workplace = Workplace(folder=folder, device=device, started=journal.started, plan=None)
        also = {"n_repeats": n_repeats, "is_single": is_single}
        check_settings(workplace.checkpoints, config, device, None, journal, also)
        index = without_val(name_labelled(os.fspath(source), config, journal), journal)
        check_enough(index.select(~index.in_part("test")), config.n_folds)
        material, backbone = prepare_material(index, config, workplace, journal)

        # Each fold is predicted by a classifier that has not seen it, and decided by what the others say.
        validation = learn_folds(material, backbone, config, workplace, n_repeats, journal)

        # All folds together choose how the deployed model decides.
        deployed = deploy_folds(
            validation, material, backbone, config, workplace, journal, is_single=is_single
        )
        bundle = make_bundle(deployed, material, backbone, config, device)
        write_bundle(bundle, os.path.join(folder, "model"))

        # A test part that the data gives is read once, here, and chooses nothing.
        answer, decision = deployed.answer, deployed.decision
        ask = partial(answer_rows, answer, material, backbone, config, device)
        test = judge_test(material, ask, decision, config.seed)
        validation = with_left_out(validation, material.left_out, ask(material.left_out), decision)
        report = make_crossval_report(
            os.fspath(out_dir), config, material, validation, deployed, test, journal
        )
        write_crossval_records(folder, config, material, validation, report, deployed, test)
    return report


def evaluate(
    run: StrPath,
    source: StrPath,
    data: DataConfig | None = None,
    *,
    part: Part | None = None,
    at_precision: float | None = None,
    positive: str | None = None,
    against: StrPath | None = None,
    tta: Tta | None = None,
    out: StrPath | None = None,
    is_forced: bool = False,
    compute: ComputeConfig | None = None,
    journal: Journal | None = None,
) -> EvaluationReport:
    """Measure a trained classifier on labelled photographs.

    Args:
        part: the given part to score (default: test where the data has one, else everything).
        at_precision: report the recall that a two-class model reaches at this precision.
        positive: the class that precision and recall are about (default: the second).
        against: another run, whose figures are subtracted photograph by photograph.
        tta: views of each photograph that are answered for together, as of `Predictor`.
        out: a table to write, .csv or .parquet: each prediction beside the class that was given.
        is_forced: replace an existing table.

    Raises:
        DataError: no labelled photograph to score, or not two classes for a precision.
        ConfigError: a precision outside (0, 1], `positive` without one, no such part, device or views, or the
            table cannot be written.
        BundleError: no model in `run` or `against`.
    """
    journal = journal or Journal()
    check_asked(positive, at_precision)
    if out is not None:
        check_new_file(os.fspath(out), is_forced=is_forced)
    index = say_what_was_assumed(scan_source(os.fspath(source), data), journal)
    index, scored_part = choose_scored(index, part, journal)
    predictor = Predictor(run, compute, tta=tta)
    other = None if against is None else Predictor(against, compute, tta=tta)
    if at_precision is not None:  # refuse before the first expensive second
        find_positive(labels_among(predictor.classes, index), predictor.classes, positive, at_precision)
    predictions = collect_predictions(predictor, index, journal)
    report = evaluate_predictions(
        predictions,
        index,
        predictor.bundle,
        scored_part,
        journal,
        at_precision=at_precision,
        positive=positive,
    )
    if out is not None:
        write_judged(predictions, index, predictor.bundle, os.fspath(out))
    if against is None or other is None:
        return report
    answers = predictions, collect_predictions(other, index, journal)
    bundles, runs = (predictor.bundle, other.bundle), (os.fspath(run), os.fspath(against))
    return replace(report, against=compare_runs(answers, bundles, runs, index, journal))


def predict(
    run: StrPath,
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    submission: StrPath | None = None,
    probability_of: str | None = None,
    path_column: str | None = None,
    images_dir: str | None = None,
    is_forced: bool = False,
    with_runs: StrPath | Sequence[StrPath] = (),
    tta: Tta | None = None,
    caution: CautionConfig | None = None,
    compute: ComputeConfig | None = None,
    journal: Journal | None = None,
) -> Tally:
    """Classify photographs into a table: one row for each, in order, whatever is wrong with some.

    Returns:
        How many photographs there were, and what became of them.

    Args:
        images: folders, tables, zip archives and files, or one of these.
        out: the table to write, .csv or .parquet.
        submission: sample submission; `out` then has exactly its header, ids and order.
        probability_of: class whose probability a sample's one column wants (default: labels go there).
        path_column: column of a table that names the photographs.
        images_dir: folder that the names in a table are looked up in.
        is_forced: replace an existing table.
        with_runs: other runs that answer with this one, by the mean of their probabilities.
        tta: views of each photograph that are answered for together, as of `Predictor`.
        caution: what each prediction is to say about its own worth.

    Raises:
        DataError: nothing there, too little held out for the caution, or, as the table tells, none readable.
        ConfigError: the table cannot be written, or the runs know different classes.
        BundleError: no model in `run`.
    """
    journal = journal or Journal()
    out = os.fspath(out)
    check_new_file(out, is_forced=is_forced)
    caution = caution or CautionConfig()
    sample = None if submission is None else read_table(os.fspath(submission))
    data = DataConfig(path_column=path_column, images_dir=images_dir)
    indexes = name_images(images, data, journal)
    n_images = sum(len(index) for index in indexes)
    others = as_several(with_runs)
    predictor = (
        JointPredictor([run, *others], compute, tta=tta) if others else Predictor(run, compute, tta=tta)
    )
    check_submission(sample, predictor.classes, out, probability_of=probability_of, caution=caution)
    careful = Caution(caution, predictor.held_out)
    for note in careful.notes:
        journal.note(note)
    tally = Tally()

    def watch() -> Iterator[Predictions]:
        for index in indexes:
            for chunk in predictor.predict_stream(index):
                bar.update(len(chunk))
                answered = careful.apply(chunk)
                tally.add(answered)
                yield answered

    with journal.progress("predicting", n_images) as bar:
        if sample is None:
            write_predictions(watch(), predictor.classes, out)
        else:
            predictions = join_predictions(list(watch()), predictor.classes)
            for note in write_submission(predictions, sample, out, probability_of=probability_of):
                journal.note(note)
    tally.say_what_is_missing(out if sample is None else None, journal)
    return tally


def explain(
    run: StrPath,
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    label: str | None = None,
    method: Method | None = None,
    path_column: str | None = None,
    images_dir: str | None = None,
    is_forced: bool = False,
    with_runs: StrPath | Sequence[StrPath] = (),
    compute: ComputeConfig | None = None,
    journal: Journal | None = None,
) -> int:
    """Show where in photographs a classifier sees a class: overlays, raw maps, contact sheets and a table.

    Returns:
        The number of photographs that could not be explained.

    Args:
        images: folders, tables, zip archives and files, or one of these.
        out: folder to write; it appears once everything in it is there.
        label: the class to explain (default: of each photograph the one that the model decides for).
        method: how gradients become a map (default: the most faithful as measured).
        path_column, images_dir: of tables, as for `predict`.
        is_forced: replace a folder of explanations.
        with_runs: other runs that are explained with this one, as they answer together.

    Raises:
        DataError: nothing there, or none of it can be read.
        ConfigError: the folder cannot be written, the class is unknown, or the runs know different classes.
        BundleError: no model in `run`.
    """
    journal = journal or Journal()
    with new_explanations_dir(os.fspath(out), is_forced=is_forced) as folder:
        data = DataConfig(path_column=path_column, images_dir=images_dir)
        indexes = name_images(images, data, journal)
        names = [os.fspath(each) for each in (run, *as_several(with_runs))]
        explainer = Explainer(*map(read_bundle, names), names=names, compute=compute, method=method)
        if label is not None:
            explainer.check_label(label)
        looks = explain_all(explainer, indexes, label)
        return write_explanations(looks, sum(map(len, indexes)), folder, journal)
