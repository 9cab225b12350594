"""Strict check of a file for `ray up`. Ray itself lets any key pass under `provider` and `node_config`, where a misspelt one may open something.

sentinode doctor --cluster-file cluster.yaml
"""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema

from sentinode.config import known_keys_hint, read_yaml_mapping
from sentinode.errors import ConfigError

_CLOUD_KEYS = {"region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip"}
_PROVIDER_KEYS = {
    "aws": _CLOUD_KEYS | {"security_group", "key_pair", "aws_credentials", "cloudwatch"},
    "gcp": _CLOUD_KEYS | {"project_id", "gcp_credentials"},
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}
"""What Ray 2.60's node providers read, beside `type`."""

# Of EC2's RunInstances, in boto3's spelling, and Ray's own two.
_AWS_NODE_KEYS = (
    "BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification DisableApiTermination EbsOptimized EnclaveOptions "
    "HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior InstanceMarketOptions InstanceType Ipv6AddressCount KernelId "
    "KeyName LaunchTemplate LicenseSpecifications MaintenanceOptions MetadataOptions Monitoring NetworkInterfaces Placement PrivateDnsNameOptions "
    "PrivateIpAddress RamdiskId SecurityGroupIds SecurityGroups SubnetId SubnetIds TagSpecifications UserData"
)
# Of the Compute API's instances.insert.
_GCP_NODE_KEYS = (
    "advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description disks displayDevice guestAccelerators hostname "
    "labels machineType metadata minCpuPlatform networkInterfaces params privateIpv6GoogleAccess reservationAffinity resourcePolicies scheduling "
    "serviceAccounts shieldedInstanceConfig sourceMachineImage tags"
)
_NODE_KEYS = {"aws": set(_AWS_NODE_KEYS.split()), "gcp": set(_GCP_NODE_KEYS.split()), "local": set()}

_TO_FILL_IN = re.compile(r"[\w.-]*CHANGE-ME")
_NO_FILE_SYSTEM = re.compile(r"(?<!\S)(fs-|None)?\.efs\.")


def check_cluster_file(path: str | Path, *, filled_in: bool = True) -> None:
    """Check a file for `ray up`.

    Parameters
    ----------
    path : str or Path
    filled_in : bool
        Whether it is to be used from here, now: values marked CHANGE-ME, ids that are none, and files to copy or a key that are not here are refused.

    Raises
    ------
    ConfigError
        One line: the file, the key, what was expected.
    """
    from ray.autoscaler._private.util import validate_config

    content = read_yaml_mapping(path)
    try:
        # Of the file as it is written: what Ray would fill in is Ray's.
        validate_config(copy.deepcopy(content))
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        raise ConfigError(f"{path}: {f'{where}: ' if where else ''}{error.message.splitlines()[0]}") from error
    except Exception as error:
        # Ray's validator raises what its parts do.
        raise ConfigError(f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    provider = content["provider"]
    kind = provider["type"]
    if kind not in _PROVIDER_KEYS:
        raise ConfigError(f"{path}: provider.type: got {kind!r}, expected one of {', '.join(sorted(_PROVIDER_KEYS))}")
    _refuse_unknown(path, "provider", provider, _PROVIDER_KEYS[kind] | {"type"})
    for name, node in (content.get("available_node_types") or {}).items():
        _refuse_unknown(path, f"available_node_types.{name}.node_config", node.get("node_config") or {}, _NODE_KEYS[kind])
    if filled_in:
        _check_filled_in(path, content, kind)


def _check_filled_in(path: str | Path, content: Mapping[str, Any], kind: str) -> None:
    left = sorted({mark for text in texts_in(content) for mark in _TO_FILL_IN.findall(text)})
    if left:
        raise ConfigError(f"{path}: still to be filled in: {', '.join(left)}")
    if kind == "aws":
        _check_aws_ids(path, content)
    for there, here in (content.get("file_mounts") or {}).items():
        if not Path(here).expanduser().exists():
            hint = "`ray get-auth-token --generate` makes it" if there.endswith("auth_token") else "`ray up` looks for it from where it is run"
            raise ConfigError(f"{path}: file_mounts: {here}: there is no such file; {hint}")
    key = (content.get("auth") or {}).get("ssh_private_key")
    if key and not Path(key).expanduser().is_file():
        raise ConfigError(f"{path}: auth.ssh_private_key: {key}: there is no such file")


def _check_aws_ids(path: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse what a command that failed leaves of an id: nothing, or the word None."""
    for name, node in content["available_node_types"].items():
        config, where = node.get("node_config") or {}, f"available_node_types.{name}.node_config"
        if "ImageId" in config and not str(config["ImageId"]).startswith("ami-"):
            raise ConfigError(f"{path}: {where}.ImageId: got {config['ImageId']!r}, expected an id like ami-0123…")
        groups = config.get("SecurityGroupIds", ["sg-"])
        if not groups or not all(str(group).startswith("sg-") for group in groups):
            raise ConfigError(f"{path}: {where}.SecurityGroupIds: got {groups!r}, expected ids like sg-0123…")
    for text in texts_in(content):
        if found := _NO_FILE_SYSTEM.search(text):
            raise ConfigError(f"{path}: {found[0]}…: expected the id of a file system, like fs-0123…")


def _refuse_unknown(path: str | Path, where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {where}.{key}{known_keys_hint(key, known)}")


def texts_in(value: Any) -> Iterator[str]:
    """Yield every key and value of nested mappings and lists, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    else:
        yield str(value)
