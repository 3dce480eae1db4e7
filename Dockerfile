# build   builds and validates bundles: docker build --target build -t dinoexport . && docker run -v "$PWD/bundles:/bundles" \
#         dinoexport build vits14 --weights synthetic:0 --out /bundles/vits14
# test    the build image with the tests in it: docker build --target test -t dinoexport-test . && docker run dinoexport-test
# serve   Triton with the repository in ./models: dinoexport deploy BUNDLE --to models && docker build --target serve .
# PyPI's torch brings CUDA along; --build-arg PIP_EXTRA_INDEX_URL=ADDRESS of PyTorch's index of CPU wheels keeps that out.
ARG BASE=python:3.11-slim-bookworm
# Its TensorRT is what `dinoexport deploy --triton 26.08` holds plans to.
ARG TRITON=nvcr.io/nvidia/tritonserver:26.08-py3

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dinoexport dinoexport
COPY recipes recipes
COPY validate validate
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL=""
# What the exporter can do: `export,cpu,rtx` compiles engines too; TensorRT itself is several gigabytes.
ARG EXTRAS=export,cpu
LABEL org.opencontainers.image.title="dinoexport" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
# A virtual environment: Debian's own python3 refuses packages outside one.
RUN python3 -m venv /opt/dinoexport \
    && /opt/dinoexport/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt \
       "$(echo /tmp/wheels/*.whl)[${EXTRAS}]" \
    && rm -rf /tmp/wheels /tmp/constraints.txt \
    && useradd --create-home --uid 10001 dinoexport \
    && mkdir /bundles && chown 10001 /bundles
ENV PATH=/opt/dinoexport/bin:$PATH
USER 10001
WORKDIR /bundles
ENTRYPOINT ["dinoexport"]
CMD ["--help"]

FROM build AS test
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
USER 0
COPY . .
RUN /opt/dinoexport/bin/pip install --no-cache-dir --constraint constraints.txt --editable '.[dev]' \
    && /opt/dinoexport/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps timm \
    && chown --recursive 10001 /src
USER 10001
ENTRYPOINT ["pytest"]
CMD ["-n", "2"]

FROM ${TRITON} AS serve
LABEL org.opencontainers.image.title="dinoexport on Triton" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY serving/server-constraints.txt /tmp/server-constraints.txt
COPY --from=wheel /wheels /tmp/wheels
# First on PATH: the Python backend runs its models in the environment of the first python3 it finds.
RUN python3 -m venv /opt/dinoexport \
    && /opt/dinoexport/bin/pip install --no-cache-dir --constraint /tmp/server-constraints.txt \
       "$(echo /tmp/wheels/*.whl)[cpu,openvino,triton,text,openai]" \
    && rm -rf /tmp/wheels /tmp/server-constraints.txt \
    && useradd --create-home --uid 10001 dinoexport
ENV PATH=/opt/dinoexport/bin:$PATH
COPY --chown=10001 models /models
USER 10001
EXPOSE 8000 8001 8002
# Triton calls itself ready after a model's process has died; a question with a known answer tells.
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s \
    CMD ["dinoexport", "check", "http://127.0.0.1:8000", "/models", "--quick", "--timeout-s", "15"]
ENTRYPOINT ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=*"]
CMD ["--exit-timeout-secs=30"]
