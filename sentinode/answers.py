"""What the endpoint answers, as typed models: the source of /openapi.json and /docs, and what `sentinode.client` returns."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sentinode import RESEARCH_USE_NOTICE
from sentinode.manifests import LEAK_MEANING, BundleManifest, LeakLevel, SplitMethod, ThresholdRule
from sentinode.probability import Decision

WRONG_SPACING = "wrong_spacing"
UNKNOWN_SPACING = "unknown_spacing"

EXAMPLE_REQUEST_ID = "0c8f6a2e-6d1b-4c6e-9d0e-2f2f4f0f7a11"
EXAMPLE_DIGEST = "3f786850e387550fdab836ed7e6dc881de23001b" + "0" * 24


class Answer(BaseModel):
    """Base of every response model."""

    # A newer endpoint may say more than this version knows.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, protected_namespaces=())


class ModelReference(Answer):
    """Which model answered."""

    name: str = Field(examples=["sentinode"])
    version: str = Field(examples=["1"])
    digest: str = Field(examples=[EXAMPLE_DIGEST])
    """SHA-256 over the weights and everything else that decides a prediction: equal digests and engines give equal answers."""
    engine: str = Field(examples=["torch"])
    """What ran the network."""

    @classmethod
    def of(cls, manifest: BundleManifest, engine: str) -> "ModelReference":
        """The reference of a bundle that an engine runs."""
        return cls(name=manifest.name, version=manifest.version, digest=manifest.digest, engine=engine)


class Probabilities(Answer):
    """Calibrated probabilities; they sum to 1."""

    Normal: float = Field(ge=0, le=1, examples=[0.0731])
    Metastatic: float = Field(ge=0, le=1, examples=[0.9269])


class Prediction(Answer):
    """What is said about one patch. Numbers are unrounded."""

    prediction: Literal["Normal", "Metastatic"] = Field(examples=["Metastatic"])
    """Metastatic when its probability is at least `threshold`: tumour tissue in the centre 32x32 pixels."""
    confidence: float = Field(ge=0, le=1, examples=[0.9269])
    """Calibrated probability of the class in `prediction`; below one half where the threshold is not at one half."""
    probabilities: Probabilities
    threshold: float = Field(ge=0, le=1, examples=[0.41])
    """The model's operating point."""
    needs_review: bool = Field(examples=[False])
    """Whether a human should look, for any of `review_reasons`."""
    review_reasons: list[str] = Field(examples=[[]])
    """`low_confidence`, `near_threshold`, `no_tissue`, `unusual_colours`, `wrong_spacing`, `unknown_spacing`; more may be added."""
    spacing_um_px: float | None = Field(default=None, examples=[0.972])
    """As the caller gave it, micrometres; null = not given."""
    model: ModelReference
    request_id: str = Field(examples=[EXAMPLE_REQUEST_ID])
    """The caller's `X-Request-ID`, or one made here."""
    notice: str = Field(default=RESEARCH_USE_NOTICE, examples=[RESEARCH_USE_NOTICE])

    @classmethod
    def of(cls, decision: Decision, speaker: "Speaker", request_id: str, spacing_um_px: float | None, spacing_reason: str | None) -> "Prediction":
        """Tell one decision, and what is to be said of the spacing (`Speaker.spacing_reason`)."""
        reasons = [*decision.review_reasons, *([spacing_reason] if spacing_reason else [])]
        return cls(
            prediction=decision.prediction,  # type: ignore[arg-type]
            confidence=decision.confidence,
            probabilities=Probabilities(Normal=1 - decision.probability, Metastatic=decision.probability),
            threshold=speaker.threshold,
            needs_review=bool(reasons),
            review_reasons=reasons,
            spacing_um_px=spacing_um_px,
            model=speaker.model,
            request_id=request_id,
        )


@dataclass(frozen=True)
class Speaker:
    """The model that has spoken: travels with each decision, since replicas of two models may answer side by side while one replaces the other."""

    model: ModelReference
    threshold: float
    spacing_um_px: float | None

    @classmethod
    def of(cls, manifest: BundleManifest, engine: str) -> "Speaker":
        """The bundle, as an engine runs it."""
        return cls(ModelReference.of(manifest, engine), manifest.threshold, manifest.spacing_um_px)

    def spacing_reason(self, given_um_px: float | None, *, tolerance: float, expected: bool) -> str | None:
        """Return why a patch should be reviewed for its spacing, or None.

        Parameters
        ----------
        given_um_px : float or None
            What the caller says, micrometres per pixel.
        tolerance : float
            Relative difference to the model's that is still the same magnification.
        expected : bool
            Whether a patch without a spacing is to be reviewed.
        """
        if given_um_px is None:
            return UNKNOWN_SPACING if expected else None
        if self.spacing_um_px is None:
            return None
        return WRONG_SPACING if abs(given_um_px - self.spacing_um_px) > tolerance * self.spacing_um_px else None


