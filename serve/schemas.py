"""What the endpoint answers, as typed models: the source of /openapi.json and /docs."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sentinode import RESEARCH_USE_NOTICE
from sentinode.manifests import LEAK_MEANING, BundleManifest, LeakLevel, SplitMethod, ThresholdRule
from sentinode.probability import Decision

EXAMPLE_DIGEST = "3f786850e387550fdab836ed7e6dc881de23001b" + "0" * 24


class Answer(BaseModel):
    """Base of every response model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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
    """`low_confidence`, `near_threshold`, `no_tissue`; more may be added."""
    model: ModelReference
    request_id: str = Field(examples=["0c8f6a2e-6d1b-4c6e-9d0e-2f2f4f0f7a11"])
    """The caller's `X-Request-ID`, or one made here."""
    notice: str = Field(default=RESEARCH_USE_NOTICE, examples=[RESEARCH_USE_NOTICE])

    @classmethod
    def of(cls, decision: Decision, manifest: BundleManifest, engine: str, request_id: str) -> "Prediction":
        """Tell one decision."""
        return cls(
            prediction=decision.prediction,  # type: ignore[arg-type]
            confidence=decision.confidence,
            probabilities=Probabilities(Normal=1 - decision.probability, Metastatic=decision.probability),
            threshold=manifest.threshold,
            needs_review=decision.needs_review,
            review_reasons=list(decision.review_reasons),
            model=ModelReference.of(manifest, engine),
            request_id=request_id,
        )


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

    below: float
    """Flagged when max(p, 1-p) is below this."""
    band: float
    """Flagged when p lies within this distance of the threshold."""


class DataOfModel(Answer):
    """What the model was trained on."""

    fingerprint: str
    """Of the prepared data set; equal fingerprints are equal patches, labels and splits."""
    split_method: SplitMethod
    leak_level: LeakLevel
    leak_meaning: str
    notes: list[str]


class ModelCard(Answer):
    """The served model's card, from its bundle.json."""

    name: str
    version: str
    digest: str = Field(examples=[EXAMPLE_DIGEST])
    created_at: str
    licence: str
    arch: str = Field(examples=["resnet34"])
    class_names: tuple[str, str] = Field(examples=[("Normal", "Metastatic")])
    patch_size_px: int = Field(examples=[96])
    """Side of the patches it accepts."""
    input_size_px: int = Field(examples=[224])
    """Side of what the network sees."""
    spacing_um_px: float | None = Field(examples=[0.972])
    """Physical size of a pixel of the training patches, micrometres; null when unknown."""
    threshold: float
    threshold_rule: ThresholdRule
    temperature: float
    """probability = sigmoid(logit / temperature + bias)."""
    bias: float
    review: ReviewThresholds
    metrics: dict[str, Any]
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
    request_id: str = Field(examples=["0c8f6a2e-6d1b-4c6e-9d0e-2f2f4f0f7a11"])
