import os
import pickle
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelplay.data.transforms import Preprocessing, eval_transform
from pixelplay.errors import BundleError, ConfigError, MissingExtraError
from pixelplay.model.backbone import PretrainedBackbone, create_network, load_backbone, load_weights_into
from pixelplay.model.features import FeatureExtractor
from pixelplay.model.weights import (
    EMBEDDED,
    embedded_package,
    embedded_timm_name,
    find_weights,
    read_state_dict,
)

TINY = "test_convnext"
HUB_ID = "models--timm--test_convnext.r160_in1k"


def package_file(name: str) -> Path:
    package, file = embedded_package(name)
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is an extra")
    return Path(spec.origin).parent / file


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_every_embedded_tensor_is_in_the_network(name: str) -> None:
    original = torch.load(package_file(name), weights_only=True)
    without_classifier = {key: value for key, value in original.items() if not key.startswith("_fc.")}
    state = load_backbone(name, None, offline=True).backbone.network.state_dict()
    for (old, value), (new, loaded) in zip(without_classifier.items(), state.items(), strict=True):
        assert old.rpartition(".")[2] == new.rpartition(".")[2]
        assert torch.equal(value, loaded)


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_embedded_blocks_are_mapped_in_order(name: str) -> None:
    original = torch.load(package_file(name), weights_only=True)
    state = load_backbone(name, None, offline=True).backbone.network.state_dict()
    flat = [f"{i}.{j}" for i, stage in enumerate(timm_stages(name)) for j in range(stage)]
    depthwise = [original[f"_blocks.{n}._depthwise_conv.weight"] for n in range(len(flat))]
    mapped = [state[f"blocks.{place}.conv_dw.weight"] for place in flat]
    assert all(torch.equal(a, b) for a, b in zip(depthwise, mapped, strict=True))


def timm_stages(name: str) -> list[int]:
    network = timm.create_model(embedded_timm_name(name), pretrained=False)
    return [len(stage) for stage in network.blocks]


def test_modified_package_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, file = embedded_package("lite0")
    copy = tmp_path / package / file
    copy.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    data = bytearray(package_file("lite0").read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match=r"SHA-256 \w{8}… but 57934424… was published; reinstall"):
        find_weights("lite0", {}, None, offline=True)
    copy.unlink()
    with pytest.raises(BundleError, match=r"57934424\.pth is missing; reinstall"):
        find_weights("lite0", {}, None, offline=True)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, embedded_package("lite2")[0], None)
    with pytest.raises(MissingExtraError, match=r"'lite2' needs .*pip install 'pixelplay\[lite2\]'"):
        find_weights("lite2", {}, None, offline=True)


class Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("is_bare_pickle", [True, False])
def test_pickled_code_is_not_executed(is_bare_pickle: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "weights.pth", tmp_path / "was_run"
    if is_bare_pickle:
        path.write_bytes(pickle.dumps(Payload(str(target))))
    else:
        torch.save({"stem.weight": torch.zeros(1), "x": Payload(str(target))}, path)
    with pytest.raises(BundleError, match="could execute code") as caught:
        load_backbone(TINY, str(path), offline=True)
    assert not target.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "weights_only" not in message  # torch recommends to disable the protection


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("data", [b"", b"hello world", bytes(1000)])
def test_weights_file_without_tensors_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights .*(\.safetensors|\.pth)") as caught:
        load_backbone(TINY, str(path), offline=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, [torch.zeros(1)], {"a": 1}])
def test_weights_without_names_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(BundleError, match=r"not a dictionary of tensors; save model\.state_dict\(\)"):
        read_state_dict(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema"])
def test_wrapped_and_parallel_checkpoints_are_unwrapped(
    wrapper: str | None, tiny_weights: Path, tmp_path: Path
) -> None:
    state = read_state_dict(str(tiny_weights))
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save(parallel if wrapper is None else {wrapper: parallel}, tmp_path / "weights.pth")
    read = read_state_dict(str(tmp_path / "weights.pth"))
    assert list(read) == list(state)
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_unfitting_weight_keys_are_named(tiny_weights: Path, tmp_path: Path) -> None:
    state = read_state_dict(str(tiny_weights))
    path = str(tmp_path / "weights.safetensors")
    stem = state["stem.0.weight"]

    save_file({key: value for key, value in state.items() if key != "stem.0.weight"}, path)
    with pytest.raises(BundleError, match=r"does not fit test_convnext: it lacks stem\.0\.weight$"):
        load_backbone(TINY, path, offline=True)
    save_file(state | {"foreign.weight": stem.clone()}, path)
    with pytest.raises(BundleError, match=r"it has unknown foreign\.weight$"):
        load_backbone(TINY, path, offline=True)
    save_file(state | {"stem.0.weight": stem[:, :1].clone()}, path)
    with pytest.raises(BundleError, match=r"other shapes in stem\.0\.weight \(\d+, 1, .* for \(\d+, 3, "):
        load_backbone(TINY, path, offline=True)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "efficientvit_m0", "shvit_s1"])
