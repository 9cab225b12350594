"""Running prepare in this process."""

from typing import Any

import pytest

from data_prep.output import request_of
from data_prep.prepare import PrepareResult
from data_prep.prepare import prepare as run
from data_prep.tasks import Progress
from sentinode.config import PrepareConfig


def prepare(config: PrepareConfig, source: Any, out: Any, *, progress: Progress | None = None, **options: Any) -> PrepareResult:
    """Prepare on the Ray that runs; `options` as those of `request_of`."""
    return run(request_of(config, source, out, **options), progress=progress)


def killed_at(step: str, config: PrepareConfig, source: Any, out: Any, **options: Any) -> None:
    """Prepare until it comes to a step, named as a function of data_prep.prepare, and end there as if killed."""

    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"data_prep.prepare.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, source, out, **options)
