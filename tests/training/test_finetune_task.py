"""FinetuneTask: class priors, time limit and classifier of a fine-tuning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from contexts import PLAN
from pixelplay.config import FinetuneConfig, Imbalance, TrainConfig
from pixelplay.data.sampling import natural_offset
from pixelplay.training.imbalance import refit_probe_head
from pixelplay.training.time_budget import _left_s
from trainers import make_task


@pytest.mark.parametrize("imbalance", ["none", "balanced_softmax", "sampler"])
def test_logits_trained_on_other_class_frequencies_get_the_priors_of_train(
    imbalance: Imbalance, tmp_path: Path, tiny_weights: Path
) -> None:
    """Temperature and tau are fitted for the priors of train; the refit trains on val too."""
    task = make_task(TrainConfig(finetune="partial", imbalance=imbalance), tmp_path, tiny_weights)
    data, rows = task.data, task.data.fit_rows
    shift = np.log(np.array([12, 3]) / 15) - np.log(np.array([15, 12]) / 27)
    of_train = natural_offset(np.array([12, 3]), imbalance, None, 1.0)
    of_both = natural_offset(np.array([15, 12]), imbalance, None, 1.0)
    np.testing.assert_allclose(task.offset(task.train), of_train, atol=1e-12)
    np.testing.assert_allclose(task.offset(rows), of_both + shift, atol=1e-12)
    own = refit_probe_head(task.probe, data.features[rows], data.labels[rows])
    found = task.refit_probe(rows)
    np.testing.assert_array_equal(found.weight, own.weight)
    np.testing.assert_allclose(found.bias - own.bias, shift, atol=1e-5)


def test_time_limit_leaves_time_to_fit_the_probe_again(tmp_path: Path, tiny_weights: Path) -> None:
    config = TrainConfig(finetune="partial", time_budget="1h")
    task = make_task(config, tmp_path, tiny_weights)
    left_s, limit_s = _left_s(task), task.time_limit_s(PLAN)
    assert limit_s is not None
    task.probe = replace(task.probe, seconds=600.0)
    assert _left_s(task) == pytest.approx(left_s - 300, abs=5)
    assert task.time_limit_s(PLAN) == pytest.approx(limit_s - 300, abs=5)


def test_time_limit_leaves_time_for_the_refit_and_evaluation(tmp_path: Path, tiny_weights: Path) -> None:
    task = make_task(TrainConfig(finetune="partial", time_budget="1h"), tmp_path, tiny_weights)
    plan = replace(PLAN, seconds={"refit": 100.0, "evaluation": 50.0})
    assert task.time_limit_s(plan) == pytest.approx(3600 - 150, abs=30)
    # validation is evaluated by then, and there is no test split
    assert task.time_limit_s(plan, refit=True) == pytest.approx(3600, abs=30)


@pytest.mark.parametrize("is_repeated", [True, False])
def test_no_time_limit_with_fixed_epochs_or_a_repeated_plan(
    is_repeated: bool, tmp_path: Path, tiny_weights: Path
) -> None:
    settings = FinetuneConfig(epochs=None if is_repeated else 3)
    task = make_task(TrainConfig(finetune="partial", finetuning=settings), tmp_path, tiny_weights)
    if is_repeated:
        task.ctx.plan = PLAN
    assert task.time_limit_s(PLAN) is None