def test_norm_before_the_classifier_is_dropped(name: str) -> None:
    state = timm.create_model(name, pretrained=False, num_classes=5).state_dict()
    network = create_network(name)
    load_weights_into(network, state, "weights")
    own = network.state_dict()
    assert len(own) < len(state)
    assert all(torch.equal(own[key], state[key]) for key in own)
    with pytest.raises(BundleError, match=r"has unknown foreign\.weight$"):
        load_weights_into(network, state | {"foreign.weight": torch.zeros(1)}, "weights")


def test_auxiliary_classifier_is_dropped(tiny_weights: Path, tmp_path: Path) -> None:
    state = read_state_dict(str(tiny_weights))
    save_file(state | {"AuxLogits.fc.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    load_backbone(TINY, str(tmp_path / "weights.safetensors"), offline=True)


def test_weights_of_another_network_name_ten_keys(tmp_path: Path) -> None:
    path = str(tmp_path / "resnet.safetensors")
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    with pytest.raises(BundleError, match=r"test_convnext: it lacks stem\.0\.weight, .* and \d+ more$"):
        load_backbone(TINY, path, offline=True)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet", "test_efficientnet"])
def test_classifier_weights_are_dropped(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "full.safetensors")
    whole = timm.create_model(name, pretrained=False, num_classes=1000)
    save_file(whole.state_dict(), path)
    loaded = load_backbone(name, path, offline=True).backbone.network.state_dict()
    expected = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[key], whole.state_dict()[key]) for key in loaded)


def test_half_precision_weights_become_fp32(tiny_weights: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "half.safetensors")
    half = {key: value.half() for key, value in read_state_dict(str(tiny_weights)).items()}
    save_file(half, path)
    loaded = load_backbone(TINY, path, offline=True).backbone.network.state_dict()
    assert all(torch.equal(loaded[key], half[key].float()) for key in half)
    assert {value.dtype for value in loaded.values()} == {torch.float32}


def test_convnext_tiny_weights_of_timm_fit(tmp_path: Path) -> None:
    # the network of `--backbone auto` on a GPU; its real weights come from the hub under these keys
    path = str(tmp_path / "convnext_tiny.safetensors")
    with torch.device("meta"):
        whole = timm.create_model("convnext_tiny", pretrained=False, num_classes=1000)
    save_file({key: torch.full(value.shape, 0.01) for key, value in whole.state_dict().items()}, path)
    loaded = load_backbone("convnext_tiny.in12k_ft_in1k", path, offline=True)
    assert loaded.backbone.n_features == 2 * (96 + 192 + 384 + 768) + 768
    assert loaded.preprocessing.input_size == (224, 224)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)


def test_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pth does not exist; pass a \.safetensors or \.pth"):
        load_backbone(TINY, str(tmp_path / "nowhere.pth"), offline=True)


def test_offline_without_weights_lists_alternatives() -> None:
    alternatives = r"--backbone lite0 .*--weights FILE .*run once with access to the Hugging Face hub"
    with pytest.raises(
        ConfigError, match=r"'test_convnext' has no weights in .*--offline is set; use " + alternatives
    ):
        load_backbone(TINY, None, offline=True)
    # HF_HUB_OFFLINE is set for all tests: the client refuses, as without a network
    with pytest.raises(
        ConfigError, match=r"'test_convnext' .*could not be downloaded \(\w+\); use " + alternatives
    ):
        load_backbone(TINY, None, offline=False)


def test_network_without_published_weights_lists_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"'test_mambaout' has no .*weights.*; use --backbone lite0"):
        find_weights("test_mambaout", {}, None, offline=True)


