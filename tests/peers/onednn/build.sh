#!/usr/bin/env bash
# Builds the two programs into OUT (default: a folder under /tmp). DNNL_INCLUDE and DNNL_LIB are oneDNN's folders of headers and of libdnnl.so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-/tmp/loramux-peers/onednn/bin}
mkdir -p "$out"
g++ -O3 -std=c++17 -pthread "$here/machine.cpp" -o "$out/machine"
: "${DNNL_INCLUDE:?folder with oneapi/dnnl/dnnl.hpp}" "${DNNL_LIB:?folder with libdnnl.so}"
g++ -O2 -std=c++17 -I"$DNNL_INCLUDE" "$here/matmul.cpp" -o "$out/matmul" -L"$DNNL_LIB" -ldnnl -fopenmp -Wl,-rpath,"$DNNL_LIB"
echo "$out"
