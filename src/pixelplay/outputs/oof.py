"""oof.csv and oof.safetensors of a cross-validation: every photograph, as those saw it that had not."""

import os

import numpy as np

from pixelplay.inference.predictor import Predictions
from pixelplay.outputs.table import write_predictions
from pixelplay.training.cross_validation import CrossValidation
from pixelplay.training.training_data import Material

NOT_HELD_OUT = "not_held_out"  # a status of oof.csv alone


def write_oof(folder: str, material: Material, validation: CrossValidation) -> None:
    """One row for each photograph and repeat, a given test part left out; the same rows as logits."""
    from safetensors.numpy import save

    index, errors = material.scanned, material.errors
    usable = np.full(len(index), -1)  # position in the material of each photograph
    usable[np.setdiff1d(np.arange(len(index)), list(errors))] = np.arange(len(material.index))
    shown = np.flatnonzero(~index.in_part("test"))
    place = np.full(len(material.index), -1)
    place[validation.rows] = np.arange(len(validation.rows))
    where = np.where(usable[shown] >= 0, place[usable[shown]], -1)  # row of the cross-validation, or -1
    removed = set(material.parts.removed.tolist())

    def status(i: int, pred: int) -> tuple[str, str]:
        if (error := errors.get(i)) is not None:
            return error.status, error.reason
        if pred >= 0:
            return "ok", ""
        if usable[i] in removed:
            return NOT_HELD_OUT, "a copy of a test photograph, not learned from"
        return NOT_HELD_OUT, "without it, or its group, nothing would be left to learn a class from"

    chunks, columns, logits = [], {"repeat": [], "fold": [], "given": []}, []  # type: ignore[var-annotated]
    for repeat, (folds, fit) in enumerate(zip(validation.folds, validation.fits, strict=True)):
        # a row of NaN and -1 at the end is what position -1 takes
        probs = np.vstack([fit.probs, np.full(fit.probs.shape[1], np.nan)])[where]
        pred = np.append(fit.pred, -1)[where]
        states = [status(int(i), int(k)) for i, k in zip(shown, pred, strict=True)]
        chunks.append(
            Predictions(
                paths=tuple(index.paths[i] for i in shown),
                status=tuple(state for state, _ in states),
                errors=tuple(why for _, why in states),
                probs=probs,
                pred=pred,
                classes=material.known_classes,
                digests=(b"",) * len(shown),
            )
        )
        own = np.append(folds, -1)[where]
        columns["repeat"] += [str(repeat)] * len(shown)
        columns["fold"] += ["" if fold < 0 else str(fold) for fold in own]
        columns["given"] += [index.classes[k] for k in index.labels[shown]]
        none = np.full(material.n_known, np.nan, np.float32)
        logits.append(np.vstack([validation.logits[repeat], none])[where])
    write_predictions(chunks, material.known_classes, os.path.join(folder, "oof.csv"), columns)
    data = save({"logits": np.concatenate(logits)}, metadata={"rows": "those of oof.csv"})
    with open(os.path.join(folder, "oof.safetensors"), "wb") as file:
        file.write(data)
