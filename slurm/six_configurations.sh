#!/usr/bin/env bash
# Submit the study of slurm/env.sh, by default three encoders under two masks, as jobs that depend on each other:
#   per configuration: stage 1 -> stage 2 -> probes (trained; solved; of random controls) -> knockout, and stage 2 ->
#   language benchmarks
#   per encoder: a report; once: Table 1 (both parts of Table 1 only if VQA_PYTHON is set)
#   slurm/six_configurations.sh --dry-run    print the plan
#   slurm/six_configurations.sh              print the plan and submit it
#   slurm/six_configurations.sh --rehearse   the same for two steps each on random weights, into $RUNS/rehearsal: tries
#                                            modules, storage, network and time limits before the study; SIZE=1b, tiny
# It can be run again at any time. Finished parts and jobs in the queue are skipped, everything else is submitted, and
# interrupted stages resume from their last checkpoint. To repeat a part, delete its result and all that depend on it.
set -euo pipefail
dry_run='' rehearse=''
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    --rehearse) rehearse=yes ;;
    *) echo "unknown argument $argument; usage: $0 [--dry-run] [--rehearse]" >&2; exit 2 ;;
  esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/env.sh
source slurm/env.sh
if [[ -n $rehearse ]]; then
  export RUNS=$RUNS/rehearsal
  if [[ $(realpath -m "$RUNS") == *[[:space:]]* ]]; then
    echo "the rehearsal cannot run in '$(realpath -m "$RUNS")': use a path without spaces" >&2
    exit 2
  fi
  "$PYTHON" -m llava_bidir rehearse --inputs-only --out "$RUNS" --size "${SIZE:-7b}" --encoder "${ENCODERS%% *}"
  # shellcheck source=/dev/null
  source "$RUNS/inputs/env.sh"
  if [[ -n $VQA_PYTHON && ! -e $VQA_PYTHON ]]; then
    echo "no benchmarks: $VQA_PYTHON does not exist; \`make vqa-venv\` makes it"
    export VQA_PYTHON=
  fi
fi

for_each_part() { # HANDLER: call HANDLER NAME RESULT DEPENDENCIES SBATCH_OPTIONS SCRIPT ARGUMENT... for each part
  local encoder mask run name parts vqa_runs=""
  for encoder in $ENCODERS; do
    parts=""
    for mask in $MASKS; do
      run=$encoder-$mask
      "$1" "$run/stage1" "$run/stage1/hf" "" "$TRAINING" stage1 "$encoder" "$mask"
      "$1" "$run/stage2" "$run/stage2/hf" "$run/stage1" "$TRAINING" stage2 "$encoder" "$mask"
      "$1" "$run/probes" "$run/probes/metrics.json" "$run/stage2" "$PROBING" probes "$encoder" "$mask"
      for name in $SOLVED; do
        "$1" "$run/$name" "$run/$name/metrics.json" "$run/stage2" "$PROBING" solve "$encoder" "$mask" "$name"
      done
      for name in probes solved $RANDOM_LLMS; do
        "$1" "$run/knockout-$name" "$run/$name/knockout.json" "$run/$name" "$ANALYSIS" knockout "$encoder" "$mask" "$name"
        parts+="$run/knockout-$name "
      done
      for name in $RANDOM_ADAPTERS; do parts+="$run/$name "; done
      [[ -z $VQA_PYTHON ]] || "$1" "$run/vqa" "$run/vqa/table1.json" "$run/stage2" "$LANGUAGE" vqa "$encoder" "$mask"
      vqa_runs+="$run/vqa "
    done
    "$1" "$encoder-report/report" "$encoder-report/results.json" "${parts% }" "$ANALYSIS" report "$encoder"
  done
  [[ -z $VQA_PYTHON ]] || "$1" table1/table1 table1/table1.json "${vqa_runs% }" "$ANALYSIS" table1
}

queued_job() { # NAME: print the id of its job if it is in the queue
  squeue --me --noheader --format='%A %Z/%j' | while read -r id path; do
    if [[ $path == "$(pwd -P)/$RUNS/$1" ]]; then echo "$id"; fi
  done
}

print_part() {
  local status="after $3"
  if [[ -e $RUNS/$2 ]]; then
    status=finished
  elif [[ -z $3 ]]; then
    status=""
  fi
  printf '  %-36s %-52s %s\n' "$1" "slurm/$5.sbatch ${*:6}" "$status"
}

declare -A job # part -> job id
submit_part() {
  local name=$1 result=$2 dependency after="" id
  [[ ! -e $RUNS/$result ]] || return 0
  id=$(queued_job "$name")
  if [[ -n $id ]]; then
    echo "  $id  $name (already queued)"
  else
    for dependency in $3; do after+=${job[$dependency]:+:${job[$dependency]}}; done
    mkdir -p "$RUNS/${name%/*}/logs"
    # shellcheck disable=SC2086
    id=$(sbatch --parsable --job-name="$RUNS/$name" --output="$RUNS/${name%/*}/logs/${name#*/}.log" $4 \
      ${after:+--dependency=afterok$after --kill-on-invalid-dep=yes} "slurm/$5.sbatch" "${@:6}")
    id=${id%%;*} # on a federation, the name of the cluster follows
    echo "  $id  $name"
  fi
  job[$name]=$id
}

echo "plan, into $RUNS:"
for_each_part print_part
if [[ -n $dry_run ]]; then exit; fi
for variable in PYTHON ${VQA_PYTHON:+VQA_PYTHON} CAPTIONS CAPTION_IMAGES INSTRUCTIONS INSTRUCTION_IMAGES SEGMENTATION; do
  [[ -e ${!variable} ]] || { echo "slurm/env.sh: $variable=${!variable} does not exist" >&2; exit 1; }
done
echo "submitted:"
for_each_part submit_part
