"""deploy/ against published schemas: compose-spec's, Kubernetes's; RayCluster by its pod templates.

Nothing of deploy/ is started here: there is neither Docker nor Kubernetes in CI.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from flows.commands import entrypoints
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.37.0"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


@cache
def pod_template() -> dict[str, Any]:
    """Kubernetes' schema of a pod template, strict: unknown fields are wrong."""
    place = files("kubernetes_validate") / "kubernetes-json-schema"
    folder = f"v{KUBERNETES}-local-strict"
    definitions = json.loads((place / folder / "_definitions.json").read_text())["$defs"]
    return {"$ref": "#/$defs/io.k8s.api.core.v1.PodTemplateSpec", "$defs": definitions}


def test_compose_is_what_compose_takes() -> None:
    schema = json.loads((DEPLOY / "schemas" / "compose-spec.json").read_text())
    checker = jsonschema.Draft7Validator(schema)
    assert [error.message for error in checker.iter_errors(compose())] == []
    # The schema can say no.
    wrong = compose()
    wrong["services"]["worker"]["comand"] = ["x"]
    assert list(checker.iter_errors(wrong))


def test_compose_hangs_together() -> None:
    services, volumes = compose()["services"], compose()["volumes"]
    assert {"postgres", "server", "worker", "s3"} <= services.keys()
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= services.keys(), name
        named = {mount.split(":")[0] for mount in service.get("volumes", [])}
        assert named <= volumes.keys(), name
        # Nothing of it is open to other machines, and no image is `latest`.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert ":" in service["image"], name
        assert "latest" not in service["image"], name
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|AUTH|ACCESS_KEY", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, variable)
    example = (DEPLOY / ".env.example").read_text()
    asked = set(re.findall(r"\$\{(\w+):", (DEPLOY / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def test_worker_manifests_are_what_kubernetes_takes() -> None:
    found = manifests("worker.yaml")
    assert [one["kind"] for one in found] == [
        "Namespace", "PersistentVolumeClaim", "ServiceAccount", "Role", "RoleBinding", "Deployment",
    ]  # fmt: skip
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    wrong = manifests("worker.yaml")[-1]
    wrong["spec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def filled(value: Any, variables: dict[str, Any]) -> Any:
    """A template as Prefect fills it: a whole string takes the variable's own type."""
    if isinstance(value, dict):
        return {key: filled(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, variables) for inner in value]
    if isinstance(value, str) and (whole := re.fullmatch(r"\{\{ (\w+) \}\}", value)):
        return variables[whole[1]]
    if isinstance(value, str):
        return re.sub(r"\{\{ (\w+) \}\}", lambda found: str(variables[found[1]]), value)
    return value


def test_the_work_pool_makes_jobs_that_kubernetes_takes() -> None:
    template = json.loads((DEPLOY / "kubernetes" / "work-pool.json").read_text())
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    given = template["variables"]["properties"]
    values = {name: one.get("default") for name, one in given.items()}
    # What Prefect's worker puts in: a command is a list by then.
    values |= {"name": "run", "command": ["prefect", "flow-run", "execute"]}
    job = filled(template["job_configuration"], values)["job_manifest"]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    # And what prefect.yaml asks of it, it knows.
    asked = yaml.safe_load((ROOT / "prefect.yaml").read_text())["definitions"]["kubernetes"]
    assert asked["job_variables"].keys() <= given.keys()
    job = filled(template["job_configuration"], values | asked["job_variables"])["job_manifest"]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_ray_cluster_is_made_of_pods_that_kubernetes_takes() -> None:
    """Structure by hand, pods by Kubernetes' schema: KubeRay's own is a megabyte of the same."""
    cluster, policy = manifests("raycluster.yaml")
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert labels == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec.keys() <= {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    }  # fmt: skip
    assert spec["headGroupSpec"].keys() == {"serviceType", "rayStartParams", "template"}
    (group,) = spec["workerGroupSpecs"]
    assert group.keys() == {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
    }  # fmt: skip
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    checker = jsonschema.Draft202012Validator(pod_template())
    for part in (spec["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        assert [error.message for error in checker.iter_errors(part["template"])] == []
    assert list(checker.iter_errors({"spec": {"containers": [{"nam": "x"}]}}))


def test_pods_that_write_to_the_shared_volume_may() -> None:
    """They run as the image's user, and the volume is given to its group."""
    user = int(dockerfile_lines("useradd")[0].partition("--uid ")[2].split()[0])
    cluster = manifests("raycluster.yaml")[0]["spec"]
    template = json.loads((DEPLOY / "kubernetes" / "work-pool.json").read_text())
    job = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    for spec in (job, cluster["workerGroupSpecs"][0]["template"]["spec"]):
        assert spec["volumes"]
        assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["fsGroup"]) == (
            user, user,
        )  # fmt: skip


def dockerfile_lines(word: str) -> list[str]:
    """Instructions, whole, that hold a word; comments apart."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [one for one in "\n".join(lines).replace("\\\n", " ").splitlines() if word in one]
    assert found, word
    return found


def test_the_image_has_what_its_users_ask_of_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    installed = re.findall(r"-e '\.\[([\w,]+)\]'", dockerfile_lines("pip install")[-1])
    assert set(installed[0].split(",")) == {"ray", "s3"} <= extras.keys()
    # What compose mounts there belongs to the worker, for an empty volume takes the folder's owner.
    (mount,) = compose()["services"]["worker"]["volumes"]
    folder = mount.partition(":")[2]
    made = dockerfile_lines("useradd")[0]
    assert f"mkdir {folder} " in made
    assert re.search(rf"chown -R worker .*{folder}$", made)


def test_no_password_gets_into_the_image() -> None:
    """Nor into git; and the image holds nothing that git leaves out."""
    left_out = [
        line.removeprefix("**/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert left_out[0] == "deploy/.env"
    assert set((ROOT / ".gitignore").read_text().split()) == set(left_out)


def test_settings_of_prefect_are_known_to_it() -> None:
    from prefect import settings

    texts = [path.read_text() for path in DEPLOY.rglob("*.*") if path.suffix in (".yaml", ".json")]
    named = set(re.findall(r"\bPREFECT_[A-Z_]+\b", "".join(texts)))
    assert len(named) >= 6
    asked_of_people = set(re.findall(r"\$\{(\w+):", "".join(texts)))
    assert [name for name in named - asked_of_people if not hasattr(settings, name)] == []
    assert not hasattr(settings, "PREFECT_AUTH")


def images() -> Iterator[tuple[Path, str]]:
    """Every image of the project's own that a file of deploy/, or prefect.yaml, names."""
    for path in (*DEPLOY.rglob("*.*"), ROOT / "prefect.yaml"):
        if path.suffix in (".yaml", ".json"):
            yield from (
                (path, tag) for tag in re.findall(r"rl-decoder:([\w.-]+)", path.read_text())
            )


def test_versions_are_the_projects_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tags = set(images())
    assert len(tags) >= 4
    assert {tag for _, tag in tags} == {project["version"]}
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )  # fmt: skip
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "kubernetes/worker.yaml").read_text()
    assert set(re.findall(r"prefecthq/prefect:([\d.]+)-", text)) == {pins["prefect"]}
    if "ray" in pins:
        assert manifests("raycluster.yaml")[0]["spec"]["rayVersion"] == pins["ray"]
    assert f"torch=={pins['torch'].split('+')[0]}" in (DEPLOY / "Dockerfile").read_text()


def test_pools_of_a_shared_server_stand_ready() -> None:
    project = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    pools = project["definitions"]
    assert [pools[name]["name"] for name in ("pool", "docker", "kubernetes")] == [
        "local", "docker", "kubernetes",
    ]  # fmt: skip
    assert {one["work_pool"]["name"] for one in project["deployments"]} == {"local"}
    assert entrypoints()
    # What compose calls its volume and network, after the project's name.
    name = compose()["name"]
    asked = pools["docker"]["job_variables"]
    assert asked["networks"] == [f"{name}_default"]
    assert asked["volumes"] == [f"{name}_cache:/cache"]
