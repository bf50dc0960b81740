# The torch wheels bring CUDA, so any image with Python 3.11 or 3.12, its headers and apt will do.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
# An index with CPU-only torch wheels makes a far smaller image: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        print(*project["dependencies"], *extras["deepspeed"], *extras["quantization"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY LICENSE README.md ./
COPY rlhf_recipes rlhf_recipes
RUN pip install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE}
# DeepSpeed (with the ninja among its dependencies) and triton compile kernels at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home app \
    && install -d -o app -g app /app /app/runs /app/mlruns /cache/hf
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/hf \
    MLFLOW_TRACKING_URI=sqlite:////app/runs/mlflow.db
WORKDIR /app
COPY accelerate_configs accelerate_configs
COPY recipes recipes
USER 1000
VOLUME ["/cache/hf", "/app/runs", "/app/mlruns"]
CMD ["python", "recipes/ppo.py", "--help"]
