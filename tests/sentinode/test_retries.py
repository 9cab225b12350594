"""How long a store is tried that cannot be reached at all."""

import time

import pytest
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from sentinode import retries
from sentinode.errors import StorageError
from sentinode.locations import locate
from sentinode.retries import await_first_contact, try_store
from tests import s3

PATIENCE_S, FIRST_S = 6.0, 0.2


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_STORAGE_PATIENCE_S", str(PATIENCE_S))
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", FIRST_S)
    # Also put back what a test sets by calling.
    monkeypatch.setattr(retries, "_reached_a_store", True)


def seconds_until_given_up(error: Exception) -> float:
    def fail() -> None:
        raise error

    began = time.monotonic()
    with pytest.raises(StorageError, match="s3://bucket/a: the storage does not answer"):
        try_store("s3://bucket/a", fail)
    return time.monotonic() - began


NOBODY = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


def test_a_command_gives_up_soon_on_a_store_that_nobody_ever_reached() -> None:
    await_first_contact()
    assert seconds_until_given_up(NOBODY) < PATIENCE_S / 3


def test_a_store_that_has_answered_once_keeps_the_whole_patience() -> None:
    await_first_contact()
    assert try_store("s3://bucket/a", lambda: 1) == 1
    assert seconds_until_given_up(NOBODY) > PATIENCE_S / 3


def test_an_answer_that_is_an_error_is_an_answer() -> None:
    await_first_contact()
    assert seconds_until_given_up(ReadTimeoutError(endpoint_url="http://h")) > PATIENCE_S / 3


def test_a_process_that_is_no_command_keeps_the_whole_patience() -> None:
    assert seconds_until_given_up(NOBODY) > PATIENCE_S / 3


def test_the_clients_name_it_as_expected(s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid:9000"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        await_first_contact()
        began = time.monotonic()
        with s3.fresh_clients(), pytest.raises(StorageError, match="does not answer"):
            locate("s3://bucket/a").read_bytes()
        assert time.monotonic() - began < PATIENCE_S, endpoint
        assert retries._reached_a_store is False
