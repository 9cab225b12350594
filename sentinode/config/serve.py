"""How a bundle is served over HTTP."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sentinode.config.base import Config, Engine


class ServeConfig(Config):
    """How a bundle is served over HTTP. The `args` of serve/config.yaml."""

    bundle: str = ""
    """Folder of the bundle; empty = the one that the environment variable SENTINODE_BUNDLE names."""
    auth: Literal["keys", "none"] = "keys"
    """`keys`: requests need an API key (from SENTINODE_API_KEYS or `api_keys_file`); `none`: anyone who reaches the port may call."""
    api_keys_file: str | None = None
    """File with one `name:sha256-of-key` per line; see docs/serving.md."""
    topology: Literal["fused", "split"] = "fused"
    """`fused`: one deployment decodes and classifies; `split`: HTTP ingress and classifier scale apart, at the price of one hop."""
    engine: Engine = "auto"
    """What runs the network."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    """Larger request bodies are refused with 413 before they are read in full. A 96x96 TIF is 27,935 bytes."""
    allow_resize: bool = False
    """Accept patches of another size than the bundle's and resize them; off because a resized patch has another magnification."""
    max_batch_size: Annotated[int, Field(ge=1)] = 16
    """Most patches in one forward pass."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0.005
    """How long a forward pass waits for company."""
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
    drain_timeout_s: Annotated[float, Field(gt=0)] = 30
    """How long a leaving replica may finish what it has accepted."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests {self.max_ongoing_requests} must be at least max_batch_size {self.max_batch_size}, or batches never fill"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} must be at least min_replicas {self.min_replicas}")
        return self
