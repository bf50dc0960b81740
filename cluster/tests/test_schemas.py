"""Check that manifests, tasks and compose files fit their schemas, and that a misspelt key is an error."""

import copy

import pytest
import yaml
from files import COMPOSE_FILES, KUBERNETES, OVERLAYS, TASKS, build, documents, manifests, name, rendered
from jsonschema import ValidationError
from schemas import LATEST, OLDEST, check_compose, check_manifest, check_task

# Mappings with free keys.
FREE = {
    *("labels", "annotations", "matchLabels", "nodeSelector", "selector", "requests", "limits", "data"),
    *("envs", "secrets", "file_mounts", "services", "volumes", "networks", "environment", "depends_on"),
    *("args", "configs", "options", "driver_opts", "sysctls", "ulimits"),
}
MANIFESTS = [pytest.param(document, id=f"{name(path)}-{document['kind']}") for path, document in manifests()]
EXAMPLE = {"services": {"mlflow": {"image": "mlflow", "ports": ["127.0.0.1:5000:5000"], "restart": "unless-stopped"}}}


def places(node, path=(), free=False):
    """Yield the path of every key that a schema knows."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key.startswith("x-"):  # extensions of Compose
                continue
            if not free:
                yield (*path, key)
            # `selector` is free in a Service, but holds `matchLabels` in a Deployment; `volumes` is a list in a pod.
            yield from places(value, (*path, key), key in FREE and "matchLabels" not in (value or {}))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from places(value, (*path, index))


def spoilt(document, path, spoil):
    """Return a copy of a document with a mistake in one place."""
    document = copy.deepcopy(document)
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    spoil(holder, path[-1])
    return document


def misspell(holder, key):
    """Write one letter twice."""
    holder[key + key[-1]] = holder.pop(key)


def change_type(holder, key):
    """Put a list of lists there, which is always wrong."""
    holder[key] = [[holder[key]]]


def survivors(document, check):
    """Return every place whose mistake a check does not notice."""
    passed = []
    for path in places(document):
        for spoil in (misspell, change_type):
            try:
                check(spoilt(document, path, spoil))
            except (ValidationError, KeyError, FileNotFoundError):  # the last two: `kind` and `apiVersion`
                continue
            passed.append((spoil.__name__, ".".join(map(str, path))))
    return passed


def of_overlay(overlay, kind):
    """Return the documents of one kind in an overlay."""
    return [document for document in documents(rendered(overlay)) if document["kind"] == kind]


@pytest.mark.parametrize("document", MANIFESTS)
def test_a_manifest_as_it_is_written(document):
    check_manifest(document)


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_as_it_is_rendered(overlay, version):
    for document in documents(rendered(overlay)):
        check_manifest(document, version)


@pytest.mark.parametrize("path", TASKS, ids=name)
def test_a_task(path):
    check_task(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=name)
def test_a_compose_file(path):
    check_compose(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", MANIFESTS)
def test_a_spoilt_manifest_is_noticed(document):
    assert survivors(document, check_manifest) == []


@pytest.mark.parametrize("path", TASKS, ids=name)
def test_a_spoilt_task_is_noticed(path):
    assert survivors(yaml.safe_load(path.read_text(encoding="utf-8")), check_task) == []


@pytest.mark.parametrize("document", [EXAMPLE, *(yaml.safe_load(path.read_text()) for path in COMPOSE_FILES)])
def test_a_spoilt_compose_file_is_noticed(document):
    assert survivors(document, check_compose) == []


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("single-gpu", "Job", ["spec", "template"]),
        ("single-gpu", "Job", ["spec", "template", "spec", "containers"]),
        ("single-gpu", "Job", ["spec", "template", "spec", "containers", 0, "name"]),
        ("single-gpu", "Job", ["spec", "podFailurePolicy", "rules", 1, "onExitCodes", "operator"]),
        ("single-gpu", "Deployment", ["spec", "selector"]),
        ("multi-node", "Service", ["spec", "ports", 0, "port"]),
        ("multi-node-trainjob", "TrainJob", ["spec", "runtimeRef"]),
        ("multi-node-trainjob", "TrainJob", ["spec", "runtimePatches", 0, "manager"]),
    ],
)
def test_a_required_field_that_is_missing_is_noticed(overlay, kind, path):
    (document, *_) = (d for d in of_overlay(overlay, kind) if kind != "Service" or d["metadata"]["name"] == "mlflow")
    with pytest.raises(ValidationError):
        check_manifest(spoilt(document, path, lambda holder, key: holder.pop(key)))


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("kustomization.yaml")), ids=name)
def test_a_misspelt_kustomization_is_noticed(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    for key in ("resources", "patches", "images", "configMapGenerator", "components", "configurations"):
        if f"\n{key}:" in text:
            (tmp_path / "kustomization.yaml").write_text(text.replace(f"\n{key}:", f"\n{key[:-1]}:"))
            process = build(tmp_path)
            assert process.returncode != 0
            assert key[:-1] in process.stderr
