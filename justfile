# `just` alone lists the recipes. Each is a command a person can run; CI runs `just ci` through ./test.sh.

python := ".venv/bin/python"

default:
    @just --list

# The demo model on port 8000
serve *args:
    cargo run --release -- {{args}}

# Format, lints, tests, docs, dependency rules: what must be green before a commit
check: fmt clippy test doc deny

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

# Unit and integration tests, in release (the kernels are the product)
test:
    cargo test --release --workspace

# Every CUDA kernel compiles for every architecture, without spills and within its budget: needs no GPU
kernels:
    ./test.sh kernels

# The emulator's self-test, and the kernels on it under sanitizers: needs g++
emulator:
    ./test.sh emulator

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

deny:
    cargo deny --all-features check bans licenses sources

# Needs the advisory database, so the network
advisories:
    cargo deny check advisories

# Black-box tests with the real clients against the release binary
blackbox *args:
    cargo build --release
    {{python}} -m pytest -q tests/python {{args}}

# The console in headless Chromium
console:
    ./test.sh console

# A long run of the scheduler's simulator: `just sim 20000` runs seeds 0 to 19999
sim seeds="20000":
    LORAMUX_SIM_SEEDS=0..{{seeds}} cargo test --release -p loramux-router sim_long -- --nocapture

# Ten thousand adapters under Zipf traffic while their sources fail; writes a report: `just soak 10 soak.json`
soak minutes="10" report="adapter_soak.json":
    cargo build --release
    {{python}} tests/python/adapter_soak.py --minutes {{minutes}} --json {{report}}

# GB/s and GFLOP/s of each op
bench-ops:
    cargo run --release -p loramux-kernels --example bench_ops

# Tokens per second, times to tokens: `just bench --adapters 16 -- --model-id ./model` (docs/benchmarking.md)
bench *args:
    cargo run --release -- bench {{args}}

# All that CI does
ci:
    ./test.sh
