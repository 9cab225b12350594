"""Configuration: one frozen, documented model per verb. A key that is not listed here is an error.

Configurations say *how*; paths (data, out, bundle) are arguments of the verb and say *what*.
Read with `load_config`: defaults, then a YAML file or preset, then `key=value` settings, the last one winning.
"""

from sentinode.config.base import Config, Engine, Fraction, Rgb, Seed
from sentinode.config.domains import DOMAIN_KINDS, Choice, Domain, Grid, LogRandInt, LogUniform, RandInt, Uniform
from sentinode.config.ensemble import EnsembleConfig
from sentinode.config.errors import describe_validation_error, known_keys_hint
from sentinode.config.export import ExportConfig
from sentinode.config.inference import EvaluateConfig, PredictConfig
from sentinode.config.loading import ConfigT, load_config, parse_config, read_yaml_mapping
from sentinode.config.paths import merge, set_by_path
from sentinode.config.prepare import PrepareConfig
from sentinode.config.serve import ServeConfig
from sentinode.config.sweep import AshaConfig, MedianConfig, NoScheduler, SweepConfig
from sentinode.config.train import IMAGENET_MEAN, IMAGENET_STD, Arch, AugmentConfig, Precision, ReviewRule, TrainConfig

__all__ = [
    "DOMAIN_KINDS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Arch",
    "AshaConfig",
    "AugmentConfig",
    "Choice",
    "Config",
    "ConfigT",
    "Domain",
    "Engine",
    "EnsembleConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Fraction",
    "Grid",
    "LogRandInt",
    "LogUniform",
    "MedianConfig",
    "NoScheduler",
    "Precision",
    "PredictConfig",
    "PrepareConfig",
    "RandInt",
    "ReviewRule",
    "Rgb",
    "Seed",
    "ServeConfig",
    "SweepConfig",
    "TrainConfig",
    "Uniform",
    "describe_validation_error",
    "known_keys_hint",
    "load_config",
    "merge",
    "parse_config",
    "read_yaml_mapping",
    "set_by_path",
]
