"""The code paths of the benchmark of predict without Ray: that both sides see the same batches, and that a missed goal is said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import predict as benchmark
from sentinode.config import PredictConfig
from sentinode.predictor import Predictor
from tests.factories import make_bundle, random_patches


def test_the_peer_answers_for_every_patch_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    patches, bundle = random_patches(7), make_bundle(tmp_path / "bundle")
    (tmp_path / "source").mkdir()
    for number, patch in enumerate(patches):
        Image.fromarray(patch).save(tmp_path / "source" / f"{number}.png")
    images = benchmark.decoded(str(tmp_path / "source"), 96)
    timed = benchmark.Peer(str(bundle.path), images, PredictConfig(batch_size=2, rows_per_part=4)).run()
    np.testing.assert_allclose(timed.logits, Predictor(bundle).logits(patches), atol=1e-5)
    (tmp_path / "source" / "x.png").touch()
    with pytest.raises(SystemExit, match="cannot be read"):
        benchmark.decoded(str(tmp_path / "source"), 96)


def test_a_missed_goal_and_other_answers_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    def pairs(seconds: float, logit: float) -> list[tuple[benchmark.Timed, benchmark.Timed]]:
        return [(benchmark.Timed(seconds, np.full(3, logit)), benchmark.Timed(1.0, np.zeros(3)))] * 6

    assert benchmark.report(pairs(1.02, 0.0))
    assert not benchmark.report(pairs(1.2, 0.0))
    assert "0.83 (0.83 to 0.83, 6 pairs)" in capsys.readouterr().out
    assert not benchmark.report(pairs(1.0, 0.1))
    assert "MISSED" in capsys.readouterr().out
