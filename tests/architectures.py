"""torchvision's architectures as data: how to build and feed each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import nn

LARGEST = 60_000_000

SIDES = {"inception_v3": 299, "vit": 224, "maxvit": 224}
"""Side of the image where 64 pixels won't do, by the beginning of the name."""


def side(name: str) -> int:
    return next((side for start, side in SIDES.items() if name.startswith(start)), 64)


def image(name: str) -> tuple[Any, ...]:
    return (torch.rand(2, 3, side(name), side(name)),)


def clip(name: str) -> tuple[Any, ...]:
    frames, side = (16, 224) if name.startswith(("mvit", "s3d", "swin3d")) else (4, 64)
    return (torch.rand(1, 3, frames, side, side),)


def two_images(name: str) -> tuple[Any, ...]:
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2  # updates of the flow


def images_with_boxes(name: str) -> tuple[Any, ...]:
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]])
    keypoints = torch.cat([torch.rand(2, 17, 2) * 40 + 30, torch.ones(2, 17, 1)], dim=2)
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[:, 30:60, 30:60] = 1
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
    target |= {
        "keypoints": keypoints.float(),
        "masks": masks,
    }  # float32, or torchvision refuses them
    return [torch.rand(3, 96, 96), torch.rand(3, 96, 96)], [target, target]


@dataclass(frozen=True)
class Family:
    """A kind of architectures that are fed alike."""

    module: Any
    inputs: Callable[[str], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "classification": Family(torchvision.models, image),
    "segmentation": Family(torchvision.models.segmentation, image, {"weights_backbone": None}),
    "detection": Family(
        torchvision.models.detection, images_with_boxes, {"weights_backbone": None}
    ),
    "video": Family(torchvision.models.video, clip),
    "optical flow": Family(torchvision.models.optical_flow, two_images),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "fasterrcnn": {"min_size": 96, "max_size": 96, "box_score_thresh": 0.0},
    "maskrcnn": {"min_size": 96, "max_size": 96, "box_score_thresh": 0.0},
    "keypointrcnn": {"min_size": 96, "max_size": 96, "box_score_thresh": 0.0},
    "retinanet": {"min_size": 96, "max_size": 96, "score_thresh": 0.0},
    "fcos": {"min_size": 96, "max_size": 96, "score_thresh": 0.0},
    "ssd": {"score_thresh": 0.0},
    "googlenet": {"init_weights": False},
    "inception": {"init_weights": False},
}
"""So that images stay small, and networks that know nothing still give boxes to compare."""


def build(family: str, name: str) -> nn.Module:
    """Build one architecture without weights, with everything that is drawn at random small."""
    special = next((o for start, o in OPTIONS.items() if name.startswith(start)), {})
    options = FAMILIES[family].options | special
    return torchvision.models.get_model(name, weights=None, **options)


def names(family: str) -> list[str]:
    """List a family's architectures that are small enough."""
    return [
        name
        for name in torchvision.models.list_models(module=FAMILIES[family].module)
        if torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] <= LARGEST
    ]
