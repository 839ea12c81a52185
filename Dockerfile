# Two images of one wheel: `docker build --target cpu .` and `docker build --target gpu .`.
# All that is started is in /opt/tera/bin: KubeRay starts `ray`, the chart `python`, `tera` and
# `tera-haproxy`. The chart's pods have a read-only root and write to /state, /tmp and /models.

FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY platform/ platform/
COPY helm/tera/values.yaml helm/tera/values-local.yaml helm/tera/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm AS cpu-environment
# Where a CPU build of torch is taken from when pip's own index has none.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY constraints.txt ./
COPY --from=wheel /wheels/ wheels/
# As `make install` does it. What is removed last does not load beside a CPU torch, and no text needs it.
RUN python -m venv --without-pip /opt/tera \
    && install="pip --python /opt/tera/bin/python install --no-cache-dir --constraint constraints.txt" \
    && $install --extra-index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)+cpu" \
    && $install "$(echo wheels/tera-*.whl)[cpu]" \
    && pip --python /opt/tera/bin/python uninstall --yes torchvision torchaudio torchcodec

FROM python:3.11.14-slim-bookworm AS cpu
# vLLM's kernels load libnuma, and torch compiles models with g++. Debian keeps one version of each.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tera \
    && useradd --uid 1000 --gid 1000 --home-dir /state --no-create-home tera \
    && install --directory --owner=1000 --group=1000 /state /models
COPY --from=cpu-environment /opt/tera/ /opt/tera/
ENV PATH=/opt/tera/bin:$PATH HOME=/state TERA_HOME=/state PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
WORKDIR /state
USER 1000:1000
ENTRYPOINT ["tera"]
CMD ["--help"]

FROM vllm/vllm-openai:v0.32.0 AS gpu-environment
WORKDIR /build
COPY constraints.txt ./
COPY --from=wheel /wheels/ wheels/
# vLLM, torch and what is made for CUDA stay those of the base image; what Tera is tested with is
# added over them. Two of our versions are not for CUDA: vLLM pins apache-tvm-ffi, and torch triton.
RUN python3 -m venv --without-pip --system-site-packages /opt/tera \
    && grep -vE '^(apache-tvm-ffi|triton)==' constraints.txt > gpu-constraints.txt \
    && python3 -m pip --python /opt/tera/bin/python install --no-cache-dir \
        --constraint gpu-constraints.txt "$(echo wheels/tera-*.whl)[gpu]"

FROM vllm/vllm-openai:v0.32.0 AS gpu
# Some bases have a user 1000 already. Ray and torch ask for the name of theirs.
RUN if ! getent passwd 1000; then \
        useradd --uid 1000 --user-group --home-dir /state --no-create-home tera; \
    fi \
    && install --directory --owner=1000 --group=1000 /state /models
COPY --from=gpu-environment /opt/tera/ /opt/tera/
ENV PATH=/opt/tera/bin:$PATH HOME=/state TERA_HOME=/state PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
WORKDIR /state
USER 1000:1000
ENTRYPOINT ["tera"]
CMD ["--help"]
