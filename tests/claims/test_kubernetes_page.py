"""The Kubernetes example of `docs/scaling.md` holds together: its pods find each other by the names it uses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).parents[2] / "docs/scaling.md"


def documents() -> dict[str, Any]:
    """What the page's one YAML example would create, by kind."""
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return {document["kind"]: document for document in yaml.safe_load_all(example)}


def test_the_headless_service_is_the_one_that_pods_and_rendezvous_name() -> None:
    """The Service selects the Job's pods, has the name of their subdomain, and the first of them is the endpoint."""
    service, job = documents()["Service"], documents()["Job"]
    pod = job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}, "the label that a Job gives its pods"
    assert service["metadata"]["name"] == pod["subdomain"]
    (command,) = pod["containers"][0]["args"]
    assert f"--rdzv-endpoint {name}-0.{pod['subdomain']}:29500 " in command
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(re.findall(r"--nnodes (\d+)", command)[0])


def test_what_is_mounted_is_there() -> None:
    """Every mount has its volume, and every path that the command names lies in one that all pods share."""
    pod = documents()["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    paths = re.findall(r" (/\S+)", container["args"][0]) + [variable["value"] for variable in container["env"]]
    assert len(paths) == 3 and all(path.startswith(mounts["shared"] + "/") for path in paths)
