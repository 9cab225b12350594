"""docs/example_sweep is what this program makes: not the page of an earlier one."""

import re
from pathlib import Path

import yaml

from sentinode.config import SweepConfig, TrainConfig, load_config

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "example_sweep"


def test_the_example_has_every_section_of_today() -> None:
    page = (EXAMPLE / "report.html").read_text()
    sections = set(re.findall(r'<section id="(\w+)"', (ROOT / "ray_jobs" / "templates" / "sweep.html").read_text()))
    # Its sweep has no cost.
    assert set(re.findall(r'<section id="(\w+)"', page)) == sections - {"cost"}


def test_the_example_s_best_is_a_point_of_its_sweep_and_a_configuration_of_today() -> None:
    sweep = load_config(SweepConfig, [EXAMPLE / "sweep.yaml"])
    best = load_config(TrainConfig, [EXAMPLE / "best.yaml"])
    assert set(TrainConfig.model_fields) == set(yaml.safe_load((EXAMPLE / "best.yaml").read_text()))
    assert all(sweep.space[key][0].holds(getattr(best, key)) for key in sweep.keys)
    assert best.epochs == 6
