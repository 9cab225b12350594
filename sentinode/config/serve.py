"""How a bundle is served over HTTP."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sentinode.config.base import Config, Engine

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


class ServeConfig(Config):
    """How a bundle is served over HTTP. The `args` of serve/config.yaml."""

    bundle: str = ""
    """Folder of the bundle; empty = the one that the environment variable SENTINODE_BUNDLE names."""
    auth: Literal["keys", "none"] = "keys"
    """`keys`: requests need an API key (from SENTINODE_API_KEYS or `api_keys_file`); `none`: anyone who reaches the port may call."""
    api_keys_file: str | None = None
    """File with one `name:sha256-of-key` per line; see docs/serving.md."""
    revision: str = ""
    """Any text: change it to have `serve deploy` read keys and bundle again. Serve builds no application anew whose configuration is the same."""
    topology: Literal["fused", "split"] = "fused"
    """`fused`: one deployment decodes and classifies; `split`: HTTP ingress and classifier scale apart, at the price of one hop."""
    engine: Engine = "auto"
    """What runs the network."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    """Larger request bodies are refused with 413 before they are read in full. A 96x96 TIF is 27,935 bytes."""
    max_batch_body_bytes: Annotated[int, Field(ge=1024)] = 134_217_728
    """The same for `/predict/batch`; 128 MiB hold 4,804 TIFs of 96x96."""
    max_batch_patches: Annotated[int, Field(ge=1)] = 4096
    """Most patches in one request to `/predict/batch`."""
    max_batch_requests: Annotated[int, Field(ge=1)] = 4
    """Requests to `/predict/batch` that one replica works on at a time; more are answered 429, which bounds the memory that bodies take."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 10
    """A body that stops coming for this long is answered 408, and so is one that is not whole by then (routes for one patch) or comes with less than
    16 KiB/s (`/predict/batch`): slow callers hold no replica."""
    cors_origins: list[str] = []
    """Origins, like https://viewer.example.org, whose web pages may call; empty = none but our own."""
    expect_spacing: bool = False
    """Flag patches that come without `spacing_um_px` for review."""
    spacing_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Relative difference between the caller's spacing and the model's above which a patch is flagged for review."""
    allow_resize: bool = False
    """Accept patches of another size than the bundle's and resize them; off because a resized patch has another magnification."""
    max_batch_size: Annotated[int, Field(ge=1)] = 16
    """Most patches in one forward pass."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0.0
    """How long a forward pass waits for company where the engine is free; a busy one fills its batches by itself."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas that are always up."""
    max_replicas: Annotated[int, Field(ge=1)] = 4
    """Replicas that load can bring up."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    """Requests in flight per replica that autoscaling aims at."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that one replica accepts at a time; at least `max_batch_size`, or batches never fill."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 256
    """Requests that wait for a replica; more are answered 429 with Retry-After."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 3
    """Load must last this long before replicas are added."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120
    """Quiet must last this long before replicas are removed."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    """CPUs reserved for each classifier; whole CPUs are also its torch threads."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """GPUs, or a part of one, reserved for each classifier; above 0 the network runs on CUDA."""
    cpus_per_ingress: Annotated[float, Field(gt=0)] = 0.5
    """CPUs reserved for each HTTP ingress. Only with topology `split`; a fused replica has `cpus_per_replica` for both."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    """A request that takes longer is answered 504."""
    batch_request_timeout_s: Annotated[float, Field(gt=0)] = 300
    """The same for `/predict/batch`."""
    engine_timeout_s: Annotated[float, Field(gt=0)] = 60
    """A replica whose forward pass takes longer hangs, and is replaced."""
    drain_timeout_s: Annotated[float, Field(gt=0)] = 30
    """How long a leaving replica may finish what it has accepted."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests {self.max_ongoing_requests} must be at least max_batch_size {self.max_batch_size}, or batches never fill"
            )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins: got {origin!r}, expected scheme://host[:port] without a path")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} must be at least min_replicas {self.min_replicas}")
        return self
