"""Small random networks for tests, in which every layer affects the features."""

from functools import lru_cache

import torch
from torch import nn

from pixelplay.model.backbone import Backbone, FeatureKind, create_network


def draw_backbone(name: str, features: FeatureKind = "stages") -> Backbone:
    """Build a timm network with seeded random weights and nontrivial norms and layer scales."""
    generator = torch.Generator().manual_seed(0)
    network = create_network(name)
    for key, value in network.named_parameters():
        with torch.no_grad():
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, generator=generator)
            elif "gamma" in key:  # timm initialises layer scales with 1e-6
                value.fill_(0.2)
            elif key.endswith("bias"):
                value.normal_(0, 0.1, generator=generator)
            else:
                value.uniform_(0.5, 1.5, generator=generator)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features, generator=generator) * 0.3
            layer.running_var = torch.rand(layer.num_features, generator=generator) + 0.5
    return Backbone(name, network, features).eval()


shared_backbone = lru_cache(draw_backbone)  # for tests that do not modify it
