"""No error shows what an address holds besides the place: a user, a password, a signed query."""

from __future__ import annotations

import string
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport import errors
from dinoexport.bundle import registry
from dinoexport.errors import DinoexportError, MissingRequirement, UsageError, require, without_credentials
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
    ("text", "shown"),
    [
        ("https://user:pw@host/a is gone", "https://...@host/a is gone"),
        ("user:pw@host:80 is gone", "...@host:80 is gone"),
        ("https://host/a?sig=1 and s3://b/c?d", "https://host/a?... and s3://b/c?..."),
    ],
)
def test_the_place_is_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_exit_codes() -> None:
    """As docs/troubleshooting.md lists them."""
    codes = {kind.__name__: kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert codes == {
        "DinoexportError": 5, "ValidationFailed": 1, "UsageError": 2, "InputRefused": 2, "OutsideProfile": 2,
        "WeightsError": 3, "MissingRequirement": 4, "BuildError": 5,
    }  # fmt: skip


def test_a_package_that_is_disabled_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import` fails where sys.modules holds something without a specification."""
    monkeypatch.setitem(sys.modules, "disabled_package", ModuleType("disabled_package"))
    require("export", "sys", "os")
    with pytest.raises(MissingRequirement, match="disabled_package is not installed, and this step needs it") as caught:
        require("export", "sys", "disabled_package")
    assert caught.value.next_step == "pip install 'dinoexport[export]'"


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:5000/a@sha256:abc is there", "HOST/NAME@sha256:DIGEST", "write to a@b.c", "at 12:30 a@b", "s3://b/a@c"],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert without_credentials(text) == text
