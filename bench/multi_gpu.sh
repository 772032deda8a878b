#!/usr/bin/env bash
# Evidence from a machine with several GPUs: doctor on all ranks, and the time of a PRFL step by layout at 1.3B-480p.
#
#   bench/multi_gpu.sh [--dry]
#
# --dry  two CPU ranks and a tiny model, to try the script
#
# Results go to $OUT (bench/results/multi_gpu unless set), one JSON file per layout and doctor.json. The script ends with
# status 1 if a step failed, and runs the others before.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
OUT=${OUT:-bench/results/multi_gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
failures=0

if [ "${1:-}" = --dry ]; then
    ranks=2
    options=(--device cpu --preset tiny --steps 1 --inference-steps 2)
    layouts=("1 2" "2 2")
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
else
    ranks=$("$python" -c "import torch; print(torch.cuda.device_count())")
    if [ "$ranks" -lt 2 ]; then
        echo "bench/multi_gpu.sh: $ranks GPUs, expected 2 or more; --dry runs on CPUs" >&2
        exit 2
    fi
    options=()
    layouts=("1 1" "$ranks 1" "$ranks 2" "$ranks 4") # 12 heads take 2 and 4 ranks
fi

launch() {
    timeout --signal=INT --kill-after=10 540 "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
}

launch -m prfl_fast.cli doctor --json > "$OUT/doctor.json" || failures=1
for layout in "${layouts[@]}"; do
    read -r shard sequence <<< "$layout"
    if [ $((ranks % sequence)) -ne 0 ]; then
        continue
    fi
    launch bench/multi_gpu.py --shard "$shard" --sequence "$sequence" --out "$OUT/shard-$shard-sequence-$sequence.json" \
        "${options[@]+"${options[@]}"}" || failures=1
done
exit "$failures"
