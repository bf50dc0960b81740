# Only the CUDA runtime: torch's wheels contain cuBLAS, cuDNN and NCCL.
# Any Debian or Ubuntu with Python 3.11 or 3.12 works.
# For a release, name it with its digest: --build-arg RELEASE=1 --build-arg BASE_IMAGE=nvidia/cuda:13.0.2-...@sha256:...
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS build
ARG BASE_IMAGE
ARG RELEASE=
# A tag can move to another image, and a digest cannot.
RUN case "${RELEASE:+release}$BASE_IMAGE" in \
        release*@sha256:*) ;; \
        release*) echo "RELEASE needs a BASE_IMAGE with a digest, got $BASE_IMAGE" >&2; exit 1 ;; \
    esac
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Install the dependencies before the source, so that a change of the source does not install them again.
COPY cluster/requirements/build.txt cluster/requirements/image.txt ./
# pip takes only packages with a hash of these files, which `make lock` writes, also for what builds a package. An index
# of your own is a secret of the build, so the image keeps nothing of it: --secret id=pip,src=my_pip.conf
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes -r build.txt \
    && pip install --require-hashes --no-build-isolation -r image.txt
COPY LICENSE README.md pyproject.toml ./
COPY accelerate_configs accelerate_configs
COPY recipes recipes
COPY rlhf_recipes rlhf_recipes
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation .

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
ENTRYPOINT ["rlhf", "launch"]
CMD ["recipes/ppo.py", "--help"]