class Health(Answer):
    """The model is loaded and has answered lately."""

    status: Literal["healthy"] = "healthy"
    model_loaded: Literal[True] = True
    model: ModelReference
    notice: str = Field(default=RESEARCH_USE_NOTICE, examples=[RESEARCH_USE_NOTICE])


class Alive(Answer):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Ready(Answer):
    """A prediction succeeded lately."""

    status: Literal["ready"] = "ready"


class ReviewThresholds(Answer):
    """When a prediction is flagged for a human."""

    below: float = Field(examples=[0.85])
    """Flagged when max(p, 1-p) is below this."""
    band: float = Field(examples=[0.05])
    """Flagged when p lies within this distance of the threshold."""


class DataOfModel(Answer):
    """What the model was trained on."""

    fingerprint: str = Field(examples=[EXAMPLE_DIGEST])
    """Of the prepared data set; equal fingerprints are equal patches, labels and splits."""
    split_method: SplitMethod = Field(examples=["overlap"])
    leak_level: LeakLevel = Field(examples=["pixels"])
    leak_meaning: str = Field(examples=[LEAK_MEANING["pixels"]])
    """What `leak_level` says of the figures."""
    notes: list[str] = Field(examples=[[]])


class ModelCard(Answer):
    """The served model's card, from its bundle.json."""

    name: str = Field(examples=["sentinode"])
    version: str = Field(examples=["1"])
    digest: str = Field(examples=[EXAMPLE_DIGEST])
    created_at: str = Field(examples=["2026-11-28T12:00:00+00:00"])
    licence: str = Field(examples=["Apache-2.0"])
    arch: str = Field(examples=["resnet34"])
    class_names: tuple[str, str] = Field(examples=[("Normal", "Metastatic")])
    patch_size_px: int = Field(examples=[96])
    """Side of the patches it accepts."""
    input_size_px: int = Field(examples=[224])
    """Side of what the network sees."""
    spacing_um_px: float | None = Field(examples=[0.972])
    """Physical size of a pixel of the training patches, micrometres; null when unknown."""
    threshold: float = Field(examples=[0.41])
    threshold_rule: ThresholdRule
    temperature: float = Field(examples=[1.18])
    """probability = sigmoid(logit / temperature + bias)."""
    bias: float = Field(examples=[-0.21])
    review: ReviewThresholds
    metrics: dict[str, Any] = Field(examples=[{"roc_auc": 0.96, "confusion": {"tn": 530, "fp": 90, "fn": 19, "tp": 361}}])
    """On validation, which also chose epoch, calibration and threshold: optimistic."""
    data: DataOfModel
    notice: str = Field(default=RESEARCH_USE_NOTICE, examples=[RESEARCH_USE_NOTICE])

    @classmethod
    def of(cls, manifest: BundleManifest) -> "ModelCard":
        """The card of a bundle."""
        same = ("name", "version", "digest", "created_at", "licence", "arch", "class_names", "patch_size_px", "input_size_px", "spacing_um_px")
        data = manifest.data
        return cls(
            **{field: getattr(manifest, field) for field in (*same, "threshold", "threshold_rule", "temperature", "bias", "metrics")},
            review=ReviewThresholds(below=manifest.review.below, band=manifest.review.band),
            data=DataOfModel(
                fingerprint=data.fingerprint,
                split_method=data.split_method,
                leak_level=data.leak_level,
                leak_meaning=LEAK_MEANING[data.leak_level],
                notes=data.notes,
            ),
        )


class Problem(Answer):
    """An error, RFC 9457 (`application/problem+json`)."""

    type: str = Field(examples=["urn:sentinode:problem:truncated"])
    """Stable name of the kind of problem."""
    title: str = Field(examples=["The image is truncated or damaged"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["the image is truncated or damaged"])
    request_id: str = Field(examples=[EXAMPLE_REQUEST_ID])


BATCH = TypeAdapter(list[Prediction | Problem])
"""The answer to several patches, in their order: of each what `/predict` would have answered."""
