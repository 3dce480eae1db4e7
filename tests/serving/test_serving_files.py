"""The files in `serving/` and the Dockerfile: by the real schemas; their commands are commands, their metrics exist."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from dinoexport.serving.triton import text_signature
from tests.test_docs import verbs

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "serving" / "kubernetes"
MONITORING = ROOT / "serving" / "monitoring"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# What the metrics endpoint adds where there is a GPU (Triton's docs/user_guide/metrics.md); a CPU server has none.
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def resources() -> list[dict[str, Any]]:
    """What the kustomization puts on the cluster."""
    base = KUBERNETES / "base"
    (kustomization,) = documents(base / "kustomization.yaml")
    return [document for name in kustomization["resources"] for document in documents(base / name)]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [resource for resource in resources() if resource["kind"] == kind]
    return found


def merged(base: Any, patch: Any, *, adds: frozenset[str] = frozenset()) -> Any:
    """A strategic merge: objects key by key, lists of named things by name, all else replaced.

    adds: names that the base's lists may lack.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value, adds=adds) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in each for each in patch):
        patches = {each["name"]: each for each in patch}
        added = patches.keys() - {each["name"] for each in base}
        assert added <= adds, "a patch for something that is not there"
        kept = [merged(each, patches.get(each["name"], {}), adds=adds) for each in base]
        return kept + [copy.deepcopy(patches[name]) for name in sorted(added)]
    return copy.deepcopy(patch)


def valid(resource: dict[str, Any]) -> None:
    """By Kubernetes' own schema, unknown fields refused, for the newest release and one from two years before."""
    import kubernetes_validate

    for release in ("1.31", "1.37"):
        kubernetes_validate.validate(resource, release, strict=True)


@pytest.mark.parametrize("resource", resources(), ids=lambda resource: resource["kind"])
def test_kubernetes_resources_are_valid(resource: dict[str, Any]) -> None:
    valid(resource)


def test_the_gpu_patch_fits() -> None:
    (patch,) = documents(KUBERNETES / "gpu" / "gpu.yaml")
    patched = merged(of_kind("Deployment"), patch)
    valid(patched)
    (container,) = patched["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "1"}


def test_the_text_patches_fit() -> None:
    """OpenAI's interface as a second container, and its port; its command is a command."""
    folder = KUBERNETES / "text"
    (patch,), (port,) = documents(folder / "text.yaml"), documents(folder / "port.yaml")
    adds = frozenset({"openai"})
    patched = merged(of_kind("Deployment"), patch, adds=adds)
    service = merged(of_kind("Service"), port, adds=adds)
    valid(patched)
    valid(service)
    containers = {each["name"]: each for each in patched["spec"]["template"]["spec"]["containers"]}
    assert set(containers) == {"triton", "openai"}
    program, verb, *args = containers["openai"]["command"]
    context = verbs()[verb].make_context(verb, list(args))
    assert (program, context.params["port"]) == ("dinoexport", containers["openai"]["ports"][0]["containerPort"])
    assert containers["openai"]["image"] == containers["triton"]["image"]


@pytest.mark.parametrize("folder", ["gpu", "text"])
def test_the_overlay_lies_beside_its_base(folder: str) -> None:
    """Kustomize refuses a base that contains the overlay: "cycle detected"."""
    overlay = KUBERNETES / folder
    (kustomization,) = documents(overlay / "kustomization.yaml")
    bases = [(overlay / name).resolve() for name in kustomization["resources"]]
    assert bases == [(KUBERNETES / "base").resolve()]
    assert not overlay.resolve().is_relative_to(bases[0])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders a kustomization, is not here")
@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_what_kustomize_renders_is_valid(folder: str) -> None:
    rendered = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=True)
    found = list(yaml.safe_load_all(rendered.stdout))
    assert sorted(each["kind"] for each in found) == sorted(each["kind"] for each in resources())
    for resource in found:
        valid(resource)
    (pod,) = [each["spec"]["template"]["spec"] for each in found if each["kind"] == "Deployment"]
    assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (folder == "gpu")
    assert pod["containers"][0]["image"] == "dinoexport-serve:latest"


def test_a_schema_error_would_be_seen() -> None:
    import kubernetes_validate

    wrong = merged(of_kind("Deployment"), {"spec": {"replica": 3}})
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(wrong)


