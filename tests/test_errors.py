"""No error shows what an address holds besides the place: a user, a password, a signed query."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.bundle import registry
from dinoexport.errors import DinoexportError, UsageError, without_credentials
from dinoexport.serving import address
from dinoexport.spec import silent
from dinoexport.system import store

SECRETS = st.text(string.ascii_letters + string.digits + "/@:?#%&=+!$'", min_size=1, max_size=12).map(
    lambda text: f"SEC{text}RET"
)
SCHEMES = st.sampled_from(["", "http://", "https://", "grpc://", "s3://", "webdav://", "ftp://"])
HOSTS = st.sampled_from(["host:8000", "[::1]:8000", "[::1", "host:x", "host:99999", "host/a:b", ""])


@given(SCHEMES, SECRETS, HOSTS)
def test_no_error_shows_a_password(scheme: str, secret: str, host: str) -> None:
    url = f"{scheme}user:{secret}@{host}"
    for reads in (address.parse, store.open_place, lambda ref: registry.pull(ref, "nowhere", progress=silent)):
        try:
            read = reads(url)
        except DinoexportError as error:
            shown = error.message + error.next_step + str(error)
            assert "SEC" not in shown and "RET" not in shown, shown
        else:
            assert isinstance(read, store.LocalPlace) or "SEC" not in f"{read} {read!r}"


@given(SECRETS.filter(lambda secret: "'" not in secret))
def test_no_error_shows_a_signed_query(secret: str) -> None:
    error = UsageError(f"'https://host/weights.pth?sig={secret}' is gone.", next_step="")
    assert error.message == "'https://host/weights.pth?...' is gone."


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:5000/a@sha256:abc is there", "HOST/NAME@sha256:DIGEST", "write to a@b.c", "at 12:30 a@b", "s3://b/a@c"],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert without_credentials(text) == text
