"""The story: train, evaluate, predict; stages do the work. It begins with `data/scan.py`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pixelplay import __version__
from pixelplay.config import ComputeConfig, DataConfig, Part, TrainConfig
from pixelplay.data.cache import PhotographCache, default_cache_dir
from pixelplay.data.imbalance import class_priors
from pixelplay.data.index import ImageIndex
from pixelplay.data.parts import check_learnable
from pixelplay.data.scan import say_what_was_assumed, select_labelled
from pixelplay.data.source import list_files, list_images, scan_source
from pixelplay.data.tables import read_table
from pixelplay.errors import ConfigError, DataError, name_some
from pixelplay.evaluation.decision import Decision, fit_decision
from pixelplay.evaluation.operating_point import find_positive
from pixelplay.inference.predictor import Predictions, Predictor, join_predictions
from pixelplay.journal import Journal
from pixelplay.model.backbone import (
    FeatureKind,
    LoadedBackbone,
    load_backbone,
    pick_backbone_name,
)
from pixelplay.model.bundle import Bundle, shorten_digest, write_bundle
from pixelplay.model.features import (
    Device,
    FeatureExtractor,
    PhotographFeatures,
    find_device,
    make_extractor,
    read_features,
)
from pixelplay.outputs.judged import (
    EvaluationReport,
    choose_scored,
    compare_runs,
    evaluate_predictions,
    judge,
)
from pixelplay.outputs.records import TrainReport, make_report, say_what_was_found, write_records
from pixelplay.outputs.run_dir import new_run_dir
from pixelplay.outputs.submission import check_submission, write_submission
from pixelplay.outputs.table import check_new_file, write_predictions
from pixelplay.training.bench import Workplace, read_rows
from pixelplay.training.depth import check_depth
from pixelplay.training.job import fix_workspaces
from pixelplay.training.learn import Learned, learn
from pixelplay.training.material import Material, sort_out
from pixelplay.training.plan import follow, read_plan
from pixelplay.training.resume import check_photographs, check_settings

StrPath = str | os.PathLike[str]


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
        plan: plan.json of another run, to be repeated whatever the clock says.
        is_forced: replace an existing run.
        is_resumed: go on where a killed process stopped.

    Raises:
        DataError: the photographs cannot make a classifier.
        ConfigError: a setting, the output folder or the backbone cannot be used.
    """
    config, journal = config or TrainConfig(), journal or Journal()
    repeated = None if plan is None else read_plan(os.fspath(plan))
    if repeated is not None:
        config = follow(repeated, config)
    check_depth(config)
    with new_run_dir(os.fspath(out_dir), is_forced=is_forced, is_resumed=is_resumed) as folder:
        # What names alone can show is checked before the first expensive second.
        device = find_device(config.compute)
        fix_workspaces(config, device)
        workplace = Workplace(folder=folder, device=device, started=journal.started, plan=repeated)
        check_settings(workplace.checkpoints, config, device, repeated)
        index = say_what_was_assumed(scan_source(os.fspath(source), config.data, config.classes), journal)
        index = select_labelled(index, journal)
        check_learnable(index, np.ones(len(index), dtype=np.bool_))
        name = pick_backbone_name(config.backbone, device.name)
        features: FeatureKind = "stages" if config.finetune.head == "linear" else "pooled"
        backbone = load_backbone(
            name,
            config.weights,
            is_offline=config.offline,
            features=features,
            input_size=config.input_size,
        )

        # Every photograph is seen once by the backbone as it came. Nothing is learned here.
        extractor = make_extractor(backbone.backbone, backbone.preprocessing, config, device)
        photographs = _read(index, extractor, backbone.weights_id, config, journal)
        material = sort_out(index, photographs, config)
        say_what_was_found(material, index, photographs.errors, config, journal)
        check_photographs(workplace.checkpoints, material, backbone.weights_id)

        # Held-out photographs of the learning part choose how deep to train, then T and tau.
        learned = learn(material, backbone, config, workplace, journal)
        decision = _decide(learned, material, config, journal)
        bundle = _make_bundle(learned, decision, material, backbone, config, device)
        write_bundle(bundle, os.path.join(folder, "model"))

        # The test part is read once, here, and chooses nothing.
        test = material.parts.split.test
        held_out = judge(material, learned.held_out, decision.apply(learned.logits), config.seed)
        measured = None
        if len(test):
            tuned = make_extractor(learned.backbone, backbone.preprocessing, config, device)
            is_probe = learned.depth == "probe"
            test_features = material.features[test] if is_probe else read_rows(material, test, tuned, config)
            logits = learned.head.logits(test_features)
            measured = judge(material, test, decision.apply(logits), config.seed)
        judged = held_out, measured
        report = make_report(
            os.fspath(out_dir), config, material, photographs.errors, learned, decision, judged, journal.notes
        )
        write_records(folder, config, material, learned, report, judged)
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
    compute: ComputeConfig | None = None,
    journal: Journal | None = None,
) -> EvaluationReport:
    """Measure a trained classifier on labelled photographs.

    Args:
        part: the given part to score (default: test where the data has one, else everything).
        at_precision: report the recall that a two-class model reaches at this precision.
        positive: the class that precision and recall are about (default: the second).
        against: another run, whose figures are subtracted photograph by photograph.

    Raises:
        DataError: no labelled photograph to score, or not two classes for a precision.
        ConfigError: a precision outside (0, 1], or `positive` without one.
        BundleError: no model in `run` or `against`.
    """
    journal = journal or Journal()
    if positive is not None and at_precision is None:
        raise ConfigError(
            f"positive={positive!r} says nothing without a precision; add --at-precision 0.95, say"
        )
    index = say_what_was_assumed(scan_source(os.fspath(source), data), journal)
    index, scored_part = choose_scored(index, part)
    predictor = Predictor(run, compute)
    other = None if against is None else Predictor(against, compute)
    if at_precision is not None:  # refuse before the first expensive second
        find_positive(_labels_of(predictor, index), predictor.classes, positive, at_precision)
    predictions = _collect(predictor, index, journal)
    report = evaluate_predictions(
        predictions,
        index,
        predictor.bundle,
        scored_part,
        journal,
        at_precision=at_precision,
        positive=positive,
    )
    if against is None or other is None:
        return report
    answers = predictions, _collect(other, index, journal)
    bundles, runs = (predictor.bundle, other.bundle), (os.fspath(run), os.fspath(against))
    return replace(report, against=compare_runs(answers, bundles, runs, index, journal))


