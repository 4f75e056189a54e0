"""What a tuning is put together from."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, draw_folder
from materials import sort_out_folder
from pixelplay.config import Imbalance, TrainConfig
from pixelplay.data.imbalance import natural_offset
from pixelplay.model.backbone import load_backbone
from pixelplay.model.features import Device
from pixelplay.model.head import LinearHead
from pixelplay.training.bench import Bench, Workplace
from pixelplay.training.probe import ProbeFit
from pixelplay.training.rare import FairProbe, refit_fair_head


@pytest.mark.parametrize("imbalance", ["none", "balanced_softmax", "sampler"])
def test_what_is_learned_from_another_class_mix_gets_that_of_train(
    imbalance: Imbalance, tmp_path: Path, tiny_weights: Path
) -> None:
    """Temperature and tau belong to the mix of train; the last epochs learn from val too."""
    draw_folder(tmp_path / "photos/train", {"bars": 12, "dots": 3})
    draw_folder(tmp_path / "photos/val", {"bars": 3, "dots": 9}, first_seed=50)
    config = TrainConfig(tune="partial", imbalance=imbalance, test_frac=0.0)
    material = sort_out_folder(tmp_path / "photos", config)
    features = np.random.default_rng(0).normal(size=material.features.shape).astype(np.float32)
    material = replace(material, features=features)
    head = LinearHead(weight=np.zeros((2, 2), np.float32), bias=np.zeros(2, np.float32))
    fit = ProbeFit(head=head, C=1.0, nll_by_C={1.0: 0.7}, oof_logits=np.zeros((15, 2), np.float32))
    probe = FairProbe(probe=fit, imbalance="none", evidence={}, notes=[], seconds=0.0)
    workplace = Workplace(
        folder=str(tmp_path), device=Device(name="cpu", precision="fp32"), started=time.monotonic(), plan=None
    )
    loaded = load_backbone(TINY, str(tiny_weights), is_offline=True)
    bench = Bench(material, loaded, probe, config, workplace)
    shift = np.log(np.array([12, 3]) / 15) - np.log(np.array([15, 12]) / 27)
    of_train = natural_offset(np.array([12, 3]), imbalance, None, 1.0)
    of_both = natural_offset(np.array([15, 12]), imbalance, None, 1.0)
    np.testing.assert_allclose(bench.offset(bench.train), of_train, atol=1e-12)
    np.testing.assert_allclose(bench.offset(bench.learn), of_both + shift, atol=1e-12)
    own = refit_fair_head(probe, features[bench.learn], material.labels[bench.learn])
    found = bench.refit_probe(bench.learn)
    np.testing.assert_array_equal(found.weight, own.weight)
    np.testing.assert_allclose(found.bias - own.bias, shift, atol=1e-5)
