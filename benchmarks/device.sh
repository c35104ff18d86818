#!/usr/bin/env bash
# device.sh OUT [SECONDS]: everything that only a GPU can tell, in one command, within SECONDS (default 1500).
#
# Needs Linux, an NVIDIA GPU, CUDA (nvcc, compute-sanitizer), Python with torch >= 2.10, pybind11, cmake, ninja, pytest, numpy, rich,
# safetensors; no network. Builds in place for this GPU, runs the suite on the device's rungs, plants the CUDA bugs, runs
# compute-sanitizer's four tools over a slice, then measures: rows that are missing first, then the oldest. Run again with
# the same OUT, it goes on where it was stopped; a stage that failed is run again. Where there is no GPU it rehearses on the CPU.
#
# Leaves in OUT: a log a stage, `stages` (what is done), the machine's result file and README.md, which has its rows as tables.
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 || ! ${2:-1500} =~ ^[0-9]+$ ]]; then
    echo "usage: benchmarks/device.sh OUT [SECONDS]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
total=${2:-1500}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
touch "$out/stages"

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 2
if [[ $device == cuda ]]; then
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
    rungs=cuda,triton slice="cuda" cases=6 only=""
else
    echo "no GPU: a rehearsal on the CPU's rungs"
    export FORCE_CUDA=0
    rungs=avx2,cpu slice="geglu and cpu-avx2" cases=2 only="negative bit"
fi
diffkernels=("$python" -c 'import sys; from diffkernels.cli import main; sys.exit(main())')

left() { echo $((total - SECONDS)); }

# stage NAME SHARE COMMAND...: in at most SHARE percent of the time that is left; its output goes to NAME.log.
failed=0
stage() {
    local name=$1 time=$(($(left) * $2 / 100)) begin=$SECONDS
    shift 2
    if grep -qx "$name" "$out/stages"; then
        echo "$name: done before"
        return
    fi
    if ((time < 5)); then
        echo "$name: no time is left"
        failed=1
        return
    fi
    timeout --kill-after=10 --signal=INT "$time" "$@" >"$out/$name.log" 2>&1
    local code=$?
    if ((code == 0)); then
        echo "$name" >>"$out/stages"
        echo "$name: done in $((SECONDS - begin)) s"
    elif [[ $name == measure && $code == 124 ]]; then # its rows are kept; run again, it goes on with those that are missing
        echo "$name: the time is up after $((SECONDS - begin)) s"
    else
        echo "$name: FAILED with code $code after $((SECONDS - begin)) s, see $name.log"
        tail -n 3 "$out/$name.log" | sed 's/^/    /'
        failed=1
    fi
}

build() {
    "$python" setup.py build_ext --inplace && "${diffkernels[@]}" info --md && "${diffkernels[@]}" doctor
}
suite() {
    "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py tests/test_ops.py tests/test_verify.py tests/test_reliability.py \
        tests/test_noise.py tests/test_gradients.py tests/test_sampling.py -k "$slice"
}
mutations() { "$python" tests/mutation.py --device "$device" ${only:+--only "$only"}; }
sanitizer() {
    local tool rung
    if ! command -v compute-sanitizer; then
        echo "compute-sanitizer is not installed: this stage shows nothing"
        [[ $device == cpu ]]
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        for rung in ${rungs//,/ }; do
            echo "+ $tool $rung"
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
                "${diffkernels[@]}" verify --rung "$rung" --cases "$cases" || return
        done
    done
}
measure() { # the rung that runs first has most of the time
    local rung budget=$(($1 * 6 / 10))
    for rung in ${rungs//,/ }; do
        "${diffkernels[@]}" bench --device "$device" --rung "$rung" --budget "$budget" --out "$out" || return
        budget=$(($1 * 3 / 10))
    done
}

run() { # a function, in a shell of its own, so that `timeout` can end it
    declare -p python diffkernels device rungs slice cases only out
    declare -f build suite mutations sanitizer measure
    echo "$*"
}
stage build 60 bash -c "$(run build)"
stage suite 45 bash -c "$(run suite)"
stage mutations 40 bash -c "$(run mutations)"
stage sanitizer 50 bash -c "$(run sanitizer)"
stage measure 98 bash -c "$(run measure "$(left)")"
"${diffkernels[@]}" bench --report --out "$out" || failed=1
echo "$((SECONDS)) s; what is in $out is ready for benchmarks/results: $(cd "$out" && ls -- *.json 2>/dev/null | tr '\n' ' ')"
exit "$failed"
