"""The Serve application.

serve run serve/config.yaml                                       # this machine
serve deploy serve/config.yaml --address http://head:8265         # a cluster
"""

import asyncio
import logging
import math
import os
import warnings
from typing import Any, Self

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from sentinode.answers import Speaker
from sentinode.bundle import Bundle
from sentinode.config import ServeConfig, parse_config
from sentinode.engines import choose_engine
from sentinode.errors import ConfigError, SentinodeError, StorageError, UsageError
from sentinode.images import UInt8Array
from sentinode.locations import locate
from sentinode.manifests import BundleManifest
from sentinode.probability import Decision
from serve.auth import resolve_key_digests
from serve.backend import Overloaded
from serve.engine import Classifier, EngineError
from serve.http_app import create_http_app

IMPORT_PATH = "serve.app:build_app"
BUNDLE_VARIABLE = "SENTINODE_BUNDLE"
ENDPOINT = "Endpoint"
CLASSIFIER = "Classifier"

RETRY_AFTER_S = 1
HOP_ATTEMPTS = 3

logger = logging.getLogger("ray.serve.sentinode")


class DeployError(ConfigError, RayServeException):  # type: ignore[misc]
    """A ConfigError of which Serve's controller shows the one line; of every other exception it shows the whole traceback."""


class ServeArgs(ServeConfig):
    """ServeConfig as Serve makes it from `args`: the same fields, wrong ones answered in one line."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Called by Serve with the mapping `args`; raises DeployError."""
        try:
            return parse_config(cls, obj)
        except ConfigError as error:
            raise DeployError(f"args: {error}") from error


def build_app(args: ServeArgs) -> ray_serve.Application:
    """Build the application; nothing is started.

    Parameters
    ----------
    args : ServeArgs or ServeConfig
        With an empty `bundle`, the environment variable SENTINODE_BUNDLE names it.

    Returns
    -------
    serve.Application
        One deployment, `Endpoint`, or with topology `split` two, `Endpoint` and `Classifier`.

    Raises
    ------
    DeployError
        No bundle is named, the one named is missing, damaged or without the engine asked for, or keys are needed and none is configured.
    """
    try:
        config = _with_bundle(args)
        bundle = Bundle.open(config.bundle)
        manifest = bundle.manifest
        # Chosen here, once, like the digest: replicas on nodes that differ, or that start after an export, answer with the same engine.
        engine = choose_engine(bundle, config.engine, "cuda" if config.gpus_per_replica > 0 else "cpu")
        config = ServeConfig(**config.model_dump() | {"engine": engine})
        digests = resolve_key_digests(config.api_keys_file) if config.auth == "keys" else ()
    except (UsageError, StorageError) as error:
        raise DeployError(str(error)) from error
    if not manifest.threshold_rule.reached:
        target = manifest.threshold_rule.target_recall
        logger.warning(f"the bundle's threshold does not reach its recall of {target:g} with confidence; see its model card")
    if config.auth == "none":
        logger.warning("auth: none. Whoever reaches the port can use this endpoint; bind it to localhost or set auth: keys.")
    if config.topology == "fused":
        fused = _deployment(FusedEndpoint, ENDPOINT, config, config.cpus_per_replica, config.gpus_per_replica, config.target_ongoing_requests)
        return fused.bind(config, manifest, digests)
    classifier = _deployment(Classifier, CLASSIFIER, config, config.cpus_per_replica, config.gpus_per_replica, config.target_ongoing_requests)
    # An ingress only decodes and waits, so it carries more requests than a classifier before another one is worth a CPU.
    ingress = _deployment(SplitEndpoint, ENDPOINT, config, config.cpus_per_ingress, 0, max(1, config.max_ongoing_requests / 2))
    return ingress.bind(classifier.bind(config, manifest.digest), config, manifest, digests)


def _with_bundle(args: ServeConfig) -> ServeConfig:
    bundle = args.bundle or os.environ.get(BUNDLE_VARIABLE, "")
    if not bundle:
        raise ConfigError(f"bundle: missing; set it in the args or name the folder in the environment variable {BUNDLE_VARIABLE}")
    # Absolute, because replicas run in another working folder. Always a plain ServeConfig: it is what travels to replicas.
    return ServeConfig(**args.model_dump() | {"bundle": str(locate(bundle))})