def kserve_schema() -> Any:
    """The validator of KServe's own definition."""
    import jsonschema

    schema = json.loads((ROOT / "tests" / "data" / "kserve_inferenceservice.json").read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def test_kserve_takes_the_service_and_kubernetes_its_pod() -> None:
    (service,) = documents(KUBERNETES / "kserve.yaml")
    kserve_schema().validate(service)
    predictor = dict(service["spec"]["predictor"])
    # KServe's own fields of a predictor; the rest is a pod's spec.
    assert {key: predictor.pop(key) for key in ("minReplicas", "maxReplicas")} == {"minReplicas": 1, "maxReplicas": 8}
    valid({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": predictor})
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"  # what KServe looks for


def test_kserve_takes_a_repository_in_a_bucket() -> None:
    (service,) = documents(KUBERNETES / "kserve-s3.yaml")
    kserve_schema().validate(service)
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"].startswith("s3://") and model["modelFormat"] == {"name": "triton"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"spec": {"predictor": {"replicas": 3}}},
        {"spec": {"predictor": {"minReplicas": "1"}}},
        {"spec": {"predictors": {}}},
        {"apiVersion": "serving.kserve.io/v1"},
    ],
)
def test_kserve_refuses_what_it_does_not_know(wrong: dict[str, Any]) -> None:
    (service,) = documents(KUBERNETES / "kserve.yaml")
    assert not kserve_schema().is_valid(merged(service, wrong))


def test_resources_fit_together() -> None:
    deployment, service, autoscaler = of_kind("Deployment"), of_kind("Service"), of_kind("HorizontalPodAutoscaler")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == of_kind("PersistentVolumeClaim")["metadata"]["name"]
    # Nobody is cut off: endpoints are gone, then Triton finishes what it has, then the pod may be killed.
    exit_s = int(re.search(r"exit-timeout-secs=(\d+)", " ".join(container["args"]))[1])  # type: ignore[index]
    assert pod["spec"]["terminationGracePeriodSeconds"] > exit_s + int(
        container["lifecycle"]["preStop"]["exec"]["command"][1]
    )
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every dinoexport command in the serving files and the Dockerfile."""
    (kserve,) = documents(KUBERNETES / "kserve.yaml")
    for container in (
        of_kind("Deployment")["spec"]["template"]["spec"]["containers"][0],
        kserve["spec"]["predictor"]["containers"][0],
    ):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                yield probe, container[probe]["exec"]["command"]
    health = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])", DOCKERFILE, re.DOTALL)
    assert health is not None
    yield "HEALTHCHECK", json.loads(health[1])
    for line in re.findall(r"dinoexport (deploy [^&`\n]*?) &&", DOCKERFILE):
        yield "Dockerfile's comment", ["dinoexport", *shlex.split(line)]


def test_commands_are_commands() -> None:
    found = list(commands())
    assert len(found) == 3 + 1 + 1 + 1
    for where, (program, verb, *args) in found:
        assert program == "dinoexport", where
        context = verbs()[verb].make_context(verb, list(args))
        if where.endswith("Probe"):
            assert context.params["quick"] and context.params["timeout_s"] < 10  # the probe's own limit


def expressions() -> dict[str, str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    (rules,) = documents(MONITORING / "alerts.yaml")
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    alerts = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    return {name: e.replace("$__rate_interval", "5m").replace("$model", ".*") for name, e in (panels | alerts).items()}


@pytest.mark.parametrize("name", expressions())
def test_expressions_are_promql(name: str) -> None:
    promql_parser.parse(expressions()[name])


def metrics_asked_for() -> set[str]:
    (autoscaler,) = [r for r in resources() if r["kind"] == "HorizontalPodAutoscaler"]
    asked = {metric["pods"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]}
    return asked | set(re.findall(r"\bnv_\w+", " ".join(expressions().values())))


def test_the_text_model_has_the_metrics_that_are_asked_for() -> None:
    asked = set(re.findall(r"\bdinoexport_\w+", " ".join(expressions().values())))
    assert asked == {value for name, value in vars(text_signature).items() if name.startswith("METRIC_")}


def test_panels_are_laid_out() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places) and len({p["id"] for p in dashboard["panels"]}) == len(places)


def test_server_constraints_are_the_tested_versions() -> None:
    """The same packages as everywhere, but for NumPy, which Triton's Python backend needs at 1."""

    def pins(path: Path) -> dict[str, str]:
        return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)

    ours, server = pins(ROOT / "constraints.txt"), pins(ROOT / "serving" / "server-constraints.txt")
    differing = {name for name, version in server.items() if ours[name] != version}
    assert differing == {"numpy"} and server["numpy"].startswith("1.")


def test_the_dockerfile_has_its_stages() -> None:
    assert re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE) == ["wheel", "build", "test", "serve"]
    last_user = {stage: re.findall(r"^USER (\d+)", text, re.MULTILINE) for stage, text in _stages().items()}
    assert all(last_user[stage][-1] == "10001" for stage in ("build", "test", "serve"))


def _stages() -> dict[str, str]:
    parts = re.split(r"^FROM \S+ AS (\w+)", DOCKERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
