"""Check each file with the schema of the program that reads it. A key that the schema does not know is an error."""

import functools
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import jsonschema
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

os.environ.update(HOME=tempfile.mkdtemp(), SKYPILOT_DISABLE_USAGE_COLLECTION="1")  # the import of sky writes to ~/.sky
from sky.utils import schemas as sky_schemas  # noqa: E402
from sky.utils import validator as sky_validator  # noqa: E402

OLDEST, LATEST = "1.31", "1.37"  # podFailurePolicy is stable since 1.31


@functools.cache
def _kubernetes_validator(kind, api_version, version):
    """Return the validator of `kubernetes-validate --strict`, built once, because it reads megabytes of JSON."""
    group, _, rest = api_version.rpartition("/")
    file = "-".join(filter(None, [kind.lower(), group.split(".")[0], rest]))
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    contents = [schema_contents(f"{folder}/{name}.json", version) for name in (file, "_definitions")]
    registry = functools.reduce(
        lambda registry, content: Resource.from_contents(content) @ registry, contents, Registry()
    )
    return jsonschema.Draft202012Validator(contents[0], registry=registry)


def close(schema):
    """Forbid keys that a schema does not name, at every depth. Mappings with free keys name no key."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            schema["additionalProperties"] = False
        for value in schema.values():
            close(value)
    elif isinstance(schema, list):
        for value in schema:
            close(value)
    return schema


@functools.cache
def _train_job_validator():
    """Return a validator of TrainJobs. Its own models would ignore keys that they do not know."""
    schema = TrainerV1alpha1TrainJob.model_json_schema(by_alias=True)
    for definition in schema["$defs"].values():
        if "actual_instance" in definition["properties"]:  # a wrapped value of several types
            types = definition["properties"]["actual_instance"]
            definition.clear()
            definition.update(types)
    return jsonschema.Draft202012Validator(close(schema))


def check_manifest(document, version=LATEST):
    """Raise an error if Kubernetes or Kubeflow Trainer would refuse a manifest."""
    kind, api_version = document["kind"], document["apiVersion"]
    if (kind, api_version) == ("TrainJob", "trainer.kubeflow.org/v1alpha1"):
        _train_job_validator().validate(document)
    else:
        _kubernetes_validator(str(kind), str(api_version), version).validate(document)


@functools.cache
def _sky_validator(kind):
    schema = close(getattr(sky_schemas, f"get_{kind}_schema")())
    return sky_validator.get_schema_validator()(schema)


def check_task(task):
    """Raise an error if SkyPilot would refuse a task."""
    _sky_validator("task").validate(task)
    _sky_validator("resources").validate(task["resources"])
    for mount in task["file_mounts"].values():
        if isinstance(mount, dict):
            _sky_validator("storage").validate(mount)


@functools.cache
def _compose_validator():
    # Only find the package, do not import it: it needs a later version of click than SkyPilot allows.
    package = Path(importlib.util.find_spec("check_jsonschema").origin).parent
    schema = json.loads((package / "builtin_schemas/vendor/compose-spec.json").read_text(encoding="utf-8"))
    return jsonschema.validators.validator_for(schema)(schema)


def check_compose(document):
    """Raise an error if Docker Compose would refuse a file."""
    _compose_validator().validate(document)
