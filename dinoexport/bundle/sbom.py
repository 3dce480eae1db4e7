"""`sbom.cdx.json`: what a bundle was made of, as a CycloneDX bill of materials that any scanner reads.

The checkpoint, every file of the bundle with its hash, and the packages that made it. The same build gives the same
bytes: no date, and a serial number that is derived from the content.
"""

from __future__ import annotations

import hashlib
import json
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from dinoexport.bundle import Manifest
from dinoexport.errors import require

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

PACKAGES = ("cyclonedx",)
# A longer `License` field holds the text of the licence, not its name.
_LICENCE_NAME_MAX = 64


def of(manifest: Manifest) -> str:
    """The bill of materials of the bundle that `manifest` describes, CycloneDX 1.6 as JSON."""
    require("export", *PACKAGES)
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    product = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=manifest.variant,
        bom_ref="bundle",
        description=f"{manifest.family}, {manifest.precision}, for {manifest.target}; {manifest.verdict}",
        licenses=_licences(manifest.checkpoint.licence),
    )
    parts = [_checkpoint(manifest), *_files(manifest)]
    packages = [_package(name, version) for name, version in manifest.versions.items() if version[0].isdigit()]
    tools = ToolRepository(components=[package for package in packages if package.name == "dinoexport"])
    bom = Bom(metadata=BomMetaData(component=product, tools=tools), components=[*parts, *packages])
    bom.register_dependency(product, [*parts, *packages])
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library dates every bill and numbers it at random; the schema asks for neither.
    del content["metadata"]["timestamp"], content["serialNumber"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"serialNumber": uuid5(NAMESPACE_URL, digest).urn, **content}, indent=1, sort_keys=True) + "\n"


def _checkpoint(manifest: Manifest) -> Component:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
    from cyclonedx.model.component import Component, ComponentType

    found = manifest.checkpoint
    synthetic = found.source.startswith("synthetic")
    published = [] if not found.source.startswith("http") else [
        ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(found.source))
    ]  # fmt: skip
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=f"{manifest.variant} checkpoint",
        bom_ref="checkpoint",
        description=f"{found.source}{', synthetic; the hash is that of the rule' if synthetic else ''}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=found.sha256)],
        licenses=[] if synthetic else _licences(found.licence),
        external_references=published,
    )


def _files(manifest: Manifest) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            type=ComponentType.FILE,
            name=file.name,
            bom_ref=f"file:{file.name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
            properties=[
                Property(name="dinoexport:stage", value=file.stage),
                Property(name="dinoexport:size_bytes", value=str(file.size_bytes)),
            ],
        )
        for file in manifest.files
    ]


def _package(name: str, version: str) -> Component:
    """A package that built the bundle. It does not run with the bundle, so its scope is CycloneDX's `excluded`."""
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from packageurl import PackageURL

    if name == "python":
        kind, purl = ComponentType.PLATFORM, PackageURL("generic", None, name, version)
    else:
        kind, purl = ComponentType.LIBRARY, PackageURL("pypi", None, name.lower().replace("_", "-"), version)
    return Component(
        type=kind,
        name=name,
        version=version,
        bom_ref=f"package:{name}",
        purl=purl,
        scope=ComponentScope.EXCLUDED,
        licenses=_licences(_licence_of(name)),
    )


def _licence_of(package: str) -> str:
    """An installed package's licence as its metadata name it; empty if they name none or hold the whole text."""
    try:
        found: Message = metadata(package)  # type: ignore[assignment]  # typeshed's protocol lacks `get`
    except PackageNotFoundError:
        return "PSF-2.0" if package == "python" else ""
    if expression := found.get("License-Expression"):
        return str(expression)
    named = str(found.get("License") or "").strip()
    if named and len(named) <= _LICENCE_NAME_MAX and "\n" not in named:
        return named
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier", []) if c.startswith("License ::")]
    return " and ".join(classified)


def _licences(words: str) -> list[License]:
    """The licence by its SPDX name if it has one, else in the words given."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(words)] if words else []