@pytest.mark.parametrize("offline", [True, False])
def test_weights_in_the_hub_cache_are_used(offline: bool, tiny_weights: Path) -> None:
    repository = Path(os.environ["HF_HOME"], "hub", HUB_ID)
    commit = "0123456789abcdef0123456789abcdef01234567"
    try:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        shutil.copy(tiny_weights, repository / "snapshots" / commit / "model.safetensors")
        loaded = load_backbone(TINY, None, offline=offline)
    finally:
        shutil.rmtree(repository)
    state = read_state_dict(str(tiny_weights))
    assert all(torch.equal(loaded.backbone.network.state_dict()[key], state[key]) for key in state)
    assert loaded.origin == "timm/test_convnext.r160_in1k on the hub"
    assert loaded.weights_id == load_backbone(TINY, str(tiny_weights), offline=True).weights_id


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ImageNet's classes for what the images show; a class has near synonyms
CAT = (281, 282, 285)  # tabby, tiger cat, Egyptian cat
COFFEE = (504, 967, 968)  # coffee mug, espresso, cup
TRIPOD = (872,)
MOTORCYCLE = (665, 670)  # moped, motor scooter
TEMPLE = (442, 449, 483, 497, 663, 698, 832)  # bell cote, boathouse, castle, church, monastery, palace, stupa


@pytest.fixture(scope="module")
def images() -> dict[str, NDArray[np.uint8]]:
    data = pytest.importorskip("skimage.data")
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "tripod": np.stack([data.camera()] * 3, axis=-1),
        "motorcycle": data.stereo_motorcycle()[0],
        "temple": china,
        "flower": flower,
        "rocket": data.rocket(),
        "astronaut": data.astronaut(),
    }


@pytest.fixture(scope="module", params=["lite0", "lite2"])
def loaded(request: pytest.FixtureRequest) -> PretrainedBackbone:
    if find_spec(embedded_package(request.param)[0]) is None:
        pytest.skip(f"{request.param} is an extra")
    return load_backbone(request.param, None, offline=True)


def classifier_of(loaded: PretrainedBackbone) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    name = next(n for n in EMBEDDED if embedded_timm_name(n) == loaded.backbone.name)
    path, _, _ = find_weights(name, {}, None, offline=True)
    state = read_state_dict(path)
    return state["_fc.weight"].numpy(), state["_fc.bias"].numpy()


def test_embedded_weights_classify_real_photos(
    loaded: PretrainedBackbone, images: dict[str, NDArray[np.uint8]]
) -> None:
    # the same steps as in prediction: transform, mean and std, fused network, pooled features
    extractor = FeatureExtractor(
        loaded.backbone, loaded.preprocessing, hflip=True, device="cpu", precision="fp32", batch_size=5
    )
    shown = [images[name] for name in ("cat", "coffee", "tripod", "motorcycle", "temple")]
    features = extractor(np.stack([eval_transform(pixels, loaded.preprocessing) for pixels in shown]))
    weight, bias = classifier_of(loaded)
    logits = features[:, -weight.shape[1] :] @ weight.T + bias  # (5, 1000)
    top = logits.argmax(1)
    right = [k in classes for k, classes in zip(top, (CAT, COFFEE, TRIPOD, MOTORCYCLE, TEMPLE), strict=True)]
    assert right == [True] * 5, top


def distance_from_training(
    network: nn.Module, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
) -> float:
    """Measure how far images are from the training statistics of each batch norm.

    Mean over channels and layers of the distance of means, in standard deviations, and of the
    logarithms of standard deviations.
    """
    pixels = torch.from_numpy(np.stack([eval_transform(photo, preprocessing) for photo in images]))
    mean, std = (torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
    batch = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    distances: list[float] = []

    def compare(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        was, floor = norm.running_var, 1e-3  # of channels that hardly vary
        off = (mean - norm.running_mean).abs() / (was + floor).sqrt()
        spread = ((variance + floor) / (was + floor)).log().abs() / 2
        distances.append(float((off + spread).mean()))

    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
    with torch.inference_mode():
        network.eval()(batch)
    for hook in hooks:
        hook.remove()
    return float(np.mean(distances))


def test_embedded_mean_std_and_padding_match_the_weights(
    loaded: PretrainedBackbone, images: dict[str, NDArray[np.uint8]]
) -> None:
    # Measured: lite0 0.27, with ImageNet's mean and std 0.48, as the twin 0.32 (symmetric padding
    # and batch norm's eps 1e-5; either alone 0.30); lite2 0.24, 0.45 and 0.28.
    shown = [photo for name, photo in images.items() if name != "tripod"]
    ours, network = loaded.preprocessing, loaded.backbone.network
    twin = timm.create_model(loaded.backbone.name.removeprefix("tf_"), pretrained=False, num_classes=0)
    twin.load_state_dict(network.state_dict())
    imagenet = Preprocessing(input_size=ours.input_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    half = Preprocessing(input_size=ours.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)

    distance = distance_from_training(network, ours, shown)
    assert distance < 0.31
    assert distance_from_training(network, imagenet, shown) > 1.5 * distance
    assert distance_from_training(twin, half, shown) > 1.1 * distance
    # each alternative is measured after the real preprocessing
    assert loaded.backbone.name.startswith("tf_")
