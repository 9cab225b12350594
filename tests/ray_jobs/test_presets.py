"""Every preset is a training configuration by itself and over any other file."""

from pathlib import Path

import pytest

from ray_jobs.verb import PRESETS
from sentinode.config import AugmentConfig, TrainConfig, load_config

EVERY_PRESET = sorted(PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", EVERY_PRESET, ids=[preset.stem for preset in EVERY_PRESET])
def test_a_preset_is_a_training_configuration_that_differs_from_the_defaults(preset: Path) -> None:
    assert load_config(TrainConfig, [preset]) != TrainConfig()


def test_the_seeds_augmentation_is_flips_rotation_and_jitter_whatever_the_file_below_says(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("augment: {hue_jitter: 0.1, stain_jitter: 0.2, blur_sigma_px: 1, jpeg_quality: 50}\nepochs: 3\n")
    config = load_config(TrainConfig, [file, PRESETS / "seed.yaml"])
    assert config.augment == AugmentConfig(dihedral=False, flip=True, rotation_deg=15, colour_jitter=0.3, hue_jitter=0)
    assert config == TrainConfig(epochs=3, augment=config.augment)
