"""Stages `page` and `sbom`: the verdict as a web page, and the bill of materials."""

from __future__ import annotations

from pathlib import Path

from dinoexport import bundle, family
from dinoexport.bundle import Manifest, sbom
from dinoexport.bundle.reference_file import Reference
from dinoexport.pipeline.request import BuildRequest
from dinoexport.pipeline.stages.judge import Judged
from dinoexport.pipeline.versions import versions_of
from dinoexport.pipeline.workspace import Stage, Workspace, key_of
from dinoexport.report import html_report
from dinoexport.system import files
from dinoexport.validation.error_analysis import Growth


def render_report(
    work: Workspace,
    request: BuildRequest,
    manifest: Manifest,
    reference: Reference,
    judged: Judged,
    growth: Growth | None,
) -> Stage:
    """The report as `report.html`, from everything in the manifest except the time."""

    def make(folder: Path) -> None:
        html = html_report.render(manifest, request.model, judged.report, growth, reference, judged.kept)
        (folder / bundle.REPORT_HTML).write_text(html, encoding="utf-8")

    key = key_of(
        code=family.code_of(request.model),
        template=files.sha256(html_report.TEMPLATE),
        manifest=manifest.model_dump(mode="json", exclude={"created"}),
        versions=versions_of((*html_report.PACKAGES, "pillow")),
    )
    return work.stage("page", key, make)


def list_materials(work: Workspace, manifest: Manifest) -> Stage:
    """The bill of materials of the bundle that `manifest` describes. It is the last stage: it lists all other files."""
    content = sbom.of(manifest)

    def make(folder: Path) -> None:
        (folder / bundle.SBOM).write_text(content, encoding="utf-8")

    return work.stage("sbom", key_of(content=content), make)
