"""Which errors of the packages that read storage are worth another attempt. Their classes are imitated by name."""

import asyncio
import errno
import json
import socket
import ssl

import pytest

from bitnet_lit.data import fetch as fetch_module
from bitnet_lit.data.fetch import NotThere, fetch
from bitnet_lit.data.fetch_errors import Damaged, failure, is_of_this_disk
from bitnet_lit.errors import DataError, UserError


def imitation(name, bases=(Exception,), **attributes):
    """An instance of a class of another package."""
    error = type(name, bases, {})("what it says")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def raised_while(error, other):
    """`error` as it is raised in the `except` of `other`, without `from`."""
    error.__context__ = other
    return error


def http_answer(status):
    return type("Response", (), {"status_code": status})()


HttpProcessingError = imitation("HttpProcessingError").__class__
BOTO = imitation("BotoCoreError").__class__
NO_HOST = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
FINAL = {
    "no such file": FileNotFoundError("x"),
    "no right": PermissionError("x"),
    "a folder": IsADirectoryError("x"),
    "a wrong form": ValueError("x"),
    "a wrong certificate": ssl.SSLCertVerificationError("x"),
    "a wrong option": TypeError("x"),
    "aiohttp 403": imitation("ClientResponseError", status=403),
    "gcsfs 401": imitation("HttpError", code=401),
    "gcsfs 401 as text": imitation("HttpError", code="401"),
    "gcsfs 403": OSError("Forbidden: https://storage\nno access"),
    "hub 401": imitation("HfHubHTTPError", (OSError,), response=http_answer(401)),
    "hub offline": imitation("OfflineModeIsEnabled", (ConnectionError,)),
    "s3 without credentials": imitation("NoCredentialsError", (BOTO,)),
    "s3 without a login": imitation("UnauthorizedSSOTokenError", (imitation("SSOError", (BOTO,)).__class__,)),
    "gs without credentials": imitation("DefaultCredentialsError"),
    "s3 400": OSError(errno.EINVAL, "The authorization header is malformed"),
    "s3 301": raised_from(
        OSError(errno.EIO, "x"), imitation("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 301}})
    ),
    "azure 403": imitation("HttpResponseError", status_code=403),
    "no host": raised_from(ConnectionError("x"), NO_HOST),
}
PASSING = {
    "reset": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "refused": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "aiohttp 503": imitation("ClientResponseError", status=503),
    "aiohttp 429": imitation("ClientResponseError", status=429),
    "requests cut off": raised_while(imitation("ChunkedEncodingError", (OSError,)), ValueError("invalid chunk")),
    "aiohttp's 400 for what is no HTTP": raised_from(
        imitation("ClientResponseError", status=400), imitation("BadStatusLine", (HttpProcessingError,), code=400)
    ),
    "aiohttp cut off": raised_from(
        imitation("ClientPayloadError"),
        imitation("ContentLengthError", (imitation("HttpProcessingError").__class__,), code=400),
    ),
    "gcsfs 503": imitation("HttpError", code=503),
    "hub 500": imitation("HfHubHTTPError", (OSError,), response=http_answer(500)),
    "s3 busy": OSError(errno.EBUSY, "Please reduce your request rate"),
    "s3 500 on a Mac": raised_from(
        OSError(errno.EIO, "x"), imitation("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 500}})
    ),
    "s3 role for a while": imitation("CredentialRetrievalError", (BOTO,)),
    "a name server that is busy": raised_from(OSError("x"), socket.gaierror(socket.EAI_AGAIN, "Temporary failure")),
    "a page for an answer": json.JSONDecodeError("x", "<html>", 0),
    "damaged": Damaged("x"),
}
SILENT = {
    "Python's": TimeoutError(),
    "asyncio's of 3.10": imitation("TimeoutError"),
    "fsspec's": imitation("FSTimeoutError", (asyncio.TimeoutError,)),
    "httpx's": imitation("ReadTimeout"),
    "botocore's": raised_from(OSError(errno.EIO, "x"), imitation("ReadTimeoutError")),
    "ETIMEDOUT": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
}


@pytest.mark.parametrize("error", FINAL.values(), ids=FINAL)
def test_what_cannot_get_better(error):
    found = failure(error, is_first=True)
    assert found.is_final and not found.is_silent and found.reason and not is_of_this_disk(error)


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING)
def test_what_may_pass(error):
    found = failure(error, is_first=True)
    assert not found.is_final and not found.is_silent and found.reason and not is_of_this_disk(error)


@pytest.mark.parametrize("error", SILENT.values(), ids=SILENT)
def test_what_is_silence(error):
    found = failure(error, is_first=True)
    assert found.is_silent and not found.is_final


def test_an_unknown_host_may_come_back_once_it_has_answered():
    assert failure(NO_HOST, is_first=True).is_final and not failure(NO_HOST, is_first=False).is_final


def test_the_words_are_those_of_the_server():
    assert failure(FINAL["aiohttp 403"], True).reason == "the server answers 403"
    assert failure(imitation("ClientResponseError", status=500, message="Oops"), True).reason.endswith("500 Oops")
    assert failure(FINAL["s3 301"], True).reason == "the server answers 301 [Errno 5] x"
    assert failure(FINAL["s3 without credentials"], True).remedy.startswith("set up")
    refused = imitation("ClientConnectorError", (OSError,), errno=errno.ECONNREFUSED)  # aiohttp's, with its own words
    assert failure(raised_from(refused, PASSING["refused"]), True).reason == "the server refuses the connection"
    assert failure(imitation("Empty").__class__(), True).reason == "Empty"


def test_a_full_disk_is_no_error_of_the_network():
    assert is_of_this_disk(OSError(errno.ENOSPC, "No space left on device"))


class Storage:
    """Imitates a file system of fsspec that fails as its test says."""

    def __init__(self, error, seconds=0.0):
        self.error, self.seconds, self.calls = error, seconds, 0

    def get_file(self, remote, path):
        self.calls += 1
        raise self.error


@pytest.fixture
def storage(monkeypatch):
    def made(error):
        found = Storage(error)
        monkeypatch.setattr(fetch_module, "_open_file_system", lambda url: (found, url))
        monkeypatch.setattr(fetch_module, "FIRST_PAUSE_SECONDS", 0.0)
        return found

    return made


@pytest.mark.parametrize(
    ("error", "calls", "raises"),
    [
        (FINAL["s3 without credentials"], 1, NotThere),
        (FINAL["gcsfs 401"], 1, NotThere),
        (NO_HOST, 6, DataError),
        (ConnectionResetError(), 6, DataError),
        (OSError(errno.ENOSPC, "full"), 1, OSError),
        (MemoryError(), 1, MemoryError),
    ],
    ids=str,
)
def test_how_often_a_file_is_asked_for(storage, tmp_path, error, calls, raises):
    found = storage(error)
    with pytest.raises(raises) as caught:
        fetch("s3://bucket/data00.bin", tmp_path / "x", lambda path: None)
    assert found.calls == calls and type(caught.value) is raises


def test_a_silent_server_is_given_up_after_some_silence_and_not_after_six_times_of_it(storage, tmp_path, monkeypatch):
    found = storage(TimeoutError())
    clock = iter(range(0, 10_000, 31))  # each attempt takes 31 s
    monkeypatch.setattr(fetch_module.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(DataError, match=r"no answer, given up after 31 s, 3 times in a row: is the server there\?"):
        fetch("https://host/data00.bin", tmp_path / "x", lambda path: None)
    assert found.calls == 3


def test_gcsfs_which_tries_again_itself_is_asked_twice(storage, tmp_path):
    found = storage(ConnectionResetError())
    with pytest.raises(DataError, match="2 times in a row"):
        fetch("gs://bucket/data00.bin", tmp_path / "x", lambda path: None)
    assert found.calls == 2


def test_settings_of_fsspec_are_kept(monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf, "https", {"client_kwargs": {"headers": {"Authorization": "Bearer x"}}})
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"signature_version": "s3v4"}})
    options = fetch_module._options("https")["client_kwargs"]
    assert options["headers"] == {"Authorization": "Bearer x"} and options["trust_env"] is True
    assert options["timeout"].sock_read == fetch_module.SILENCE_SECONDS
    assert fetch_module._options("s3")["config_kwargs"] == {"retries": {"max_attempts": 0}, "signature_version": "s3v4"}


def test_an_unknown_host_ends_at_once_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(NO_HOST))
    from bitnet_lit.data.shards import open_shards

    with pytest.raises(
        UserError, match=r"^data.dir=https://nowhere.invalid/a: .*check the URL, and the network"
    ) as error:
        open_shards("https://nowhere.invalid/a")
    assert "\n" not in str(error.value)
