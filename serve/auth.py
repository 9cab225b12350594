"""API keys. Only their SHA-256 is stored, compared or sent to replicas; a key itself stays with whoever calls."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping

from sentinode.errors import ConfigError, StorageError
from sentinode.locations import Location, locate

KEYS_VARIABLE = "SENTINODE_API_KEYS"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def key_digest(key: str) -> str:
    """Return the SHA-256 of a key, 64 hex digits: what is stored in place of it."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """Make a key.

    Parameters
    ----------
    name : str
        Whose it is, for the reader of the keys file: 1 to 64 of A-Z a-z 0-9 . _ -

    Returns
    -------
    key : str
        256 random bits; shown once, to be sent as `X-API-Key`.
    line : str
        `name:sha256`, the line of the keys file that admits it.

    Raises
    ------
    ConfigError
        The name has other characters.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -")
    key = "sn_" + secrets.token_urlsafe(32)
    return key, f"{name}:{key_digest(key)}"


def resolve_key_digests(keys_file: str | None, environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the digests of all configured keys: those of SENTINODE_API_KEYS (plain, comma-separated) and those of the keys file.

    Raises
    ------
    ConfigError
        The file cannot be read or has a wrong line, or no key is configured at all.
    """
    environment = os.environ if environment is None else environment
    plain = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    digests = [key_digest(key) for key in plain if key]
    if keys_file is not None:
        digests += _read_keys_file(locate(keys_file))
    if not digests:
        raise ConfigError(
            "auth: keys needs at least one API key and none is configured; make one with `sentinode serve --new-key NAME`, "
            f"put its line into api_keys_file or the key itself into {KEYS_VARIABLE} (or set auth: none where only trusted callers reach the port)"
        )
    return tuple(dict.fromkeys(digests))


def _read_keys_file(path: Location) -> list[str]:
    try:
        lines = path.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError, StorageError) as error:
        raise ConfigError(f"api_keys_file {path}: cannot be read ({_why(error)})") from error
    digests = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, digest = text.partition(":")
        # The line is not quoted: it may hold a plain key that was pasted there by mistake.
        if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
            raise ConfigError(f"api_keys_file {path}, line {number}: expected name:sha256 with 64 lower-case hex digits, or # comment")
        digests.append(digest)
    return digests


def _why(error: Exception) -> str:
    return "not text" if isinstance(error, UnicodeDecodeError) else str(getattr(error, "strerror", None) or error)


def is_known_key(key: str, digests: Iterable[str]) -> bool:
    """Tell whether a key is one of those admitted. Compares with every digest, so that time tells nothing about which one matched."""
    offered = key_digest(key)
    known = False
    for digest in digests:
        known |= hmac.compare_digest(offered, digest)
    return known


def offered_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the key a request offers, from `X-API-Key` or `Authorization: Bearer`; None where it offers none."""
    fields = {name.lower(): value.decode("latin-1").strip() for name, value in headers}
    if key := fields.get(b"x-api-key"):
        return key
    scheme, _, token = fields.get(b"authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