def _deployment(cls: type, name: str, config: ServeConfig, cpus: float, gpus: float, target_ongoing_requests: float) -> ray_serve.Deployment:
    """Every setting that decides about behaviour under load is stated, so that no default of Ray's is taken by accident."""
    with warnings.catch_warnings():
        # Deprecated for variables of the processes of Ray, which on a cluster are not ours to set; it is what Ray 2.60 goes by.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=config.min_replicas,
            initial_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            # Load is told so often, and averaged over so long. With Ray's 10 and 30 s a quick upscale_delay_s would be pointless.
            metrics_interval_s=1.0,
            look_back_period_s=3.0,
        )
    return ray_serve.deployment(
        cls,
        name=name,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        autoscaling_config=scaling,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=10.0,
        # Longer than any batch: a probe waits behind the batch that runs, and a replica whose probe times out is replaced.
        health_check_timeout_s=30.0,
        # A bundle that does not load now will not load at the twentieth try (Ray's default) either.
        max_constructor_retry_count=3,
        rolling_update_percentage=0.2,
        # At least one replica of the new version answers before one of the old leaves; with 0 a single replica would mean a gap at every update.
        max_surge_percent=25,
        # JSON lines whatever the cluster's setting, and no access log of Ray's: serve.middleware writes one line per request.
        logging_config=LoggingConfig(encoding="JSON", log_level="INFO", enable_access_log=False),
    )


@ray_serve.ingress()
class FusedEndpoint:
    """HTTP and classifier in one replica: no hop between them."""

    def __init__(self, config: ServeConfig, manifest: BundleManifest, key_digests: tuple[str, ...]) -> None:
        self._classifier = Classifier(config, manifest.digest)
        self._http = (manifest, config, key_digests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve calls this on the replica, so the FastAPI application is never pickled.
        return create_http_app(self._classifier, *self._http, echo_request_id=False)

    async def check_health(self) -> None:
        await self._classifier.check_health()


@ray_serve.ingress()
class SplitEndpoint:
    """HTTP in front of classifier replicas that scale apart."""

    def __init__(self, classifier: DeploymentHandle, config: ServeConfig, manifest: BundleManifest, key_digests: tuple[str, ...]) -> None:
        self._classifier = classifier
        self._http = (manifest, config, key_digests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_app(_Hop(self._classifier), *self._http, echo_request_id=False)


class _Hop:
    """A backend behind a handle: asks another replica where one is lost, which is safe since a patch can be classified twice."""

    def __init__(self, classifier: DeploymentHandle) -> None:
        self._classifier = classifier

    async def classify(self, patch: UInt8Array) -> tuple[Decision, Speaker]:
        answer: tuple[Decision, Speaker] = await self._asked(self._classifier.classify, patch)
        return answer

    async def classify_many(self, patches: UInt8Array) -> tuple[list[Decision], Speaker]:
        answer: tuple[list[Decision], Speaker] = await self._asked(self._classifier.classify_many, patches)
        return answer

    async def explain(self, patch: UInt8Array, opacity: float) -> tuple[UInt8Array, Speaker]:
        answer: tuple[UInt8Array, Speaker] = await self._asked(self._classifier.explain, patch, opacity)
        return answer

    async def _asked(self, method: Any, *arguments: Any) -> Any:
        lost: RayActorError | None = None
        for _ in range(HOP_ATTEMPTS):
            response = method.remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                # A caller that has gone away, or was timed out: else the classifier would work for nobody.
                response.cancel()
                raise
            except BackPressureError as error:
                raise Overloaded(math.ceil(error.retry_after_s or RETRY_AFTER_S)) from error
            except RayTaskError as error:
                # What it raised itself, without Ray's wrapping: whether there is a map is no failure of the engine.
                raise (error.cause if isinstance(error.cause, SentinodeError) else error) from error
            except RayActorError as error:
                lost = error
        raise EngineError(f"{HOP_ATTEMPTS} classifier replicas were lost one after the other") from lost