def predict(
    run: StrPath,
    images: Sequence[StrPath],
    out: StrPath,
    *,
    submission: StrPath | None = None,
    path_column: str | None = None,
    images_dir: str | None = None,
    is_forced: bool = False,
    compute: ComputeConfig | None = None,
    journal: Journal | None = None,
) -> int:
    """Classify photographs into a table: one row for each, in order, whatever is wrong with some.

    Returns:
        The number of rows without a prediction.

    Args:
        images: folders, tables, zip archives and files.
        out: the table to write, .csv or .parquet.
        submission: sample submission; `out` then has exactly its header, ids and order.
        path_column: column of a table that names the photographs.
        images_dir: folder that the names in a table are looked up in.
        is_forced: replace an existing table.

    Raises:
        DataError: nothing there, or none of it can be read.
        ConfigError: the table cannot be written.
        BundleError: no model in `run`.
    """
    journal = journal or Journal()
    out = os.fspath(out)
    check_new_file(out, is_forced=is_forced)
    sample = None if submission is None else read_table(os.fspath(submission))
    data = DataConfig(path_column=path_column, images_dir=images_dir)
    indexes = _list_all([os.fspath(source) for source in images], data, journal)
    n_images = sum(len(index) for index in indexes)
    predictor = Predictor(run, compute)
    if sample is not None:
        check_submission(sample, predictor.classes, out)
    n_bad = 0

    def watch() -> Iterator[Predictions]:
        nonlocal n_bad
        for index in indexes:
            for chunk in predictor.predict_stream(index):
                bar.update(len(chunk))
                n_bad += sum(status != "ok" for status in chunk.status)
                yield chunk
        if n_bad == n_images:
            raise DataError(
                f"none of the {n_images} photographs can be read; last: {chunk.paths[-1]}: {chunk.errors[-1]}"
            )

    with journal.progress("predicting", n_images) as bar:
        if sample is None:
            write_predictions(watch(), predictor.classes, out)
        else:
            predictions = join_predictions(list(watch()), predictor.classes)
            for note in write_submission(predictions, sample, out):
                journal.note(note)
    if n_bad:
        journal.note(f"{n_bad} of {n_images} photographs could not be read; their rows say why")
    return n_bad


