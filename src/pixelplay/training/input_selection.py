"""Select the backbone, and how images are fitted into its input, by the log loss of linear probes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np

from pixelplay.array_types import Float32Array
from pixelplay.data.decode import decode_image
from pixelplay.data.sampling import class_priors
from pixelplay.data.transforms import Fit
from pixelplay.errors import ConfigError, MissingExtraError
from pixelplay.evaluation.decision_rule import compare_nll
from pixelplay.model.backbone import PretrainedBackbone
from pixelplay.model.features import extract_features
from pixelplay.training.imbalance import fit_probe_on_rows
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData

CLEAR = 1.64  # standard errors of the paired difference; one-sided 95 %
MAX_BUDGET_FRAC = 0.3  # of the time budget, after which nothing further is tried
SAME_ASPECT = 1.1  # ratio of the images' median aspect ratio and the input's below which fits hardly differ
MAX_SIZES = 100  # images whose aspect ratio is looked at

Candidate = tuple[
    str, Callable[[], PretrainedBackbone]
]  # value of the setting, backbone with its preprocessing
Selected = tuple[TrainingData, RunContext]


def select_input(data: TrainingData, ctx: RunContext) -> Selected:
    """Select among several backbones, then with `--fit auto` among the fits.

    Returns:
        The data with the features of the selected backbone and fit, and a context with them and the evidence.

    Raises:
        ConfigError: a backbone cannot be used.
        ImageError: an image can no longer be read.
    """
    names = ctx.backbone_names
    data, ctx = _select("backbone", [(name, partial(ctx.load_backbone, name)) for name in names], data, ctx)
    if ctx.config.fit != "auto":
        return data, ctx
    loaded = ctx.backbone
    height, width = loaded.preprocessing.input_size
    ratio = _median_aspect(data) / (width / height)
    if max(ratio, 1 / ratio) < SAME_ASPECT:
        ctx.log.note("--fit auto is squash: most images have about the aspect ratio of the input")
        return data, ctx
    return _select("fit", [(fit, partial(_with_fit, loaded, fit)) for fit in get_args(Fit)], data, ctx)


def _select(setting: str, candidates: Sequence[Candidate], data: TrainingData, ctx: RunContext) -> Selected:
    """Keep the first candidate, which the data has features of, unless a later one is clearly better.

    Splits, folds and duplicates stay as they are. Test images have no influence.
    """
    (selected, _), *others = candidates
    if not others:
        return data, ctx
    rows, best = data.fit_rows, (data, ctx)
    labels, groups, priors = data.labels[rows], data.split.groups[rows], class_priors(data.fit_counts)
    logits = _held_out_logits(data, ctx, selected)  # (N, K)
    held_out = np.isfinite(logits).all(1)
    nll_by_value: dict[str, float] = {}
    comparisons: list[dict[str, Any]] = []
    for value, load in others:
        if ctx.config.finetune != "none" and ctx.elapsed_s() > MAX_BUDGET_FRAC * ctx.budget_s:
            ctx.log.note(f"{setting} {value} was not tried: --time-budget is too short")
            continue
        try:
            own = ctx.derive(backbone=load())
        except (ConfigError, MissingExtraError) as error:
            if ctx.config.backbone != "best":
                raise
            ctx.log.note(f"{setting} {value} was not tried: {error}")
            continue
        other = _with_features(data, own)
        other_logits = _held_out_logits(other, own, value)
        compared = compare_nll(
            (logits[held_out], other_logits[held_out]),
            labels[held_out],
            groups[held_out],
            priors,
            metric=ctx.config.metric,
            seed=ctx.config.seed,
        )
        nll_by_value |= {selected: compared["probe_loss"], value: compared["finetuned_loss"]}
        comparisons.append(
            {
                "value": value,
                "against": selected,
                "gain": compared["nll_gain"],
                "standard_error": compared["standard_error"],
            }
        )
        if compared["nll_gain"] > CLEAR * compared["standard_error"]:
            best, selected, logits = (other, own), value, other_logits
    data, ctx = best
    if not comparisons:
        return data, ctx
    scores = ", ".join(f"{value} {nll:.3f}" for value, nll in nll_by_value.items())
    ctx.log.note(f"selected {setting} {selected} by the out-of-fold log loss of linear probes: {scores}")
    evidence = {
        "value": selected,
        "chosen_on": "train+val, out of fold",
        "n": int(held_out.sum()),
        "nll_by_value": nll_by_value,
        "comparisons": comparisons,
    }
    return data, ctx.derive(input_evidence={**ctx.input_evidence, setting: evidence})


def _with_fit(loaded: PretrainedBackbone, fit: Fit) -> PretrainedBackbone:
    return replace(loaded, preprocessing=replace(loaded.preprocessing, fit=fit))


def _with_features(data: TrainingData, ctx: RunContext) -> TrainingData:
    """Return the same images and splits with the features of the context's backbone."""
    config = replace(ctx.config, near_duplicates=False)  # they are known
    found = extract_features(data.dataset, ctx.backbone, config, ctx.device, ctx.log)
    for error in found.errors.values():
        raise error
    return replace(data, features=found.values, feature_groups=ctx.backbone.backbone.feature_groups)


def _held_out_logits(data: TrainingData, ctx: RunContext, value: str) -> Float32Array:
    """Return out-of-fold logits (N, K) of the linear probe; NaN for images that no fold holds out."""
    title = f"linear probe ({value})"
    return fit_probe_on_rows(data, data.fit_rows, ctx, head_only=True, title=title)[0].oof_logits


def _median_aspect(data: TrainingData) -> float:
    """Return the median of width / height of some training images."""
    rows = np.random.default_rng(0).permutation(data.fit_rows)[:MAX_SIZES]
    sizes = []
    for path in data.paths_of(rows):
        pixels = decode_image(data.dataset.storage.read(path), path=path, target_px=1)
        sizes.append(pixels.shape[:2])
    heights, widths = np.array(sizes).T
    return float(np.median(widths / heights))
