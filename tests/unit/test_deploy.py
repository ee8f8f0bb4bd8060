"""What is in deploy/ and .github/: checked as far as that is possible without Docker, a cluster or GitHub."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ruamel.yaml import YAML

from vllm_adrenaline import cli
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import keys

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.32"
BIN = Path(sys.executable).parent
LLM_D = """
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {role}}}
spec:
  selector: {{matchLabels: {{a: {role}}}}}
  template:
    metadata: {{labels: {{a: {role}}}}}
    spec:
      containers:
        - name: modelserver
          image: vllm-adrenaline
          command: [vllm, serve]
          args: [model, "--port=8200"]
          env: [{{name: A, value: b}}]
          volumeMounts: [{{name: shm, mountPath: /dev/shm}}]
      volumes: [{{name: shm, emptyDir: {{medium: Memory}}}}]
"""
"""A Deployment in the form of llm-d's guide (guides/pd-disaggregation/modelserver, November 2026), where the component
leans on it."""


def built(folder: Path) -> list[dict[str, Any]]:
    """Return what kustomize makes of a folder, each valid for Kubernetes."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl builds the manifests, and is not here")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    for each in found:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    return found


def options(words: list[str]) -> Options:
    """Return the plugin's options among the words of a command line, checked as an engine would."""
    line = " ".join(words)
    assert "--plugin=adrenaline" in line or "--plugin adrenaline" in line
    given = dict(re.findall(r"--adrenaline-([a-z-]+)[= ](\S+)", line))
    return Options.parse({name.replace("-", "_"): value for name, value in given.items()})


def accepted_by_the_command(words: list[str]) -> bool:
    """Return whether `adrenaline` takes these words."""
    return bool(cli.make_parser(words).parse_args(words))


def containers(made: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Return the containers of a Deployment by name."""
    (pod,) = [
        each["spec"]["template"]["spec"]
        for each in made
        if each["metadata"]["name"] == name and "template" in each["spec"]
    ]
    return {each["name"]: each for each in pod["containers"]}


def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_built_of_the_versions_that_the_tests_run() -> None:
    setup = (ROOT / "tools" / "setup_env.py").read_text()
    (torch,) = re.findall(r'TORCH = "(.*)"', setup)
    assert torch in (DEPLOY / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("compose-spec", "deploy/compose.yaml"),
        ("github-workflows", ".github/workflows/ci.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/idea.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_of_others_formats_are_as_their_schemas_say(schema: str, file: str) -> None:
    """The schemas are those of check-jsonschema."""
    known = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{schema}.json"
    text = YAML(typ="safe").load(ROOT / file)  # of YAML 1.2, in which `on` is a word and 0400 a number
    jsonschema.validate(text, json.loads(known.read_text()))


def test_the_containers_of_compose_share_what_engines_need_and_have_flags_that_are_taken() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {services["decode"][kind] for kind in ("pid", "ipc", "network_mode")} == {"service:prefill"}
    engines = {
        role: options([*services[role]["entrypoint"], *services[role]["command"]]) for role in ("prefill", "decode")
    }
    assert engines["decode"].peer_addresses == [engines["prefill"].listen_address]
    assert accepted_by_the_command(services["proxy"]["command"])


def test_the_containers_of_a_pod_share_what_engines_need_and_have_flags_that_are_taken() -> None:
    made = built(DEPLOY / "kubernetes" / "one-pod")
    (pod,) = [each["spec"]["template"]["spec"] for each in made if each["kind"] == "Deployment"]
    assert pod["shareProcessNamespace"]
    memory = {each["name"] for each in pod["volumes"] if each.get("emptyDir", {}).get("medium") == "Memory"}
    found = containers(made, "adrenaline")
    for role in ("prefill", "decode"):
        at = {mount["mountPath"]: mount["name"] for mount in found[role]["volumeMounts"]}
        assert {at["/dev/shm"], at["/run/adrenaline"]} <= memory
        assert found[role]["startupProbe"]["periodSeconds"] * found[role]["startupProbe"]["failureThreshold"] >= 3600
        for probe in ("startupProbe", "livenessProbe"):
            assert accepted_by_the_command(found[role][probe]["exec"]["command"][1:])
    engines = {role: options(found[role]["args"]) for role in ("prefill", "decode")}
    assert engines["decode"].peer_addresses == [engines["prefill"].listen_address]
    assert accepted_by_the_command([*found["proxy"]["command"][1:], *found["proxy"]["args"]])


def test_the_component_adds_the_plugin_to_deployments_of_llm_d(tmp_path: Path) -> None:
    for role in ("prefill", "decode"):
        (tmp_path / f"{role}.yaml").write_text(LLM_D.format(role=role))
    shutil.copytree(DEPLOY / "kubernetes" / "llm-d", tmp_path / "llm-d")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [prefill.yaml, decode.yaml]\nnamePrefix: guide-\ncomponents: [llm-d]\n"
    )
    made = built(tmp_path)
    public = keys.generate(tmp_path / "key")
    values = {"ADRENALINE_POD_IP": "10.0.0.1", "ADRENALINE_PREFILL_KEY": public}
    for role in ("prefill", "decode"):
        server = containers(made, f"guide-{role}")["modelserver"]
        known = {each["name"]: each.get("value") or values[each["name"]] for each in server["env"]}
        words = [re.sub(r"\$\((\w+)\)", lambda name, known=known: known[name[1]], word) for word in server["args"]]
        found = options(words)
        assert (found.role, found.interface) == (role, "eth0")
    (service,) = [each for each in made if each["kind"] == "Service"]
    (prefill,) = [each for each in made if each["metadata"]["name"] == "guide-prefill"]
    assert service["spec"]["selector"].items() <= prefill["spec"]["template"]["metadata"]["labels"].items()
    assert found.peer_addresses == [f"tcp://{public}@{service['metadata']['name']}:7000"]


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert any(step.get("run") == "bash .ci/run" for job in jobs.values() for step in job["steps"])
