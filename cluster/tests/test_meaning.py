"""Check rules that no schema has: equal names in two places, and values that must fit the library and the image."""

import re
import shutil
from urllib.parse import urlsplit

import pytest
import yaml
from files import KUBERNETES, OVERLAYS, ROOT, TASKS, assignment, build, documents, name, rendered

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXIT_CODE = assignment("EXIT_CODE")
VERSIONS = {
    "rlhf-recipes": re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],
    "rlhf-recipes-mlflow": re.search(r"^mlflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1],
}
HOUR = 3600


def pods(docs):
    """Yield each pod of an overlay: its owner, its labels, its specification."""
    for document in docs:
        if document["kind"] in ("Job", "Deployment"):
            template = document["spec"]["template"]
            yield document, template["metadata"]["labels"], template["spec"]
        elif document["kind"] == "TrainJob":
            spec, trainer = document["spec"], document["spec"]["trainer"]
            (patch,) = spec["runtimePatches"]
            (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            pod = job["template"]["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            resources = {"resources": trainer["resourcesPerNode"]}
            labels = job["template"]["spec"]["template"]["metadata"]["labels"]
            yield document, labels, {**pod, "containers": [{**container, **trainer, **resources}]}


def trainers(docs):
    """Yield the owner, the pod and the container of each training."""
    for owner, _, pod in pods(docs):
        if owner["kind"] != "Deployment":
            yield owner, pod, pod["containers"][0]


def containers(pod):
    """Return all containers of a pod."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def names(docs, kind):
    """Return the documents of one kind by name."""
    return {document["metadata"]["name"]: document for document in docs if document["kind"] == kind}


def environment(container):
    """Return the variables of a container; `None` for a variable without a plain value."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def options(arguments):
    """Return the options of the launcher, the recipe, and the options of the recipe."""
    (recipe,) = (argument for argument in arguments if argument.endswith(".py"))
    where = arguments.index(recipe)
    launcher, own = arguments[:where], arguments[where + 1 :]
    return dict(zip(launcher[::2], launcher[1::2], strict=True)), recipe, dict(zip(own[::2], own[1::2], strict=True))


def check_that_volumes_exist_and_are_mounted(docs):
    claims, maps = names(docs, "PersistentVolumeClaim"), names(docs, "ConfigMap")
    for _, _, pod in pods(docs):
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            elif "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            elif volume["name"] == "shm":
                assert volume["emptyDir"]["medium"] == "Memory"
            else:
                assert "sizeLimit" in volume["emptyDir"]
        mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def check_that_what_must_last_is_on_a_claim(docs):
    for owner, pod, container in trainers(docs):
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        }
        for preparing in [c for c in containers(pod) if "recipes/" in str(c.get("args")) or c is container]:
            lasting = {m["mountPath"] for m in preparing["volumeMounts"] if m["name"] in claims}
            assert lasting == {"/app/runs", "/cache/hf"}
            assert all(re.search(rf'[ "]{path}[ "\n]', DOCKERFILE) for path in lasting), "not in the image"
        nodes = owner["spec"].get("completions", container.get("numNodes", 1))
        for claim in claims.values():
            modes = names(docs, "PersistentVolumeClaim")[claim]["spec"]["accessModes"]
            assert modes == (["ReadWriteMany"] if nodes > 1 else ["ReadWriteOnce"])


def check_that_secrets_are_named_and_not_written(docs):
    assert not names(docs, "Secret")
    for _, _, pod in pods(docs):
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert source["secretRef"] == {"name": "rlhf-tokens", "optional": True}
            for variable in container.get("env", []):
                if re.search("TOKEN|PASSWORD|KEY", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "rlhf-tokens"
                    assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


def check_that_services_find_their_pods(docs):
    for service in names(docs, "Service").values():
        wanted = service["spec"]["selector"].items()
        found = [(labels, pod) for _, labels, pod in pods(docs) if wanted <= labels.items()]
        assert len(found) == 1, service["metadata"]["name"]
        ports = {port.get("name") for container in found[0][1]["containers"] for port in container["ports"]}
        assert all(port["targetPort"] in ports for port in service["spec"].get("ports", []))
    for document in names(docs, "Deployment").values():
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()


def check_that_runs_are_tracked_where_mlflow_answers(docs):
    service, deployment = names(docs, "Service")["mlflow"], names(docs, "Deployment")["mlflow"]
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in server["args"])
    (port,) = service["spec"]["ports"]
    assert given["port"] == str(server["ports"][0]["containerPort"])
    assert f"mlflow:{port['port']}" in given["allowed-hosts"].split(",")
    assert (given["host"], deployment["spec"]["strategy"]["type"]) == ("0.0.0.0", "Recreate")
    (mount,) = (mount for mount in server["volumeMounts"] if mount["name"] == "mlflow")
    assert given["backend-store-uri"].startswith(f"sqlite:///{mount['mountPath']}/")
    assert given["artifacts-destination"].startswith(f"{mount['mountPath']}/")
    for owner, _, pod in pods(docs):
        if owner["kind"] != "TrainJob":  # a TrainJob has no such field
            assert pod["enableServiceLinks"] is False
        for container in containers(pod):
            if container is not server:
                address = urlsplit(environment(container)["MLFLOW_TRACKING_URI"])
                assert (address.scheme, address.hostname, address.port) == ("http", "mlflow", port["port"])


def check_that_the_command_is_one_of_the_image(docs):
    for _, pod, container in trainers(docs):
        assert "command" not in container, "the entry point of the image passes signals on"
        launcher, recipe, own = options(container["args"])
        assert (ROOT / launcher["--config_file"]).is_file()
        assert (ROOT / recipe).is_file()
        assert own["--resume_from_checkpoint"] == "true"
        for variable in re.findall(r"\$\((\w+)\)", " ".join(container["args"])):
            assert variable in environment(container) or variable.startswith("PET_")
        if "--config" not in own:
            assert recipe == "recipes/ppo.py"  # the only recipe with a default configuration
            continue
        folder, _, key = own["--config"].rpartition("/")
        (volume,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == folder)
        (source,) = (v["configMap"]["name"] for v in pod["volumes"] if v["name"] == volume)
        configuration = yaml.safe_load(names(docs, "ConfigMap")[source]["data"][key])
        assert configuration["output_dir"].startswith("runs/")


def check_that_processes_nodes_and_gpus_agree(docs):
    for owner, pod, container in trainers(docs):
        launcher, _, _ = options(container["args"])
        config = yaml.safe_load((ROOT / launcher["--config_file"]).read_text(encoding="utf-8"))
        spec = owner["spec"]
        nodes = spec.get("completions", container.get("numNodes", 1))
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert config["use_cpu"] == (gpus == 0)
        assert config["num_processes"] == nodes * max(gpus, 1)
        assert config["num_machines"] == nodes
        if owner["kind"] == "Job" and nodes > 1:
            assert (spec["completionMode"], spec["parallelism"]) == ("Indexed", nodes)
            service = names(docs, "Service")[pod["subdomain"]]
            assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
            assert launcher["--main_process_ip"] == f"{owner['metadata']['name']}-0.{service['metadata']['name']}"
            assert launcher["--main_process_port"] == str(container["ports"][0]["containerPort"])


def check_that_a_signal_is_no_failure(docs):
    for owner, pod, container in trainers(docs):
        if owner["kind"] == "Job":
            disrupted, signalled = owner["spec"]["podFailurePolicy"]["rules"]
            assert disrupted == {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            }
            codes = {"containerName": container["name"], "operator": "In", "values": [EXIT_CODE]}
            assert signalled == {"action": "Ignore", "onExitCodes": codes}
            assert (pod["restartPolicy"], owner["spec"]["podReplacementPolicy"]) == ("Never", "Failed")
        assert 120 <= pod["terminationGracePeriodSeconds"] <= HOUR


def check_that_nothing_is_privileged(docs):
    (user,) = {int(user) for user in re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)}
    for _, _, pod in pods(docs):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["fsGroup"] == user
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
        for container in pod["containers"]:
            (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "tmp")
            assert environment(container)["HOME"] == mount["mountPath"] == "/tmp"


