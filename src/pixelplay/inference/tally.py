"""What became of many photographs, counted while they are answered."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pixelplay.errors import DataError
from pixelplay.inference.predictor import Predictions
from pixelplay.run_log import Journal
from pixelplay.text import SHOWN, counted, name_first

NOVEL = 0.99  # novelty that one in a hundred of the photographs like those learned from has
N_LABELS = 8  # that are named


@dataclass(kw_only=True)
class Tally:
    """Counts over all predictions so far.

    Attributes:
        n: photographs.
        n_bad: those without a prediction.
        n_unsure: those with one that is not answered; None where nothing was asked of answers.
        n_novel: those that are less like what was learned from than one in a hundred is; None where the
            model cannot tell.
        labels: decided class → photographs.
        errors: path and reason of the first ones without a prediction.
    """

    n: int = 0
    n_bad: int = 0
    n_unsure: int | None = None
    n_novel: int | None = None
    labels: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, chunk: Predictions) -> None:
        """Count further predictions."""
        is_ok = chunk.pred >= 0
        self.n += len(chunk)
        self.n_bad += int((~is_ok).sum())
        self.labels.update(chunk.classes[k] for k in chunk.pred[is_ok])
        if chunk.answered is not None:
            self.n_unsure = (self.n_unsure or 0) + int((is_ok & ~chunk.answered).sum())
        if chunk.novelty is not None:
            self.n_novel = (self.n_novel or 0) + int((chunk.novelty[is_ok] >= NOVEL).sum())
        room = SHOWN - len(self.errors)
        self.errors += [f"{chunk.paths[i]}: {chunk.errors[i]}" for i in np.flatnonzero(~is_ok)[:room]]

    def say_what_is_missing(self, table: str | None, journal: Journal) -> None:
        """Note how many have no prediction, and why.

        Args:
            table: where a row of each says so; None: nowhere else.

        Raises:
            DataError: none has one.
        """
        if self.n_bad == self.n:
            where = "" if table is None else f"{table} says why; "
            raise DataError(
                f"none of {counted(self.n, 'photograph')} can be read; {where}first: {self.errors[0]}"
            )
        if self.n_bad:
            why = name_first(self.errors, self.n_bad) if table is None else "their rows say why"
            journal.note(f"{self.n_bad} of {self.n} photographs could not be read; {why}")

    def describe(self) -> str:
        """One line for people."""
        named = [f"{label} {n:,}" for label, n in self.labels.most_common(N_LABELS)]
        if len(self.labels) > N_LABELS:
            named.append(f"{len(self.labels) - N_LABELS} more classes")
        told = [f"{counted(self.n, 'photograph')}", ", ".join(named)]
        told += [f"{self.n_bad:,} without a prediction"] if self.n_bad else []
        told += [f"{self.n_unsure:,} not answered"] if self.n_unsure is not None else []
        told += [f"{self.n_novel:,} unlike what was learned from"] if self.n_novel else []
        return "; ".join(filter(None, told))
