"""A registry that asks for a password gets it with every further request, beside what a request says already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinoexport.bundle import registry

pytest.importorskip("oras")


def asked(challenge: str) -> Any:
    return SimpleNamespace(headers={"Www-Authenticate": challenge} if challenge else {})


@pytest.mark.parametrize("challenge", ["Basic realm=x", "basic"])
@pytest.mark.parametrize("headers", [None, {}, {"Accept": "a"}])
def test_a_password_that_is_known_is_sent(challenge: str, headers: dict[str, str] | None) -> None:
    auth = registry._registry(False).auth
    auth.set_basic_auth("user", "password")
    given, again = auth.authenticate_request(asked(challenge), headers)
    assert again and given == {**(headers or {}), "Authorization": "Basic dXNlcjpwYXNzd29yZA=="}
    assert auth.session.headers["Authorization"] == given["Authorization"], "for all further requests"


def test_a_password_that_is_not_known_is_not_made_up() -> None:
    auth = registry._registry(False).auth
    assert auth.authenticate_request(asked("Basic"), {"Accept": "a"}) == ({"Accept": "a"}, False)
    assert "Authorization" not in auth.session.headers
