# Only the CUDA runtime: torch's wheels contain cuBLAS, cuDNN and NCCL.
# Any Debian or Ubuntu with Python 3.11 or 3.12 works.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Install the dependencies before the source, so that a change of the source does not install them again.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        print(*project["dependencies"], *extras["deepspeed"], *extras["quantization"], sep="\n")' > requirements.txt
# An index with torch wheels for CPUs gives a much smaller image: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r requirements.txt
COPY LICENSE README.md ./
COPY rlhf_recipes rlhf_recipes
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --no-deps .

FROM ${BASE_IMAGE}
# DeepSpeed and triton compile kernels at run time. ninja is a dependency of DeepSpeed. Ubuntu's images already have a
# user with id 1000, so --non-unique is needed.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --non-unique --uid 1000 --create-home app \
    && install -d -o app -g app /app /app/runs /app/mlruns /cache/hf
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY accelerate_configs accelerate_configs
COPY recipes recipes
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="rlhf_recipes" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# The first two variables give access to GPUs on base images other than CUDA's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/hf \
    MLFLOW_TRACKING_URI=sqlite:////app/runs/mlflow.db \
    MLFLOW_DISABLE_TELEMETRY=true \
    RLHF_RECIPES_COMMIT=${REVISION}
USER 1000
# No health check: a job is healthy while it runs. Its exit code says how it ended: 75 is a checkpoint after a signal.
ENTRYPOINT ["rlhf-launch"]
CMD ["recipes/ppo.py", "--help"]
