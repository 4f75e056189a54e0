import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from conftest import draw_of_class
from exporting_models import KINDS, make_bundle
from pixelplay.data.transforms import eval_transform
from pixelplay.errors import BundleError, ConfigError
from pixelplay.exporting.graph import REFERENCE_COMPUTE, ClassifierGraph
from pixelplay.exporting.metadata import describe_model
from pixelplay.exporting.onnx_format import OnnxModel, convert_to_onnx, write_onnx
from pixelplay.inference.predictor import Predictor
from pixelplay.model.bundle import ModelBundle, write_bundle

IMAGES = [np.asarray(draw_of_class(name, seed)) for name in ("bars", "dots", "rings") for seed in range(3)]


def write_model(bundle: ModelBundle, path: Path) -> OnnxModel:
    graph = ClassifierGraph([bundle], ["model"])
    write_onnx(convert_to_onnx(graph), describe_model(graph, [bundle], "fp32"), str(path))
    return OnnxModel(str(path))


@pytest.mark.parametrize("kind", ["fine-tuned", "vit"])
def test_onnx_equals_predictor_for_any_batch_size(kind: str, tmp_path: Path) -> None:
    bundle = KINDS[kind]()
    write_bundle(bundle, str(tmp_path / "model"))
    expected = Predictor(tmp_path / "model", REFERENCE_COMPUTE).predict(IMAGES)
    assert expected.novelty is not None
    model = write_model(bundle, tmp_path / "model.onnx")
    pixels = np.stack([eval_transform(image, bundle.preprocessing) for image in IMAGES])
    for rows in (slice(0, 1), slice(1, 9)):
        outputs = model(pixels[rows])
        np.testing.assert_array_equal(outputs.pred, expected.pred[rows])
        np.testing.assert_allclose(outputs.probs, expected.probs[rows], atol=1e-5)
        np.testing.assert_allclose(outputs.novelty, expected.novelty[rows], atol=1e-3)


def test_metadata_describe_the_model(tmp_path: Path) -> None:
    bundle = make_bundle(tau=0.5, classes=("2", "10", "Größe,'"))
    write_model(bundle, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto)
    metadata = {each.key: json.loads(each.value) for each in proto.metadata_props}
    assert metadata["classes"] == ["2", "10", "Größe,'"]
    assert metadata["preprocessing"]["input_size"] == [64, 64]
    assert metadata["preprocessing"]["fit"] == "squash"
    assert (metadata["temperature"], metadata["tau"], metadata["metric"]) == ([1.3], [0.5], ["macro_f1"])
    assert metadata["priors"] == [{"2": 0.6, "10": 0.3, "Größe,'": 0.1}]
    assert metadata["made_by"][0]["weights_licence"] == "none"
    assert metadata["prediction_sets"]["0.9"] == pytest.approx(np.linspace(0, 1, 40)[36])
    shapes = [
        [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    ]
    assert shapes == [["batch", 64, 64, 3], ["batch", 3], ["batch"], ["batch"]]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_unsupported_operators_are_named() -> None:
    @torch.library.custom_op("pixelplay_tests::twist", mutates_args=())
    def twist(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    twist.register_fake(torch.empty_like)
    graph = ClassifierGraph([make_bundle()], ["model"])
    graph.novelty.register_forward_hook(lambda layer, inputs, output: twist(output))
    with pytest.raises(ConfigError, match=r"ONNX lacks pixelplay_tests\.twist") as caught:
        convert_to_onnx(graph)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read as an ONNX model"):
        OnnxModel(str(tmp_path / "model.onnx"))


def test_onnx_file_of_another_program_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["pixels"], ["probs"])
    output = onnx.helper.make_tensor_value_info("probs", onnx.TensorProto.FLOAT, [1])
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [output]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="not a model exported by"):
        OnnxModel(str(tmp_path / "model.onnx"))
