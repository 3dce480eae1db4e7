"""uv is given what pip is configured with: a mirror, a folder of wheels, constraints."""

from __future__ import annotations

from scripts import install_packages

LISTED = """
:env:.find-links='/wheels'
global.find-links='/elsewhere'
global.constraint='/etc/pip/constraints.txt'
global.index-url='https://mirror.example/simple'
global.extra-index-url='file:///a/simple https://b.example/simple'
download.index-url='https://not.example/simple'
install.trusted-host='mirror.example'
global.cert='/etc/ca.crt'
"""


def test_settings_of_pip_are_passed_on_and_the_environment_comes_first() -> None:
    found = install_packages.settings(LISTED)
    assert found["cert"] == "/etc/ca.crt"
    assert install_packages.arguments(found) == [
        "--default-index", "https://mirror.example/simple",
        "--index", "file:///a/simple", "--index", "https://b.example/simple",
        "--find-links", "/wheels",
        "--constraint", "/etc/pip/constraints.txt",
        "--allow-insecure-host", "mirror.example",
        "--index-strategy", "unsafe-best-match",
    ]  # fmt: skip


def test_without_settings_and_without_an_index() -> None:
    assert install_packages.arguments({}) == ["--index-strategy", "unsafe-best-match"]
    assert "--no-index" in install_packages.arguments(install_packages.settings(":env:.no-index='1'"))
    assert "--no-index" not in install_packages.arguments({"no-index": "false"})
