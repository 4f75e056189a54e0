"""Two runs on the same labelled photographs → how far they are apart, and whether that is real."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.data.dataset import ImageIndex
from pixelplay.evaluation.comparison import PairedComparison, compare_models
from pixelplay.inference.predictor import Predictions
from pixelplay.model.bundle import Bundle, shorten_digest
from pixelplay.run_log import Journal
from pixelplay.text import name_some


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """One model less another on the same photographs.

    Attributes:
        runs: the model that was measured, and the other.
        metric: what the first decides for.
        everything: all scored photographs.
        n_trained_on: photographs that either model has learned from.
        unseen: the same without those; None where there are none, or nothing else.
    """

    runs: tuple[str, str]
    metric: str
    everything: PairedComparison
    n_trained_on: int
    unseen: PairedComparison | None

    @property
    def fairest(self) -> PairedComparison:
        """Without photographs that either has learned from, where there are others."""
        return self.everything if self.unseen is None else self.unseen

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "runs": list(self.runs),
            "metric": self.metric,
            **self.everything.to_json(),
            "n_trained_on": self.n_trained_on,
            "unseen": None if self.unseen is None else self.unseen.to_json(),
        }


def compare_runs(
    answers: tuple[Predictions, Predictions],
    bundles: tuple[Bundle, Bundle],
    runs: tuple[str, str],
    index: ImageIndex,
    journal: Journal,
) -> RunComparison:
    """Measure one model less another, row by row of the same index, some of which could be read."""
    classes = all_names(*(bundle.classes for bundle in bundles), index.classes)
    labels = renumbered(index.classes, classes)[index.labels]
    places = [renumbered(bundle.classes, classes) for bundle in bundles]  # (K of each,)
    for run, own, others in zip(runs, bundles, reversed(bundles), strict=True):
        if lacking := sorted(set(others.classes) - set(own.classes)):
            journal.note(f"{run} does not know {name_some(lacking)}, which the other model does")
    probs = [np.zeros((len(labels), len(classes))) for _ in answers]
    for wide, place, answer in zip(probs, places, answers, strict=True):
        wide[:, place] = answer.probs
    preds = [place[answer.pred] for place, answer in zip(places, answers, strict=True)]
    is_known = np.isin(labels, places[0]) & np.isin(labels, places[1])
    is_ok = (answers[0].pred >= 0) & (answers[1].pred >= 0)
    seen = [was_learned(answer, bundle) for answer, bundle in zip(answers, bundles, strict=True)]
    is_seen = (seen[0] | seen[1]) & is_ok

    def measure(keep: BoolArray) -> PairedComparison:
        return compare_models(
            (preds[0][keep], preds[1][keep]),
            (probs[0][keep], probs[1][keep]),
            labels[keep],
            None if index.groups is None else index.groups[keep],
            is_known=is_known[keep],
        )

    n_unseen = int((is_ok & ~is_seen).sum())
    if is_seen.any() and n_unseen:
        journal.note(
            f"the difference is shown for the {n_unseen} photographs that neither model has learned from"
        )
    elif is_seen.any():
        learned = " and ".join(
            f"{run} from {(own & is_ok).sum()}" for run, own in zip(runs, seen, strict=True)
        )
        journal.note(
            f"each of the {is_ok.sum()} photographs was learned from by a model ({learned}): the difference "
            "says little about new ones"
        )
    return RunComparison(
        runs=runs,
        metric=bundles[0].metric,
        everything=measure(is_ok),
        n_trained_on=int(is_seen.sum()),
        unseen=measure(is_ok & ~is_seen) if is_seen.any() and n_unseen else None,
    )


def all_names(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Every name once, in the order of the lists."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def renumbered(names: tuple[str, ...], among: tuple[str, ...]) -> IntArray:
    """Positions (K,) of names in a longer list."""
    position = {name: k for k, name in enumerate(among)}
    return np.array([position[name] for name in names], dtype=np.int64)


def was_learned(predictions: Predictions, bundle: Bundle) -> BoolArray:
    """Which rows (N,) a model has learned from."""
    return np.array([shorten_digest(digest) in bundle.trained_on for digest in predictions.digests])
