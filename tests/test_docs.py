"""The documentation names what there is."""

import re
from pathlib import Path

import pytest

from sentinode.config import AugmentConfig, Config, ReviewRule, TrainConfig

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("page", "model"), [("training.md", TrainConfig), ("training.md", AugmentConfig), ("training.md", ReviewRule)])
def test_every_setting_is_explained(page: str, model: type[Config]) -> None:
    named = set(re.findall(r"`(\w+)", (DOCS / page).read_text(encoding="utf-8")))
    assert set(model.model_fields) - named == set()
