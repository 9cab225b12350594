"""A bundle at work: pinned numbers, torchvision's numbers, and the same numbers in any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models
from torchvision.transforms import v2

from sentinode.bundle import Bundle, write_bundle
from sentinode.config import IMAGENET_MEAN, IMAGENET_STD, TrainConfig
from sentinode.errors import ManifestError, PatchError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import locate
from sentinode.manifests import ReferenceStatistics, ThresholdRule
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_probability
from tests.factories import dataset_manifest, make_bundle, random_patches

# Computed in double precision. If they change, every bundle out there says something else: that needs a new format version, not new numbers.
GOLDEN_LOGITS = [-1.250823, -0.282332, 1.204155, 0.751600]


def formula_weights() -> dict[str, torch.Tensor]:
    """Weights of a ResNet-18 that no library's random numbers touch."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in models.resnet18(num_classes=2).state_dict().items()}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        wave = np.sin(np.arange(np.prod(shape, dtype=int)) * 0.7390851 + number).reshape(shape)
        if name == "fc.bias":
            weights[name] = torch.tensor([31.5, 0.0])  # so that both classes come up
        elif name == "fc.weight":
            weights[name] = torch.from_numpy(0.1 * wave).float()
        elif name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            weights[name] = torch.from_numpy(1 + 0.3 * wave).float()
        elif len(shape) == 4:
            weights[name] = torch.from_numpy(wave * np.sqrt(2 / np.prod(shape[1:]))).float()
        elif name.endswith("weight") and len(shape) == 1:
            weights[name] = torch.from_numpy(0.6 + 0.2 * wave).float()
        else:
            weights[name] = torch.from_numpy(0.2 * wave).float()
    return weights


def formula_patches() -> UInt8Array:
    """Four patches of waves, uint8 (4, 96, 96, 3)."""
    n, y, x, c = np.mgrid[:4, :96, :96, :3]
    return np.round(128 + 100 * np.sin(0.11 * x * (1 + n) + 0.07 * y + 0.9 * c + n)).astype(np.uint8)


def make_golden(out: Path, weights: dict[str, torch.Tensor], tta: int = 1) -> Bundle:
    return write_bundle(
        out,
        weights,
        config=TrainConfig(arch="resnet18", weights="none", unfreeze_depth=5, input_size_px=64, tta=tta),
        dataset=dataset_manifest(),
        temperature=1.25,
        bias=0.5,
        threshold=0.4,
        threshold_rule=ThresholdRule(target_recall=0.95, bound=0.9, reached=False),
        metrics={},
        reference=ReferenceStatistics(
            channel_mean=(0.7, 0.5, 0.7), channel_std=(0.2, 0.3, 0.2), positive_rate=0.4, review_rate=0.9, probability_deciles=[0.5] * 9
        ),
    )


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(make_golden(tmp_path_factory.mktemp("golden") / "bundle", formula_weights()))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path)


def test_the_numbers_of_a_fixed_bundle_and_fixed_patches_are_pinned(golden: Predictor) -> None:
    np.testing.assert_allclose(golden.logits(formula_patches()), GOLDEN_LOGITS, rtol=0, atol=1e-4)
    probabilities = [decision.probability for decision in golden.decide(formula_patches())]
    np.testing.assert_allclose(probabilities, [1 / (1 + np.exp(-(z / 1.25 + 0.5))) for z in GOLDEN_LOGITS], atol=1e-4)


