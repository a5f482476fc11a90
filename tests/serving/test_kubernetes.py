"""The Kubernetes manifests of the examples: by Kubernetes' own schemas, and against what the server is."""

import re
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI

from lora_lightning.app.arguments import parser_of
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.routes import Manners, add_routes
from lora_lightning.serving.server import OPEN, TOKEN

EXAMPLES = Path(__file__).parents[2] / "examples"
MANIFESTS = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / "serving.yaml").read_text()))
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS}


def test_they_are_what_kubernetes_takes() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for manifest in MANIFESTS:
        schemas.validate(manifest, "1.33", strict=True)
    broken = {**KINDS["Service"], "spec": {"ports": [{"port": "80"}]}}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(broken, "1.33", strict=True)


def test_they_fit_each_other_and_the_server() -> None:
    deployment = KINDS["Deployment"]["spec"]
    pod, (container,) = deployment["template"]["spec"], deployment["template"]["spec"]["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    assert len(KINDS) == len(MANIFESTS) and deployment["selector"]["matchLabels"] == labels
    assert KINDS["Service"]["spec"]["selector"] == labels
    for kind, at in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert KINDS[kind]["spec"][at]["matchLabels"] == labels
    scaled = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert scaled["name"] == KINDS["Deployment"]["metadata"]["name"]
    entry = re.search(r"ENTRYPOINT (\[.*\])", (EXAMPLES / "Dockerfile").read_text())[1]
    program, command, *words = yaml.safe_load(entry)
    read, strays, problems = parser_of(command).read([*words, *container["args"]])
    given = vars(read)
    assert program == "lora-lightning" and not strays and (given["host"], given["port"]) == ("0.0.0.0", 8000)
    assert all("/shelf" in problem for problem in problems)  # which is not on this machine
    (port,) = container["ports"]
    assert port["containerPort"] == given["port"]
    named = [KINDS["Service"]["spec"]["ports"][0]["targetPort"]]
    named += [
        container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    ]
    named += [KINDS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"]]
    assert {*named} == {port["name"]}
    app = FastAPI()
    add_routes(app, None, Catalog(), Manners(), lambda: True)
    probed = {container[p]["httpGet"]["path"] for p in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probed <= {route.path for route in app.routes} and probed <= {*OPEN}  # which bring no token
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= given["timeout"] + wait + 10
    assert TOKEN in {variable["name"] for variable in container["env"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]} and mounted["shelf"] == "/shelf"
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {KINDS["PersistentVolumeClaim"]["metadata"]["name"]}
