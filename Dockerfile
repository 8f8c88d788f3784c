# syntax=docker/dockerfile:1
# loramux with CUDA's libraries: one image for GPUs and for CPUs. docs/docker.md says how to build and run it.

FROM rust:1.95-bookworm AS builder
# The image's toolchain as it is, without the lints and the formatter that rust-toolchain.toml asks for.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /build
COPY . .
# Needs no CUDA: the libraries are looked for when the server starts.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --release --locked --package loramux --bin loramux \
    && install -D target/release/loramux /out/loramux

# The base image brings the CUDA package source and, as `runtime` would, the settings by which the container toolkit
# mounts the driver (libcuda.so.1). `runtime` itself holds 2 GB of libraries that nothing here opens.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# cuda-nvrtc-13-0 brings libnvrtc and libnvrtc-builtins, libcublas-13-0 libcublasLt. What they look for by name has to be on
# the loader's path: better to know here than at the first start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "cuda-nvrtc-13-0=13.0.*" "libcublas-13-0=13.*" \
    && rm -rf /var/lib/apt/lists/* \
    && ldconfig \
    && found=$(ldconfig -p) \
    && for library in libnvrtc.so.13 libnvrtc-builtins.so.13.0 libcublasLt.so.13; do \
         case $found in *"$library"*) ;; *) echo "$library is not on the loader's path" >&2; exit 1 ;; esac; \
       done

# Not root. A number, so that an orchestrator can check that it is not 0. Any other user works too (`--user`): the folders
# below are open to all.
RUN groupadd --gid 10001 loramux \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin loramux \
    && install --directory --owner loramux --group loramux --mode 1777 /data /opt/loramux/kernels
COPY --from=builder /out/loramux /usr/local/bin/loramux
COPY docker/healthcheck.sh /usr/local/bin/loramux-healthcheck
COPY LICENSE /usr/share/doc/loramux/LICENSE
USER 10001:10001

# Kernels that every image carries: compiled here, without a GPU, so that a first start with one of these models compiles
# nothing. `--build-arg WARM_SHAPES=` skips it. They lie beside /data, which a volume hides.
ENV LORAMUX_KERNEL_CACHE=/opt/loramux/kernels
ARG WARM_SHAPES=all
ARG WARM_ARCHS=sm_80,sm_86,sm_89,sm_90a,sm_100
RUN if [ -n "$WARM_SHAPES" ]; then \
      loramux warm-kernels --shape "$WARM_SHAPES" --arch "$WARM_ARCHS" --kernel-cache "$LORAMUX_KERNEL_CACHE"; \
    fi

ENV LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000 \
    LORAMUX_DATA_DIR=/data
WORKDIR /data
VOLUME /data
EXPOSE 8000
# A large model may take minutes to load: until then a failed probe does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --start-interval=2s --retries=3 CMD ["/usr/local/bin/loramux-healthcheck"]
LABEL org.opencontainers.image.title="loramux" \
      org.opencontainers.image.description="One base model and thousands of LoRA adapters from one device, behind the OpenAI API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/loramux/loramux"
ENTRYPOINT ["loramux"]
