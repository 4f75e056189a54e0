"""One network and one head compute the mean logits of all members of an ensemble."""

import copy

import numpy as np
import pytest
import torch

from networks import draw_backbone
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.ensemble import average_members, ensemble_member
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages


def _finetuned(frozen: Backbone, n_frozen: int, factor: float) -> Backbone:
    """Copy a backbone and change the weights of its last stages."""
    finetuned, stages = copy.deepcopy(frozen), TrainableStages(frozen, n_frozen)
    with torch.no_grad():
        for value in stages.parameters():
            value.mul_(factor)
    stages.write_into(finetuned)
    return finetuned.eval()


def _head(backbone: Backbone, seed: int, n_hidden: int | None = None) -> LinearHead:
    rng, n = np.random.default_rng(seed), backbone.n_features

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape, scale=0.1).astype(np.float32)

    if n_hidden is None:
        return LinearHead(weight=draw(3, n), bias=draw(3))
    return LinearHead(
        weight=draw(3, n_hidden), bias=draw(3), hidden_weight=draw(n_hidden, n), hidden_bias=draw(n_hidden)
    )


def _logits(backbone: Backbone, head: LinearHead) -> np.ndarray:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return head.logits(backbone(images).numpy())


@pytest.mark.parametrize("name", ["test_convnext", "tf_efficientnet_lite0"])
def test_ensemble_of_every_kind_of_member_averages_logits(name: str) -> None:
    frozen = draw_backbone(name).eval()
    added = BranchedBackbone(frozen, [TrainableStages(_finetuned(frozen, 2, 1.2), 2)]).eval()
    finetuned, full = _finetuned(frozen, 3, 0.9), _finetuned(frozen, 0, 1.05)
    kinds: list[tuple[Backbone, int | None]] = [(frozen, None), (added, None), (finetuned, 3), (full, 0)]
    heads = [_head(backbone, i) for i, (backbone, _) in enumerate(kinds)]
    members = [ensemble_member(b, head, n) for (b, n), head in zip(kinds, heads, strict=True)]
    temperatures = [1.0, 0.5, 2.0, 1.5]
    joined, head = average_members(frozen, members, temperatures)
    alone = [_logits(backbone, own) for (backbone, _), own in zip(kinds, heads, strict=True)]
    each = [logits / T for logits, T in zip(alone, temperatures, strict=True)]
    scale = np.abs(each).max()
    np.testing.assert_allclose(_logits(joined, head), np.mean(each, axis=0), atol=1e-4 * scale)


def test_ensemble_of_probes_keeps_the_frozen_backbone() -> None:
    frozen = draw_backbone("test_convnext").eval()
    members = [ensemble_member(frozen, _head(frozen, i), None) for i in range(3)]
    joined, head = average_members(frozen, members)
    assert joined is frozen
    assert head.weight.shape == members[0].head.weight.shape


def test_ensemble_of_mlp_heads_concatenates_hidden_units() -> None:
    frozen = draw_backbone("test_convnext", "pooled").eval()
    networks = [_finetuned(frozen, 0, factor) for factor in (0.9, 1.1)]
    heads = [_head(network, i, n_hidden=5) for i, network in enumerate(networks)]
    joined, head = average_members(
        frozen, [ensemble_member(network, own, 0) for network, own in zip(networks, heads, strict=True)]
    )
    expected = np.mean([_logits(*pair) for pair in zip(networks, heads, strict=True)], axis=0)
    np.testing.assert_allclose(_logits(joined, head), expected, atol=1e-4 * np.abs(expected).max())
