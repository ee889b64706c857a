#!/usr/bin/env bash
# Everything that needs a CUDA card, in one go: build, compiled kernels, all tests, compute-sanitizer
# and benchmarks. A step that fails does not keep the others from running; the exit status does say so.
#
#   bench/on_gpu.sh [FOLDER]     results; default $OUT, else bench/results
#   STEPS="build tests"          only these steps
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results}}
python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  case " ${STEPS:-build kernels tests sanitizer bench} " in *" ${name%%-*} "*) ;; *) return ;; esac
  echo "== $name"
  local began=$SECONDS
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  tail -n 3 "$out/$name.log"
  echo "   $((SECONDS - began)) s, status $status"
  [ $status -eq 0 ] || failed+=("$name")
}

export R2DLLM_CUDA=1 R2DLLM_REQUIRE_CUDA=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv \
  > "$out/gpu.csv" || failed+=(nvidia-smi)

step build 1200 "$python" setup.py build_ext --inplace
step kernels 900 "$python" cmake/check_kernels.py
step tests 1800 "$python" -m pytest -q python_tests --junit-xml "$out/tests.xml"
# Without torch's caching an access beyond a tensor is one beyond an allocation. Only our kernels.
for tool in memcheck racecheck initcheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 900 compute-sanitizer --tool "$tool" \
    --error-exitcode 3 --kernel-name kernel_substring=r2dllm "$python" bench/small_steps.py
done
for cache in warm cold; do
  step "bench-decode-$cache" 900 "$python" bench/run.py --device cuda --cache "$cache" \
    --op decode_step --op token_confidence --op overhead --dtype bf16 --shape llada-1 \
    --shape llada-8 --shape llada-64 --shape dream-1 --shape dream-8 \
    --json "$out/decode_step_cuda_$cache.json"
done
for loss in sft_loss:llada-64 linear_sft_loss:llada-256; do
  step "bench-${loss%:*}" 900 "$python" bench/run.py --device cuda --op "${loss%:*}" \
    --shape "${loss#*:}" --dtype bf16 --share 50 --json "$out/${loss%:*}_cuda.json"
done
for batch in 1 8; do
  step "bench-forward-$batch" 900 "$python" bench/forward.py --batch "$batch" \
    --json "$out/forward_cuda_$batch.json"
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "on_gpu: failed: ${failed[*]}"
  exit 1
fi
echo "on_gpu: all passed"
