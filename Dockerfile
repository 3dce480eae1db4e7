# An image that builds and validates bundles: docker build -t dinoexport . && docker run -v "$PWD/bundles:/bundles" \
#     dinoexport build vits14 --weights synthetic:0 --out /bundles/vits14
# PyPI's torch brings CUDA along; --build-arg PIP_EXTRA_INDEX_URL=ADDRESS of PyTorch's index of CPU wheels keeps that out.
# The serving image, with Triton, is not here yet.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dinoexport dinoexport
COPY recipes recipes
COPY validate validate
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG PIP_EXTRA_INDEX_URL=""
LABEL org.opencontainers.image.title="dinoexport" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
# A virtual environment: Debian's own python3 refuses packages outside one.
RUN python3 -m venv /opt/dinoexport \
    && /opt/dinoexport/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt \
       "$(echo /tmp/wheels/*.whl)[export,cpu]" \
    && rm -rf /tmp/wheels /tmp/constraints.txt \
    && useradd --create-home --uid 10001 dinoexport \
    && mkdir /bundles && chown dinoexport /bundles
ENV PATH=/opt/dinoexport/bin:$PATH
USER dinoexport
WORKDIR /bundles
ENTRYPOINT ["dinoexport"]
CMD ["--help"]