def check_that_no_pod_has_a_token_of_the_cluster(docs):
    accounts = names(docs, "ServiceAccount")
    for owner, _, pod in pods(docs):
        holder = accounts[pod["serviceAccountName"]] if owner["kind"] == "TrainJob" else pod
        assert holder["automountServiceAccountToken"] is False


def check_that_only_trainings_reach_mlflow(docs):
    policies = names(docs, "NetworkPolicy")
    spec = policies["mlflow"]["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert not spec.get("egress")
    ((rule,), (port,)) = spec["ingress"], names(docs, "Service")["mlflow"]["spec"]["ports"]
    ((peer,), (open_port,)) = rule["from"], rule["ports"]
    assert open_port["port"] == port["targetPort"]
    assert peer.keys() == {"podSelector"}
    allowed, protected = peer["podSelector"]["matchLabels"].items(), spec["podSelector"]["matchLabels"].items()
    for owner, labels, _ in pods(docs):
        is_server = owner["kind"] == "Deployment"
        assert (protected <= labels.items()) == is_server
        assert (allowed <= labels.items()) != is_server
    training = policies["training"]["spec"]
    assert training["podSelector"] == training["ingress"][0]["from"][0]["podSelector"] == peer["podSelector"]
    assert len(training["ingress"]) == len(training["ingress"][0]["from"]) == 1


def check_that_images_are_of_this_version(docs):
    for _, _, pod in pods(docs):
        for container in containers(pod):
            image, _, tag = container["image"].rpartition(":")
            assert tag == VERSIONS[image]
            assert "memory" in container["resources"]["limits"]


# Mistakes that every schema accepts, by the check that must find them: overlay, old text, new text.
MISTAKES = {
    check_that_volumes_exist_and_are_mounted: [
        ("single-gpu", "claimName: runs", "claimName: run"),
        ("single-gpu", "        - mountPath: /dev/shm\n          name: shm\n", ""),
        (
            "multi-node-trainjob",
            "configMap:\n                        name: ",
            "configMap:\n                        name: my-",
        ),
    ],
    check_that_what_must_last_is_on_a_claim: [
        ("single-gpu", "/app/runs", "/app/run"),
        ("quickstart-cpu", "/cache/hf", "/root/.cache/huggingface"),
        ("multi-node", "ReadWriteMany", "ReadWriteOnce"),
        ("multi-node-trainjob", "ReadWriteMany", "ReadWriteOnce"),
    ],
    check_that_secrets_are_named_and_not_written: [
        ("single-gpu", "name: rlhf-tokens", "name: rlhf-token"),
        ("multi-node-trainjob", "optional: true", "optional: false"),
        ("single-gpu", "kind: ConfigMap", "kind: Secret"),
    ],
    check_that_services_find_their_pods: [
        ("single-gpu", "app.kubernetes.io/name: mlflow\n---", "app: mlflow\n---"),
        ("multi-node", "app.kubernetes.io/name: ppo\n    spec", "app: ppo\n    spec"),
        ("single-gpu", "targetPort: http", "targetPort: https"),
    ],
    check_that_runs_are_tracked_where_mlflow_answers: [
        ("single-gpu", "http://mlflow:5000", "http://mlflow-server:5000"),
        ("multi-node-trainjob", "http://mlflow:5000", "http://mlflow:500"),
        ("single-gpu", "mlflow,mlflow:5000,", "mlflow,"),
        ("single-gpu", "enableServiceLinks: false", "enableServiceLinks: true"),
        ("single-gpu", "sqlite:////mlflow/", "sqlite:///mlflow/"),
    ],
    check_that_the_command_is_one_of_the_image: [
        ("single-gpu", "recipes/ppo.py\n", "recipes/pop.py\n"),
        ("single-gpu", "/config/ppo.yaml\n        - --res", "/config/pop.yaml\n        - --res"),
        ("single-gpu", "single_gpu.yaml\n", "one_gpu.yaml\n"),
        ("quickstart-cpu", "--resume_from_checkpoint", "--resume"),
        ("multi-node", "$(JOB_COMPLETION_INDEX)", "$(JOB_INDEX)"),
        ("reward-modeling", "mountPath: /config", "mountPath: /configs"),
    ],
    check_that_processes_nodes_and_gpus_agree: [
        ("multi-node", "gpu: 8", "gpu: 4"),
        ("multi-node", "completions: 2", "completions: 3"),
        ("multi-node", "parallelism: 2", "parallelism: 1"),
        ("multi-node", "- ppo-0.ppo", "- ppo-0.mlflow"),
        ("multi-node", "Addresses: true", "Addresses: false"),
        ("multi-node-trainjob", "numNodes: 2", "numNodes: 4"),
        ("single-gpu", "nvidia.com/gpu: 1", "nvidia.com/gpu: 2"),
    ],
    check_that_a_signal_is_no_failure: [
        ("single-gpu", "- 75", "- 74"),
        ("single-gpu", "containerName: trainer", "containerName: ppo"),
        ("single-gpu", "restartPolicy: Never", "restartPolicy: OnFailure"),
        ("multi-node", "ReplacementPolicy: Failed", "ReplacementPolicy: TerminatingOrFailed"),
        ("multi-node-trainjob", "PeriodSeconds: 600", "PeriodSeconds: 30"),
    ],
    check_that_nothing_is_privileged: [
        ("single-gpu", "runAsUser: 1000", "runAsUser: 0"),
        ("quickstart-cpu", "allowPrivilegeEscalation: false", "privileged: true"),
        ("multi-node-trainjob", "- ALL", "- NET_RAW"),
        ("multi-node", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
        (
            "multi-node-trainjob",
            "Filesystem: true\n                      vol",
            "Filesystem: false\n                      vol",
        ),
        ("quickstart-cpu", "name: HOME\n          value: /tmp", "name: HOME\n          value: /home/app"),
        ("single-gpu", "mountPath: /tmp", "mountPath: /temp"),
    ],
    check_that_no_pod_has_a_token_of_the_cluster: [
        ("single-gpu", "automountServiceAccountToken: false", "automountServiceAccountToken: true"),
        ("multi-node-trainjob", "serviceAccountName: training", "serviceAccountName: default"),
        ("multi-node-trainjob", "automountServiceAccountToken: false\nkind", "kind"),
    ],
    check_that_only_trainings_reach_mlflow: [
        ("single-gpu", "component: training\n        app.", "component: other\n        app."),
        (
            "multi-node-trainjob",
            "component: training\n                  spec",
            "name: ppo\n                  spec",
        ),
        ("single-gpu", "    - podSelector:\n        matchLabels:", "    - namespaceSelector:\n        matchLabels:"),
        ("multi-node", "  - Egress\n", ""),
        ("reward-modeling", "    - port: http\n", "    - port: 5001\n"),
    ],
    check_that_images_are_of_this_version: [
        ("single-gpu", "rlhf-recipes:0.1.0", "rlhf-recipes:latest"),
        ("multi-node-trainjob", "mlflow:3.17.2", "mlflow:3.17.1"),
    ],
}


@pytest.mark.parametrize("check", MISTAKES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay(overlay, check):
    check(documents(rendered(overlay)))


@pytest.mark.parametrize(
    ("check", "overlay", "old", "new"),
    [pytest.param(check, *mistake) for check, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_a_mistake_is_noticed(check, overlay, old, new):
    text = rendered(overlay)
    assert old in text
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check(documents(text.replace(old, new)))


def test_every_check_has_a_mistake_that_it_notices():
    assert MISTAKES.keys() == {value for word, value in globals().items() if word.startswith("check_that")}


@pytest.mark.parametrize("path", [KUBERNETES / "job/job.yaml", KUBERNETES / "overlays/multi-node/job.yaml"], ids=name)
def test_a_grace_period_is_the_sum_of_its_comment(path):
    text = path.read_text(encoding="utf-8")
    ((terms, total),) = re.findall(r"#   (rollout .*) = (\d+) s\.", text)
    assert sum(int(seconds) for seconds in re.findall(r"(\d+) s\b", terms)) == int(total)
    assert f"terminationGracePeriodSeconds: {total}\n" in text


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_image_is_set_in_one_place(overlay, tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    for file in (tmp_path / "kubernetes").rglob("kustomization.yaml"):
        file.write_text(file.read_text().replace("newName: ", "newName: registry.example.com/"))
    process = build(tmp_path / "kubernetes" / "overlays" / overlay)
    images = {c["image"] for _, _, pod in pods(documents(process.stdout)) for c in containers(pod)}
    assert images == {f"registry.example.com/{image}:{version}" for image, version in VERSIONS.items()}


@pytest.mark.parametrize("path", TASKS, ids=name)
def test_a_task_uses_what_is_there(path):
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    for mention in re.findall(r"(?:recipes|accelerate_configs)/[\w./]+", yaml.dump(task)):
        assert (ROOT / mention).is_file(), mention
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_CODE]
    (mount,) = task["file_mounts"]
    assert f"ln -sfn {mount} runs" in task["run"]
    used = set(re.findall(r"\$\{?!?([A-Z_]+)", task["run"])) | set(
        re.findall(r"in ([A-Z_ ]+);", task["run"])[0].split()
    )
    assert {word for word in used if not word.startswith("SKYPILOT_")} <= task["envs"].keys() | task["secrets"].keys()
    assert not any(task["secrets"].values())