def test_the_logit_is_what_plain_torchvision_computes(golden: Predictor) -> None:
    model = models.resnet18(num_classes=2)
    model.load_state_dict(formula_weights())
    model.eval()
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((64, 64), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    patches = np.concatenate([formula_patches(), random_patches(4)])
    with torch.inference_mode():
        z = model(torch.stack([transform(patch) for patch in patches]))
    np.testing.assert_allclose(golden.logits(patches), (z[:, 1] - z[:, 0]).numpy(), atol=1e-4)


def _turned(patches: UInt8Array) -> list[UInt8Array]:
    """The eight symmetries of each patch, the quarter turns first."""
    turns = [np.rot90(patches, quarter, (1, 2)) for quarter in range(4)]
    return turns + [turn[:, :, ::-1] for turn in turns]


@pytest.mark.parametrize("views", [4, 8])
def test_with_several_views_the_logit_is_their_mean(golden: Predictor, tmp_path: Path, views: int) -> None:
    bundle = make_golden(tmp_path / "bundle", formula_weights(), tta=views)
    patches = formula_patches()
    each = np.stack([golden.logits(np.ascontiguousarray(view)) for view in _turned(patches)[:views]])
    assert each.std(axis=0).min() > 1e-3, "the views look alike, so nothing was compared"
    np.testing.assert_allclose(Predictor(bundle).logits(patches), each.mean(axis=0), atol=1e-4)
    assert bundle.manifest.digest != golden.manifest.digest


def test_eight_views_of_a_turned_patch_are_those_of_the_patch(tmp_path: Path) -> None:
    predictor = Predictor(make_golden(tmp_path / "bundle", formula_weights(), tta=8))
    expected = predictor.logits(formula_patches())
    for turned in _turned(formula_patches()):
        np.testing.assert_allclose(predictor.logits(np.ascontiguousarray(turned)), expected, atol=1e-4)


def test_a_probability_does_not_depend_on_the_rest_of_its_batch(predictor: Predictor) -> None:
    patches = random_patches(23)
    manifest = predictor.manifest

    def probabilities(logits: np.ndarray) -> np.ndarray:
        return calibrated_probability(logits, manifest.temperature, manifest.bias)

    together = probabilities(predictor.logits(patches))
    assert together.std() > 1e-3, "all patches look alike, so nothing was compared"
    for batch_size in (1, 4, 16):
        np.testing.assert_allclose(probabilities(predictor.logits(patches, batch_size)), together, atol=1e-5)
    order = np.random.default_rng(0).permutation(23)
    np.testing.assert_allclose(probabilities(predictor.logits(patches[order])), together[order], atol=1e-5)


def test_decisions_are_those_of_the_manifest(predictor: Predictor) -> None:
    patches = np.concatenate([random_patches(5), np.full((1, 96, 96, 3), 230, np.uint8)])
    manifest, logits = predictor.manifest, predictor.logits(patches)
    for decision, logit in zip(predictor.decide(patches), logits, strict=True):
        assert decision.logit == pytest.approx(float(logit), abs=1e-6)
        assert decision.probability == pytest.approx(1 / (1 + np.exp(-(logit / manifest.temperature + manifest.bias))), abs=1e-6)
        assert decision.prediction == ("Metastatic" if decision.probability >= manifest.threshold else "Normal")
    assert "no_tissue" in predictor.decide(patches)[-1].review_reasons
    assert not any("no_tissue" in decision.review_reasons for decision in predictor.decide(patches)[:-1])


def test_predicting_leaves_patches_and_network_alone(predictor: Predictor) -> None:
    patches = random_patches(4)
    patches.setflags(write=False)  # as they lie in shared memory
    first = predictor.logits(patches)
    np.testing.assert_array_equal(predictor.logits(patches), first)
    assert first.dtype == np.float32


def test_no_patches_are_no_decisions(predictor: Predictor) -> None:
    assert predictor.decide(random_patches(1)[:0]) == []
    assert predictor.logits(random_patches(1)[:0]).shape == (0,)


@pytest.mark.parametrize(
    "patches",
    [
        random_patches(2, side_px=95),
        random_patches(2)[0],
        random_patches(2).astype(np.float32),
        random_patches(2).astype(np.int64),
        random_patches(2)[..., :2],
        random_patches(2).transpose(0, 3, 1, 2),
        random_patches(2)[:, :, :50],
    ],
    ids=["95 px", "one patch without a batch", "float", "int64", "two channels", "channels first", "not square"],
)
def test_patches_of_another_shape_or_type_are_refused(predictor: Predictor, patches: np.ndarray) -> None:
    for ask in (predictor.logits, predictor.decide):
        with pytest.raises(PatchError, match=r"expected uint8 \(96, 96, 3\)"):
            ask(patches)


def test_weights_that_are_not_those_of_the_architecture_are_one_line(tmp_path: Path) -> None:
    weights = formula_weights()
    del weights["layer1.0.bn1.weight"]
    bundle = make_golden(tmp_path / "bundle", weights)
    with pytest.raises(ManifestError) as caught:
        Predictor.load(bundle.path)
    assert str(caught.value) == f"{bundle.path}: its weights are not those of a resnet18"


def test_an_engine_that_is_not_there_is_refused_instead_of_replaced(predictor: Predictor) -> None:
    assert predictor.engine == "torch"
    bundle = Bundle(Path(), predictor.manifest, locate("."))
    with pytest.raises(UsageError, match="engine onnx: expected one of auto, torch"):
        Predictor(bundle, engine="onnx")
