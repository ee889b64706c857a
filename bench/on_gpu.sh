#!/usr/bin/env bash
# What needs a CUDA card: build, compiled kernels, tests, compute-sanitizer and benchmarks. A step that
# fails does not keep the others from running; the exit status does say so.
#
#   bench/on_gpu.sh [FOLDER]     results; default bench/results
#   STEPS="build tests"          only these steps
#
# On a machine that is lent for minutes, in two calls of less than ten, each made anew by a build:
#
#   STEPS="build kernels tests sanitizer" bench/on_gpu.sh
#   STEPS="build decode loss forward" bench/on_gpu.sh
#
# There $OUT names the folder that comes back: after each step it holds all results, as one file.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:+$(mktemp -d)}}
out=${out:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  case " ${STEPS:-build kernels tests sanitizer decode loss forward} " in
    *" ${name%%-*} "*) ;;
    *) return ;;
  esac
  echo "== [$SECONDS s] $name"
  timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  tail -n 3 "$out/$name.log"
  [ $status -eq 0 ] || failed+=("$name")
  [ $status -eq 0 ] || echo "   status $status"
  [ -z "${OUT:-}" ] || tar -czf "$OUT/on_gpu.tgz" -C "$out" .
}

export R2DLLM_CUDA=1 R2DLLM_REQUIRE_CUDA=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv \
  > "$out/gpu.csv" || failed+=(nvidia-smi)

step build 400 "$python" setup.py build_ext --inplace
step kernels 60 "$python" bench/small_steps.py

# The tests that a card decides; the others have run on the CPU. In processes of their own, if pytest
# can: what is tested waits for the host.
on_card="cuda or synchronisation or devices_agree or captured_graph or streams_at_once or beyond_32"
on_card+=" or does_not_grow or not_the_current or block_length_limit"
processes=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 8")
step tests 300 "$python" -m pytest -q $processes python_tests -k "($on_card) and not recorded" \
  --junit-xml "$out/tests.xml"

# Without torch's caching an access beyond a tensor is one beyond an allocation. Only our kernels; but
# initcheck has to see what others write.
for tool in memcheck racecheck synccheck initcheck; do
  only=(--kernel-name kernel_substring=r2dllm)
  [ $tool != initcheck ] || only=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 150 compute-sanitizer --tool "$tool" \
    --report-api-errors no --error-exitcode 3 "${only[@]}" "$python" bench/small_steps.py
done

quick=(--device cuda --dtype bf16 --memory off --no-compile --seconds 1)
for cache in warm cold; do
  step "decode-$cache" 150 "$python" bench/run.py "${quick[@]}" --cache "$cache" \
    --op decode_step --op token_confidence --op overhead --shape llada-1 --shape llada-8 \
    --shape llada-64 --shape dream-1 --shape dream-8 --json "$out/decode_step_cuda_$cache.json"
done
for loss in sft_loss:llada-64 linear_sft_loss:llada-256; do
  step "loss-${loss%:*}" 150 "$python" bench/run.py "${quick[@]}" --op "${loss%:*}" \
    --shape "${loss#*:}" --share 50 --json "$out/${loss%:*}_cuda.json"
done
step forward 200 "$python" bench/forward.py --no-compile --seconds 1 --json "$out/forward_cuda.json"

if [ ${#failed[@]} -gt 0 ]; then
  echo "on_gpu: failed: ${failed[*]}"
  exit 1
fi
echo "on_gpu: all passed in $SECONDS s"
