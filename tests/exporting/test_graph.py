from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import draw_of_class
from exporting_models import KINDS, make_bundle
from pixelplay.data.transforms import eval_transform
from pixelplay.errors import ConfigError
from pixelplay.exporting.graph import REFERENCE_COMPUTE, ClassifierGraph
from pixelplay.inference.predictor import EnsemblePredictor, Predictions, Predictor
from pixelplay.model.bundle import ModelBundle, write_bundle

IMAGES = [np.asarray(draw_of_class(name, seed)) for name in ("bars", "dots", "rings") for seed in range(4)]


def run_graph(*bundles: ModelBundle) -> tuple[np.ndarray, ...]:
    graph = ClassifierGraph(bundles, [f"model {i}" for i in range(len(bundles))])
    pixels = np.stack([eval_transform(image, graph.preprocessing) for image in IMAGES])
    with torch.inference_mode():
        return tuple(output.numpy() for output in graph(torch.from_numpy(pixels)))


def check_equal(outputs: tuple[np.ndarray, ...], expected: Predictions) -> None:
    probs, prediction, novelty = outputs
    np.testing.assert_allclose(probs, expected.probs, atol=1e-5)
    np.testing.assert_array_equal(prediction, expected.pred)
    assert expected.novelty is not None
    np.testing.assert_allclose(novelty, expected.novelty, atol=1e-3)
    assert len(set(expected.pred.tolist())) > 1  # else the test could not fail
    assert np.ptp(expected.novelty) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_predictor_for_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    bundle = KINDS[kind]()
    write_bundle(bundle, str(tmp_path / "model"))
    check_equal(run_graph(bundle), Predictor(tmp_path / "model", REFERENCE_COMPUTE).predict(IMAGES))


def test_tau_changes_predictions_in_the_graph() -> None:
    without, with_tau = run_graph(make_bundle())[1], run_graph(make_bundle(tau=1.0))[1]
    assert (without != with_tau).any()


def test_ensemble_graph_equals_ensemble_predictor(tmp_path: Path) -> None:
    other = make_bundle(fine_tuned=True, tau=1.0, classes=("rings", "bars", "dots"), hflip=False)
    bundles = make_bundle(), other
    for i, bundle in enumerate(bundles):
        write_bundle(bundle, str(tmp_path / str(i)))
    expected = EnsemblePredictor([tmp_path / "0", tmp_path / "1"], REFERENCE_COMPUTE).predict(IMAGES)
    check_equal(run_graph(*bundles), expected)


def test_ensemble_of_different_input_sizes_is_refused() -> None:
    first = make_bundle()
    other = replace(first, preprocessing=replace(first.preprocessing, input_size=(96, 96)))
    with pytest.raises(ConfigError, match="input_size"):
        ClassifierGraph([first, other], ["a", "b"])