def _list_all(sources: Sequence[str], data: DataConfig, journal: Journal) -> list[ImageIndex]:
    """Name all photographs in order; single files in a row share an index, and so share batches.

    Raises:
        DataError: there are none.
    """
    listed = (say_what_was_assumed(list_images(source, data), journal) for source in sources)
    indexes: list[ImageIndex] = []
    for is_file, neighbours in groupby(listed, key=lambda index: not index.source):
        together = list(neighbours)
        indexes += [list_files([index.paths[0] for index in together])] if is_file else together
    if not any(len(index) for index in indexes):
        where = f"in {name_some(sources)}" if sources else "named"
        raise DataError(f"no photographs {where}; give files, tables, zip archives or folders that hold some")
    return indexes


def _labels_of(predictor: Predictor, index: ImageIndex) -> NDArray[np.int64]:
    """Labels (N,) as the model numbers them, -1 for a class that it does not know."""
    position = {name: k for k, name in enumerate(predictor.classes)}
    return np.array([position.get(index.classes[k], -1) for k in index.labels], dtype=np.int64)


def _decide(learned: Learned, material: Material, config: TrainConfig, journal: Journal) -> Decision:
    decision = fit_decision(
        learned.logits,
        material.labels[learned.held_out],
        material.parts.groups[learned.held_out],
        class_priors(material.counts_of(learned.prior_from)),
        metric=config.metric,
        seed=config.seed,
    )
    if decision.temperature.at_bound:
        journal.note(
            "held-out photographs are all right, or no better than chance, and fix no temperature: T = 1"
        )
    return decision


def _make_bundle(
    learned: Learned,
    decision: Decision,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
) -> Bundle:
    return Bundle(
        backbone=learned.backbone,
        classes=material.known_classes,
        preprocessing=loaded.preprocessing,
        hflip=config.hflip,
        precision=device.precision,
        temperature=decision.temperature.temperature,
        tau=decision.tau.tau,
        priors=decision.priors,
        metric=config.metric,
        trained_on=frozenset(shorten_digest(material.digests[i]) for i in learned.learned_from),
        head=learned.head,
        made_by=_made_by(loaded),
    )


def _read(
    index: ImageIndex,
    extractor: FeatureExtractor,
    weights_id: str,
    config: TrainConfig,
    journal: Journal,
) -> PhotographFeatures:
    cache = PhotographCache(
        config.cache_dir or default_cache_dir(),
        "features",
        extractor.cache_key(weights_id),
        max_bytes=int(config.cache_gb * 1e9),
    )
    with journal.progress("reading", len(index)) as bar:
        photographs = read_features(
            index, extractor, cache, num_workers=config.compute.num_workers, on_progress=bar.update
        )
    if cache.failure:
        journal.note(f"features cannot be kept in the cache: {cache.failure}")
    return photographs


def _collect(predictor: Predictor, index: ImageIndex, journal: Journal) -> Predictions:
    chunks = []
    with journal.progress("predicting", len(index)) as bar:
        for chunk in predictor.predict_stream(index):
            bar.update(len(chunk))
            chunks.append(chunk)
    return join_predictions(chunks, predictor.classes)


def _made_by(backbone: LoadedBackbone) -> dict[str, str]:
    return {"pixelplay": __version__, "weights": backbone.origin, "weights_sha256": backbone.weights_id}
