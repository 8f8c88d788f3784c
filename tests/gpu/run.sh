#!/usr/bin/env bash
# Checks and measures loramux on a machine with a GPU. Needs the binary, the driver and CUDA's libraries; no Rust.
#
#   tests/gpu/run.sh BINARY [OUT_DIR] [--only doctor,full,memcheck,racecheck,bench-a,bench-b] [--device cuda:0]
#                    [--model-shape NAME] [--switches N] [--commit REVISION]
#
# Each step has a time limit and writes OUT_DIR/<step>.json and OUT_DIR/<step>.txt. The exit code is 0 if every step that
# ran has passed. Steps whose tool is not installed (compute-sanitizer) are skipped, and the summary says so.
set -u

STEPS=(doctor full memcheck racecheck bench-a bench-b)
declare -A LIMIT_S=([doctor]=180 [full]=560 [memcheck]=560 [racecheck]=560 [bench-a]=560 [bench-b]=560)

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -ge 1 ] || usage
binary=$1; shift
out=gpu-results; device=cuda:0; shape=llama-3.1-8b; switches=100000; only=; commit=
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then out=$1; shift; fi
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --only) only=$2 ;;
    --device) device=$2 ;;
    --model-shape) shape=$2 ;;
    --switches) switches=$2 ;;
    --commit) commit=$2 ;;
    *) usage ;;
  esac
  shift 2
done
[ -x "$binary" ] || { echo "$binary is no program that can be run" >&2; exit 2; }
mkdir -p "$out" || exit 2

# CUDA's libraries as Python packages: loramux looks there too, but asks python3 last; the sanitizer needs them at once.
packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
for dir in "$packages/nvidia/cu13/lib" "$packages/nvidia/cuda_nvrtc/lib"; do
  if [ -d "$dir" ]; then
    export LORAMUX_CUDA_LIBRARIES="${LORAMUX_CUDA_LIBRARIES:+$LORAMUX_CUDA_LIBRARIES,}$dir"
  fi
done
export LORAMUX_KERNEL_CACHE=${LORAMUX_KERNEL_CACHE:-$out/kernels}

wanted() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }
for step in ${only//,/ }; do
  [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "unknown step $step; there are ${STEPS[*]}" >&2; exit 2; }
done

summary=(); failed=0
finish() { # step, exit code, seconds
  local word=ok
  if [ "$2" -eq 124 ] || [ "$2" -eq 137 ]; then word="FAILED: over ${LIMIT_S[$1]} s"
  elif [ "$2" -ne 0 ]; then word="FAILED: exit code $2"; fi
  [ "$2" -eq 0 ] || failed=1
  summary+=("$(printf '  %-10s %5ss  %s' "$1" "$3" "$word")")
}

run() { # step, command...
  local step=$1 started=$SECONDS code; shift
  echo "== $step: $*"
  timeout --kill-after=10 "${LIMIT_S[$step]}" "$@" > "$out/$step.txt" 2>&1
  code=$?
  tail -n 60 "$out/$step.txt"
  finish "$step" $code $((SECONDS - started))
}

sanitize() { # step
  wanted "$1" || return 0
  if ! command -v compute-sanitizer > /dev/null; then
    summary+=("$(printf '  %-10s %6s  skipped: compute-sanitizer is not on PATH' "$1" "")")
    return 0
  fi
  run "$1" compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 20 \
    "$binary" doctor --skip-speed --device "$device" --out "$out/$1.json"
}

command -v nvidia-smi > /dev/null && nvidia-smi > "$out/nvidia-smi.txt" 2>&1

if wanted doctor; then run doctor "$binary" doctor --device "$device" --out "$out/doctor.json"; fi
if wanted full; then run full "$binary" doctor --full --switches "$switches" --device "$device" --out "$out/full.json"; fi
sanitize memcheck
sanitize racecheck
for tier in A B; do
  step=bench-${tier,,}
  if wanted "$step"; then
    run "$step" "$binary" doctor --bench "$tier" --model-shape "$shape" --device "$device" --time-limit 480 \
      ${commit:+--commit "$commit"} --out "$out/$step.json"
  fi
done

echo
echo "Results in $out"
[ ${#summary[@]} -eq 0 ] || printf '%s\n' "${summary[@]}"
exit $failed
