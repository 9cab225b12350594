"""Whether a Ray of our version answers at an address and lets us in, asked before Ray's own driver is started there."""

import os

import grpc
import ray
from ray.exceptions import AuthenticationError

from sentinode.errors import UsageError

TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of this cluster"
_ANSWER_TIMEOUT_S = 10.0


def check_ray_address(address: str) -> None:
    """Ask the Ray at HOST:PORT whether it is alive: one call, with the token.

    Ray's driver itself tries again for 20 s where the token is wrong, and for minutes where something else listens.

    Raises
    ------
    UsageError
        None answers there, it wants another token, or it is of another version.
    """
    # What `ray` itself asks with; a test holds that it is there.
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    try:
        with create_gcs_channel(address) as channel:
            theirs = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_ANSWER_TIMEOUT_S).ray_version
    except AuthenticationError as error:
        raise refused(address) from error
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise refused(address) from error
        raise UsageError(f"RAY_ADDRESS={address}: no Ray cluster can be reached there ({_reason(error)})") from error
    if theirs != ray.__version__:
        raise UsageError(f"RAY_ADDRESS={address}: runs Ray {theirs}, this is Ray {ray.__version__}; both must be the same")


def missing_token_file() -> str | None:
    """Return in a line that Ray is told to take its token from a file that is not there; None where it is not so."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(path):
        return None
    return f"RAY_AUTH_TOKEN_PATH={path}: there is no such file"


def refused(address: str) -> UsageError:
    """Return what to raise where a Ray wants another token."""
    return UsageError(f"RAY_ADDRESS={address}: refused without its token; {TOKEN_HINT}")


def _reason(error: grpc.RpcError) -> str:
    details = str(error.details())
    if "HTTP/2" in details:
        return "what listens there is something else"
    return "no answer" if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else details.rpartition(": ")[2]
