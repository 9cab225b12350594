"""Sentinode's core: what data preparation, jobs and serving share. Nothing in here imports Ray."""

__version__ = "0.1.0"

RESEARCH_USE_NOTICE = "Research use only. Not a medical device; no output is a diagnosis."
"""Stands in the README, the OpenAPI description, every model card and every prediction response."""

CLASS_NAMES = ("Normal", "Metastatic")
"""Class 0 and class 1. Class 1 means: the centre 32x32 pixels of the patch hold tumour tissue."""
