# The image for pods (docs/kubernetes.md): the suite with the versions of requirements/lock.txt, torch for CUDA, and NVSHMEM.
# Built from the checkout: docker build --tag registry.example/refit:1 .
#
# Base: CUDA 13.0.2 on Ubuntu 24.04, whose Python is 3.12. A site pins it by digest: --build-arg BASE=...@sha256:...
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# As the Makefile installs it; its wheels for Linux bring the libraries of CUDA 13, NCCL among them.
ARG TORCH=torch==2.13.0
ARG NVSHMEM4PY=nvshmem4py-cu13==0.4.1
# torch brings an older one, so that this one lies beside it and is preloaded into ranks.
ARG NVSHMEM=nvidia-nvshmem-cu13==3.8.0

# For EFA: the version of the campaign that docs/kubernetes.md names; empty leaves it out.
ARG EFA_INSTALLER=

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev build-essential curl ca-certificates \
        libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

RUN if [ -n "$EFA_INSTALLER" ]; then \
        curl --fail --silent --show-error --location --output /tmp/efa.tar.gz \
            "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA_INSTALLER.tar.gz" \
        && tar --extract --gzip --file /tmp/efa.tar.gz --directory /tmp \
        && cd /tmp/aws-efa-installer && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify \
        && rm -rf /tmp/efa.tar.gz /tmp/aws-efa-installer /var/lib/apt/lists/*; \
    fi
ENV LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib

WORKDIR /opt/refit
COPY pyproject.toml README.md benchmark_refit.py ./
COPY requirements/lock.txt requirements/
# pip checks the lock's hashes. torch comes after it, so that what its CUDA build pins itself wins.
RUN python3 -m venv /opt/venv \
    && sed -n '/^setuptools==/,/[^\\]$/p' requirements/lock.txt \
        | /opt/venv/bin/pip install --no-deps --requirement /dev/stdin \
    && /opt/venv/bin/pip install --no-deps --no-build-isolation --use-pep517 --requirement requirements/lock.txt \
    && /opt/venv/bin/pip install "$TORCH" "$NVSHMEM4PY" \
    && /opt/venv/bin/pip install --target /opt/nvshmem --no-deps "$NVSHMEM"
ENV REFIT_NVSHMEM_LIBRARY=/opt/nvshmem/nvidia/nvshmem/lib/libnvshmem_host.so.3
COPY configs configs
COPY refit refit
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation . \
    && /opt/venv/bin/python -c "import refit.launch.kubernetes.pod, torch; assert torch.version.cuda.startswith('13.')" \
    && test -e "$REFIT_NVSHMEM_LIBRARY"

ENV PATH=/opt/venv/bin:$PATH
