"""The report of a sweep."""

from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from sentinode import RESEARCH_USE_NOTICE
from sentinode.config import SweepConfig
from sentinode.manifests import LEAK_MEANING, DatasetManifest
from sentinode.search.journal import TrialRecord, rank


@dataclass(frozen=True)
class SweepFacts:
    """What the page needs beside the trials.

    Attributes
    ----------
    config : SweepConfig
    dataset : DatasetManifest
    epochs : int
        Planned for a trial, for each of its folds.
    folds : list of int or None
    name : str
        Of the sweep's folder.
    best : int or None
        Number of the trial that became the bundle.
    notes : list of str
        Warnings, in words.
    """

    config: SweepConfig
    dataset: DatasetManifest
    epochs: int
    folds: list[int] | None
    name: str
    best: int | None
    notes: list[str] = field(default_factory=list)


def render(trials: list[TrialRecord], facts: SweepFacts) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(loader=PackageLoader("ray_jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("sweep.html").render(
        trials=rank(trials, facts.config.metric),
        config=facts.config,
        data=facts.dataset,
        leak_meaning=LEAK_MEANING[facts.dataset.leak_level],
        notice=RESEARCH_USE_NOTICE,
    )
