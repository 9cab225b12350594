"""What training augmentation costs per patch on one core, beside torchvision doing the same to one image after the other, in turns.

    python -m benchmarks.augment --source kaggle/ --pairs 9          # a folder in the Kaggle layout; `sentinode synth` makes one

For each augmentation: patches per second from uint8 pixels in memory to a float batch of 64, ours and `torchvision.transforms.v2` on each image, and
the median ratio with its interval. CPU time, because other programs would be measured otherwise. Both sides convert to float and stack; "none" is
that alone. The stain has no peer in torchvision. Ends with exit code 1 if the default is not 5 times as fast as the peer, or the interval does not
reach that.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what is measured

import numpy as np
import torch
from torchvision.transforms import v2

from benchmarks.ratios import median_of
from sentinode.augment import augment, draw
from sentinode.config import AugmentConfig
from sentinode.images import decode_patch

GOAL_DEFAULT = 5.0
_ROWS = 64
_NOTHING = AugmentConfig(dihedral=False, colour_jitter=0, hue_jitter=0)

Peer = Callable[[torch.Tensor], torch.Tensor]


def cases() -> dict[str, tuple[AugmentConfig, Peer | None]]:
    """Return what is compared, by name: our configuration, and the transform of one uint8 image (3, side, side)."""
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    symmetries = v2.Compose([*flips, v2.RandomApply([v2.RandomRotation((90, 90))])])
    colours = v2.ColorJitter(0.1, 0.1, 0.1, 0.02)
    turned = v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)

    def ours(**changes: object) -> AugmentConfig:
        return _NOTHING.model_copy(update=changes)

    return {
        "none": (_NOTHING, v2.Identity()),
        "default": (AugmentConfig(), v2.Compose([symmetries, colours])),
        "preset seed": (ours(flip=True, rotation_deg=15, colour_jitter=0.3), v2.Compose([*flips, turned, v2.ColorJitter(0.3, 0.3, 0.3)])),
        "dihedral": (ours(dihedral=True), symmetries),
        "rotation 15": (ours(rotation_deg=15), turned),
        "colours": (ours(colour_jitter=0.1, hue_jitter=0.02), colours),
        "stains 0.1": (ours(stain_jitter=0.1), None),
        "blur 1 px": (ours(blur_sigma_px=1), v2.RandomApply([v2.GaussianBlur(7, (1e-3, 1.0))])),
        "jpeg 40": (ours(jpeg_quality=40), v2.RandomApply([v2.JPEG((40, 100))])),
    }


def seconds(run: Callable[[], torch.Tensor]) -> float:
    """Return the CPU time of one run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--source", required=True, type=Path, help="folder in the Kaggle layout, at least 64 patches")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = sorted((args.source / "train").iterdir())[:_ROWS]
    images = torch.from_numpy(np.stack([decode_patch(file.read_bytes(), size_px=96) for file in files]))
    draws = draw(0, 0, len(images))
    reached = True
    print(f"{len(images)} patches of 96 px, one thread; torch {torch.__version__}\n{'':12} {'ours/s':>8} {'peer/s':>8}  times as fast")
    for name, (config, transform) in cases().items():

        def ours(config: AugmentConfig = config) -> torch.Tensor:
            return augment(images, draws, config)

        def peer(transform: Peer | None = transform) -> torch.Tensor:
            assert transform is not None
            return torch.stack([transform(image.permute(2, 0, 1)) for image in images]).to(torch.float32).div_(255)

        sides = [ours, peer] if transform is not None else [ours]
        for side in sides:
            side()
        rounds = [[seconds(side) for side in sides] for _ in range(args.pairs)]
        rates = [f"{len(images) / float(np.median(times)):8.0f}" for times in zip(*rounds, strict=True)]
        if transform is None:
            print(f"{name:12} {rates[0]} {'-':>8}")
            continue
        ratio = median_of([theirs / mine for mine, theirs in rounds])
        print(f"{name:12} {rates[0]} {rates[1]}  {ratio}")
        reached = reached and (name != "default" or ratio.high >= GOAL_DEFAULT)
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
