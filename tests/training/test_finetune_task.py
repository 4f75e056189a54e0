"""What a tuning is put together from."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY, draw_folder
from jobs import PLAN
from materials import sort_out_folder
from pixelplay.config import AugmentConfig, Imbalance, TrainConfig
from pixelplay.data.sampling import natural_offset
from pixelplay.model.backbone import load_backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import Device
from pixelplay.model.split_backbone import split_backbone
from pixelplay.run_log import RunLog
from pixelplay.training.bench import Bench
from pixelplay.training.finetune import _refit_job
from pixelplay.training.imbalance import ImbalanceProbe, refit_probe_head
from pixelplay.training.linear_probe import ProbeFit
from pixelplay.training.plan import write_plan
from pixelplay.training.run_context import Workplace
from pixelplay.training.time_budget import make_plan


def make_bench(config: TrainConfig, tmp_path: Path, tiny_weights: Path) -> Bench:
    """A bench with a probe that knows nothing; 12 and 3 images to train on, 3 and 9 to choose on."""
    draw_folder(tmp_path / "photos/train", {"bars": 12, "dots": 3})
    draw_folder(tmp_path / "photos/val", {"bars": 3, "dots": 9}, first_seed=50)
    data = sort_out_folder(tmp_path / "photos", config)
    features = np.random.default_rng(0).normal(size=data.features.shape).astype(np.float32)
    data = replace(data, features=features)
    head = LinearHead(weight=np.zeros((2, 2), np.float32), bias=np.zeros(2, np.float32))
    fit = ProbeFit(head=head, C=1.0, nll_by_C={1.0: 0.7}, oof_logits=np.zeros((15, 2), np.float32))
    probe = ImbalanceProbe(probe=fit, imbalance="none", evidence={}, notes=[], seconds=0.0)
    workplace = Workplace(
        folder=str(tmp_path), device=Device(name="cpu", precision="fp32"), started=time.monotonic(), plan=None
    )
    loaded = load_backbone(TINY, str(tiny_weights), offline=True)
    return Bench(data, loaded, probe, config, workplace)


@pytest.mark.parametrize("imbalance", ["none", "balanced_softmax", "sampler"])
def test_what_is_learned_from_another_class_mix_gets_that_of_train(
    imbalance: Imbalance, tmp_path: Path, tiny_weights: Path
) -> None:
    """Temperature and tau belong to the mix of train; the last epochs learn from val too."""
    config = TrainConfig(finetune="partial", imbalance=imbalance, test_frac=0.0)
    bench = make_bench(config, tmp_path, tiny_weights)
    shift = np.log(np.array([12, 3]) / 15) - np.log(np.array([15, 12]) / 27)
    of_train = natural_offset(np.array([12, 3]), imbalance, None, 1.0)
    of_both = natural_offset(np.array([15, 12]), imbalance, None, 1.0)
    np.testing.assert_allclose(bench.offset(bench.train), of_train, atol=1e-12)
    np.testing.assert_allclose(bench.offset(bench.fit_rows), of_both + shift, atol=1e-12)
    own = refit_probe_head(
        bench.probe, bench.data.features[bench.fit_rows], bench.data.labels[bench.fit_rows]
    )
    found = bench.refit_probe(bench.fit_rows)
    np.testing.assert_array_equal(found.weight, own.weight)
    np.testing.assert_allclose(found.bias - own.bias, shift, atol=1e-5)


def test_the_last_epochs_see_photographs_as_they_are(tmp_path: Path, tiny_weights: Path) -> None:
    augmenting = AugmentConfig(augment=("crop", "mixup"), mix_prob=1.0)
    config = TrainConfig(finetune="partial", imbalance="none", test_frac=0.0, augmenting=augmenting)
    bench = make_bench(config, tmp_path, tiny_weights)
    job = bench.job(bench.pixels, PLAN)
    assert job.config.augmenting.mix_prob == 1.0
    refit = _refit_job(bench, job, PLAN, 2)
    assert refit.config.augmenting.mix_prob == 0.0
    assert (refit.epochs, refit.epochs_before, len(refit.train), len(refit.val)) == (2, PLAN.epochs, 27, 0)


def test_fitting_heads_after_a_training_counts_against_the_budget(tmp_path: Path, tiny_weights: Path) -> None:
    config = TrainConfig(finetune="partial", imbalance="crt", test_frac=0.0, time_budget="1h")
    bench = make_bench(config, tmp_path, tiny_weights)
    left_s, limit_s = bench.left_s(), bench.job(bench.pixels, PLAN).limit_s
    bench.probe = replace(bench.probe, seconds=600.0)
    assert bench.left_s() == pytest.approx(left_s - 1200, abs=5)
    assert bench.job(bench.pixels, PLAN).limit_s == pytest.approx(limit_s - 1200, abs=5)


@pytest.mark.parametrize("compile", [True, False])
def test_what_is_compiled_has_no_short_way_of_ours(compile: bool, tmp_path: Path, tiny_weights: Path) -> None:
    bench = make_bench(TrainConfig(finetune="partial", test_frac=0.0), tmp_path, tiny_weights)
    stages = split_backbone(bench.loaded.backbone, 1, bench.loaded.preprocessing.input_size)
    layers = bench.classifier(stages, compile=compile).modules()
    ours = [layer for layer in layers if "forward" in vars(layer)]
    assert bool(ours) != compile


def test_batches_that_memory_has_no_room_for_are_halved_and_that_is_said(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(
        TrainConfig(finetune="partial", test_frac=0.0, time_budget="1h"), tmp_path, tiny_weights
    )
    n_features, n = bench.loaded.backbone.n_features, len(bench.data.dataset)
    bench.data = replace(bench.data, features=np.ones((n, n_features), np.float32))
    head = LinearHead(weight=np.zeros((2, n_features), np.float32), bias=np.zeros(2, np.float32))
    bench.probe = replace(bench.probe, probe=replace(bench.probe.probe, head=head))
    zeros = torch.zeros

    def scarce(*shape: Any, **options: Any) -> torch.Tensor:
        if len(shape) == 4 and shape[0] > 8:  # a batch of maps
            raise torch.OutOfMemoryError("out of memory")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", scarce)
    log = RunLog(quiet=True)
    assert make_plan(bench, "partial", log).batch_size == 7
    assert log.notes == ["batches are of 7 images, as memory has no room for 15"]
    monkeypatch.setattr(torch, "zeros", zeros)
    for batch_size, n_notes in ((7, 1), (14, 0)):  # of the interrupted run; of a fold with one less
        write_plan(replace(PLAN, batch_size=batch_size), str(tmp_path / "plan.json"))
        log = RunLog(quiet=True)
        assert make_plan(bench, "partial", log).batch_size == batch_size
        assert len(log.notes) == n_notes
