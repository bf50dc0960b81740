# Only the CUDA runtime: torch's wheels bring cuBLAS, cuDNN and NCCL. Any Debian or Ubuntu with Python 3.11 or 3.12 will do.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Dependencies before the source, so that a change of the source does not install them again.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        print(*project["dependencies"], *extras["deepspeed"], *extras["quantization"], sep="\n")' > requirements.txt
# An index with CPU-only torch wheels makes a far smaller image: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r requirements.txt
COPY LICENSE README.md ./
COPY rlhf_recipes rlhf_recipes
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt --no-deps .

FROM ${BASE_IMAGE}
# DeepSpeed (with the ninja among its dependencies) and triton compile kernels at run time. Ubuntu's images have a user
# with id 1000 already, whose files nobody needs.
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
# The first two let GPUs in on bases that are not CUDA's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/hf \
    MLFLOW_TRACKING_URI=sqlite:////app/runs/mlflow.db \
    MLFLOW_DISABLE_TELEMETRY=true \
    RLHF_RECIPES_COMMIT=${REVISION}
USER 1000
# A job is healthy as long as it runs, and says by its exit code how it has ended: 75 is a checkpoint after a signal.
ENTRYPOINT ["rlhf-launch"]
CMD ["recipes/ppo.py", "--help"]
