"""Labels and probabilities with a known dependence inside groups."""

import numpy as np


def simulated(rows: int, seed: int = 0, group_size: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and groups; rows of one group share their label and most of their score."""
    generator = np.random.default_rng(seed)
    groups = np.arange(rows) // group_size
    labels = (generator.random(groups.max() + 1) < 0.4).astype(np.int64)[groups]
    score = 1.2 * (2 * labels - 1) + generator.normal(0, 1.2, groups.max() + 1)[groups] + generator.normal(0, 0.5, rows)
    return labels, 1 / (1 + np.exp(-score)), groups.astype(np.str_)
