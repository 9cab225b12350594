from pathlib import Path

import pytest

from sentinode.errors import ConfigError
from sentinode.locations import locate
from serve.auth import is_known_key, key_digest, new_key, offered_key, resolve_key_digests


def test_a_new_key_is_admitted_by_its_line(tmp_path: Path) -> None:
    key, line = new_key("pathology-app")
    keys_file = tmp_path / "keys"
    keys_file.write_text(f"# who: line\n\n{line}\n")
    digests = resolve_key_digests(str(keys_file), {})
    assert line.startswith("pathology-app:")
    assert key not in line
    assert is_known_key(key, digests)
    assert not is_known_key(key + "x", digests)
    assert new_key("a")[0] != new_key("a")[0]


def test_keys_of_the_environment_and_of_the_file_are_both_admitted(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys"
    keys_file.write_text(f"one:{key_digest('from-file')}\n")
    digests = resolve_key_digests(str(keys_file), {"SENTINODE_API_KEYS": " first ,second,, first"})
    assert len(digests) == 3
    assert all(is_known_key(key, digests) for key in ("first", "second", "from-file"))
    assert not is_known_key("", digests)
    assert not any("first" in digest or "second" in digest for digest in digests)


@pytest.mark.parametrize("value", ["", " , ,"])
def test_without_any_key_the_error_says_how_to_make_one(value: str) -> None:
    with pytest.raises(ConfigError, match="sentinode serve --new-key NAME"):
        resolve_key_digests(None, {"SENTINODE_API_KEYS": value})


@pytest.mark.parametrize("line", ["secret-plain-key", "name:short", "na me:" + "0" * 64, "name:" + "G" * 64, "name:" + "A" * 64])
def test_a_wrong_line_is_named_by_number_and_not_quoted(tmp_path: Path, line: str) -> None:
    keys_file = tmp_path / "keys"
    keys_file.write_text(f"# comment\n{line}\n")
    with pytest.raises(ConfigError, match="line 2: expected name:sha256") as caught:
        resolve_key_digests(str(keys_file), {})
    assert line not in str(caught.value)


def test_a_missing_keys_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_keys_file .*none: cannot be read \(No such file"):
        resolve_key_digests(str(tmp_path / "none"), {"SENTINODE_API_KEYS": "k"})


def test_a_key_name_that_would_break_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="key name"):
        new_key("a:b")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"X-API-Key", b"k")], "k"),
        ([(b"authorization", b"Bearer k")], "k"),
        ([(b"authorization", b"bearer  k ")], "k"),
        ([(b"x-api-key", b"a"), (b"authorization", b"Bearer b")], "a"),
        ([(b"authorization", b"Basic k")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"x-api-key", b"")], None),
        ([], None),
    ],
)
def test_the_offered_key(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    assert offered_key(headers) == key


def test_a_keys_file_may_lie_in_an_object_store(s3_folder: str) -> None:
    _, line = new_key("viewer")
    (locate(s3_folder) / "api_keys").write_bytes(f"{line}\n".encode())
    assert resolve_key_digests(f"{s3_folder}/api_keys", {}) == (line.partition(":")[2],)
    with pytest.raises(ConfigError, match=rf"api_keys_file {s3_folder}/none: cannot be read \(No such file or directory\)"):
        resolve_key_digests(f"{s3_folder}/none", {})
