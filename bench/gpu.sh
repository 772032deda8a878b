#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: Python, torch, triton, nvcc, compute-sanitizer; no network.
#
#   bench/gpu.sh STAGE [WHEELS]
#
# STAGE   quick     gpu_quick.py: nine minutes of evidence, most valuable first; run this one before the others
#         test      pytest -m gpu
#         racecheck compute-sanitizer racecheck over every operation on small shapes (quick runs memcheck)
#         facts     rates of the device that the planner can read (suite facts)
#         bench     kernels at every real size, the eager and compiled block
#         methods   the paper's four methods at 1.3B
#         methods-several-steps  their neighbors at 1.3B beside PRFL with 1 point: partial chains, one-step rewards, guidance
#         rollout   the rollout by option at 1.3B
#         rollout-14b  the same with a part of 14B at 480p
#         step      a PRFL step by part at 1.3B: eager, compiled, prfl_fast; REFERENCE=PATH adds the checkout of
#                   HY-Video-PRFL at PATH, which needs flash_attn
#         step-14b  the same with a part of 14B at 480p and at 720p
#         memory    checkpoint policies at 1.3B, all of 14B trained at 480p within 141 GiB
#         memory-720p  policies at 14B and 720p, its LoRA plans within 48 and 24 GiB
#         all       these in this order
# WHEELS  a folder of wheels for what the machine lacks (diffusers, say); installed without an index
#
# WHEELS and REFERENCE are relative to where this is called.
#
# quick passes the arguments after WHEELS to gpu_quick.py: `bench/gpu.sh quick "" --dry --device cpu` tries it on a CPU.
#
# Results go to $OUT (bench-out unless set). A step that fails is listed at the end and in failures.txt and does not
# stop the next one; a stage ends within ten minutes.
set -uo pipefail

# absolute PATH: seen from where the script was called; nothing for nothing.
absolute() {
    case "$1" in
        "" | /*) printf '%s' "$1" ;;
        *) printf '%s' "$PWD/$1" ;;
    esac
}

stage=${1:-}
wheels=$(absolute "${2:-}")
quick=("${@:3}")
REFERENCE=$(absolute "${REFERENCE:-}")
cd "$(dirname "$0")/.."
stages=(quick test racecheck facts bench methods methods-several-steps rollout rollout-14b step step-14b memory memory-720p)
if [[ "$stage" == *" "* || " ${stages[*]} all " != *" ${stage:-none} "* ]]; then
    listed=$(printf '%s, ' "${stages[@]}")
    echo "bench/gpu.sh: STAGE is '$stage', expected ${listed%, } or all" >&2
    exit 2
fi
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then
    echo "bench/gpu.sh: WHEELS is '$wheels', which is not a folder" >&2
    exit 2
fi
OUT=${OUT:-bench-out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failures=()

# step SECONDS NAME COMMAND…: run with a time limit, log to $OUT/NAME.log, append to failures.
step() {
    local limit=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        failures+=("$name (status $status)")
        echo "== $name: status $status" >&2
    fi
}

# suite LIMIT NAME SUITE [PRESET [OPTION…]]: run one suite, with its results in $OUT/NAME.
suite() {
    step "$1" "$2" "$python" bench/run.py --suite "$3" ${4:+--preset "$4"} --out "$OUT/$2" "${@:5}"
}

install() {
    local site
    site=$(mktemp -d)
    if [ -n "$wheels" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$site" "$wheels"/*.whl || failures+=("wheels")
    fi
    # Built where it runs, into a folder of its own; nothing of the machine's Python changes.
    PRFL_FAST_CUDA=${PRFL_FAST_CUDA:-auto} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} \
        "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" . \
        || failures+=("install")
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    (cd / && "$python" -c "import prfl_fast; print('prfl_fast', prfl_fast.__version__, prfl_fast.__file__)")
}

run_test() {
    # Without the safe path, the checkout's prfl_fast would be imported in place of the installed one, and without the
    # CUDA extension.
    step 540 gpu-tests env PYTHONSAFEPATH=1 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
}

run_quick() {
    # gpu_quick.py imports the installed prfl_fast, not the checkout's.
    step 600 quick env PYTHONSAFEPATH=1 PYTHONPATH="$PWD/bench:$PYTHONPATH" "$python" bench/gpu_quick.py --out "$OUT" "${quick[@]+"${quick[@]}"}"
}

run_racecheck() {
    # First without: it compiles the kernels, which the tool would watch for minutes, and checks their results.
    step 150 racecheck-none "$python" bench/sanitize.py
    step 210 racecheck compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name-exclude \
        kernel_substring=2at6native "$python" bench/sanitize.py
}

run_facts() { suite 280 facts facts; }

run_bench() {
    suite 260 block-1.3b block wan1.3b-480p
    suite 190 kernels-1.3b kernels wan1.3b-480p
    suite 180 kernels-14b-480p kernels wan14b-480p
    suite 200 kernels-14b-720p kernels wan14b-720p
}

run_methods() {
    local names="RGB ReFL, all frames;RGB ReFL, first frame;PRFL, 1 point;PRFL, 5 points"
    PRFL_FAST_BENCH_METHODS=$names suite 560 methods-1.3b methods wan1.3b-480p
}

run_methods-several-steps() {
    # Not the whole chain: its 40 steps alone take minutes, FLOPs counted in a run of their own. Nor DRaFT-10, which
    # lies between DRaFT-1 and AlignProp's half a chain. The others are compared with PRFL, 1 point.
    local late="PRFL, 1 point;DRaFT-1;DRaFT-LV;ControlNet++;InstructVideo;RG-LCD;ReNO, one-step generator"
    local long="PRFL, 1 point;AlignProp;Flow-NRG, a guided sample"
    PRFL_FAST_BENCH_METHODS=$late suite 290 methods-late methods wan1.3b-480p
    PRFL_FAST_BENCH_METHODS=$long suite 290 methods-long methods wan1.3b-480p
}

run_rollout() { suite 560 rollout-1.3b rollout wan1.3b-480p; }
run_rollout-14b() { suite 560 rollout-14b-480p rollout wan14b-480p; }

baselines=eager,compiled${REFERENCE:+,reference:$REFERENCE}

run_step() { suite 560 step-1.3b step wan1.3b-480p --baseline "$baselines"; }

run_step-14b() {
    suite 200 step-14b-480p step wan14b-480p --baseline "$baselines"
    suite 390 step-14b-720p step wan14b-720p --baseline "$baselines"
}

run_memory() {
    suite 240 memory-1.3b memory wan1.3b-480p
    suite 320 memory-14b-480p memory wan14b-480p
}

run_memory-720p() { suite 560 memory-14b-720p memory wan14b-720p; }

install
[ "$stage" = all ] || stages=("$stage")
for each in "${stages[@]}"; do
    "run_$each"
done

printf '%s\n' "${failures[@]+"${failures[@]}"}" > "$OUT/failures.txt"
if [ ${#failures[@]} -gt 0 ]; then
    echo "failed: ${failures[*]}" >&2
    exit 1
fi
echo "all steps of '$stage' finished; results in $OUT"
