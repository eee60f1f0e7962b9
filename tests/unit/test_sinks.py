"""Which sinks and credentials are accepted; no credential shows in a repr or an error."""

import traceback

import pytest

from controlplane.sinks import SinkError, check_sink, read_credential

TOKEN = (
    '{"credentialType":"ACCESSTOKEN","accessToken":"s3cr3t","accessTokenType":"bearer",'
    '"accessTokenExpiresUtc":"2023-07-03T12:27:08.312Z"}'
)


@pytest.mark.parametrize(
    "uri",
    [
        "https://application-server.com/notifications",
        "https://192.0.2.7:8443/n?session=%20a",
        "https://[fd00:45::1]:443",
        "https://host/" + "a" * (2048 - len("https://host/")),
    ],
)
def test_a_sink_is_an_https_uri(uri: str) -> None:
    check_sink(uri, None, allow_http=False)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://",
        "https:host/",
        "http://host/",
        "HTTPS://host/",
        "ftp://host/",
        "file:///etc/passwd",
        "https://user@host/",
        "https://user:password@host/",
        "https://host@evil/",
        "https://@host/",
        "https://host/#fragment",
        "https://host/\r\nx: y",
        "https://host/\n",
        "https://ho st/",
        "https://höst/",
        "https://host/%zz",
        "https://host:0/",
        "https://host:65536/",
        "https://[::zz]/",
        "https://256.1.1.1/",
        "https://host/" + "a" * (2049 - len("https://host/")),
    ],
)
def test_nothing_else_is_a_sink(uri: str) -> None:
    with pytest.raises(SinkError) as caught:
        check_sink(uri, None, allow_http=False)
    assert caught.value.code == "INVALID_SINK"


def test_a_testbed_may_allow_http_and_nothing_more() -> None:
    check_sink("http://10.0.0.1:9000/n", None, allow_http=True)
    with pytest.raises(SinkError):
        check_sink("ftp://10.0.0.1/", None, allow_http=True)


def test_a_credential_is_read_and_shown_to_nobody() -> None:
    credential = read_credential(TOKEN)
    assert credential.credential_type == "ACCESSTOKEN"
    assert credential.access_token == "s3cr3t"
    assert "s3cr3t" not in f"{credential!r} {credential}"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ACCESSTOKEN", "PLAIN", "INVALID_CREDENTIAL"),
        ('"credentialType":"ACCESSTOKEN",', "", "INVALID_CREDENTIAL"),
        ('"ACCESSTOKEN"', "[1]", "INVALID_CREDENTIAL"),
        ("bearer", "mac", "INVALID_TOKEN"),
        ('"accessTokenType":"bearer",', "", "INVALID_TOKEN"),
        ("s3cr3t", "s3cr3t\\r\\nx: y", "INVALID_ARGUMENT"),
        ("s3cr3t", "s3cr3t" * 1000, "INVALID_ARGUMENT"),
        ("2023-07-03T12:27:08.312Z", "2023-07-03T12:27:08.312", "INVALID_ARGUMENT"),
        ("2023-07-03T12:27:08.312Z", "1688387228", "INVALID_ARGUMENT"),
        ('"bearer"', '"bearer","more":1', "INVALID_ARGUMENT"),
        (TOKEN, '"s3cr3t"', "INVALID_CREDENTIAL"),
        (TOKEN, TOKEN[:-1], "INVALID_CREDENTIAL"),
    ],
)
def test_a_bad_credential_is_refused_without_being_quoted(old: str, new: str, code: str) -> None:
    with pytest.raises(SinkError) as caught:
        read_credential(TOKEN.replace(old, new))
    assert caught.value.code == code
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


def test_private_key_jwt_needs_to_know_where_to_ask() -> None:
    bare = read_credential('{"credentialType":"PRIVATE_KEY_JWT"}')
    with pytest.raises(SinkError) as caught:
        check_sink("https://host/", bare, allow_http=False)
    assert caught.value.code == "PRIVATE_KEY_JWT_NOT_CONFIGURED"
    start = '{"credentialType":"PRIVATE_KEY_JWT","clientId":"c","tokenUri":'
    check_sink("https://host/", read_credential(start + '"https://as/token"}'), allow_http=False)
    with pytest.raises(SinkError) as caught:
        over_http = read_credential(start + '"http://as/token"}')
        check_sink("https://host/", over_http, allow_http=False)
    assert caught.value.code == "INVALID_CREDENTIAL"
