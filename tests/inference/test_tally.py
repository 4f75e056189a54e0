"""What tally.py promises: counts over all chunks, and one line that tells them."""

import numpy as np
import pytest

from pixelplay.errors import DataError
from pixelplay.inference.predictor import Predictions
from pixelplay.outputs.predictions_table import N_LABELS, PredictionSummary
from pixelplay.run_log import RunLog

CLASSES = tuple("abcdefghij")


def chunk(*pred: int, novelty: float | None = None) -> Predictions:
    n = len(pred)
    return Predictions(
        paths=tuple(f"{i}.jpg" for i in range(n)),
        status=tuple("ok" if k >= 0 else "missing" for k in pred),
        errors=tuple("" if k >= 0 else "no such file" for k in pred),
        probs=np.full((n, len(CLASSES)), 0.1),
        pred=np.array(pred),
        classes=CLASSES,
        digests=(b"",) * n,
        novelty=None if novelty is None else np.full(n, novelty),
    )


def test_chunks_are_added_up() -> None:
    summary = PredictionSummary()
    for each in (chunk(0, 0, 1, novelty=0.5), chunk(0, -1, novelty=0.995)):
        summary.add(each)
    assert (summary.n, summary.n_bad, summary.n_novel, summary.n_unsure) == (5, 1, 1, None)
    assert summary.errors == ["1.jpg: no such file"]
    assert summary.describe() == "5 images; a 3, b 1; 1 without a prediction; 1 unlike what was learned from"


def test_of_many_classes_the_commonest_are_named() -> None:
    summary = PredictionSummary()
    summary.add(chunk(*range(len(CLASSES)), 9))
    told = summary.describe()
    assert told.startswith("11 images; j 2, a 1, ")
    assert told.endswith(f", {len(CLASSES) - N_LABELS} more classes")


def test_what_is_missing_is_noted_or_where_all_is_refused() -> None:
    summary, log = PredictionSummary(), RunLog(quiet=True)
    summary.add(chunk(0, -1))
    summary.say_what_is_missing("out.csv", log)
    assert log.notes == ["1 of 2 images could not be read; their rows say why"]
    nothing = PredictionSummary()
    nothing.add(chunk(-1))
    with pytest.raises(DataError) as caught:
        nothing.say_what_is_missing("out.csv", log)
    assert str(caught.value) == ("none of 1 image can be read; out.csv says why; first: 0.jpg: no such file")
