#!/usr/bin/env bash
# Submits the whole study: three encoders under two masks (slurm/env.sh says what and where), as jobs that wait for each
# other: stage 1 -> stage 2 -> probes -> knockout for each configuration, and a report for each encoder. Where there is
# the environment of lmms-eval, also stage 2 -> language benchmarks, and Table 1 of them all.
#   slurm/six_configurations.sh --dry-run    prints the plan
#   slurm/six_configurations.sh              prints it and submits
# Run again at any time: what is finished or still in the queue is left alone, the rest is submitted, and a stage that
# was cut short goes on from its last checkpoint. Delete a result, and those made from it, to have it made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/env.sh
source slurm/env.sh

parts() { # HANDLER: calls HANDLER NAME RESULT NEEDS SBATCH_OPTIONS SCRIPT ARGUMENT... for each, in order
  local encoder mask run all tasks=""
  for encoder in $ENCODERS; do
    all=""
    for mask in $MASKS; do
      run=$encoder-$mask
      "$1" "$run/stage1" "$run/stage1/hf" "" "$TRAINING" stage1 "$encoder" "$mask"
      "$1" "$run/stage2" "$run/stage2/hf" "$run/stage1" "$TRAINING" stage2 "$encoder" "$mask"
      "$1" "$run/probes" "$run/probes/metrics.json" "$run/stage2" "$PROBING" probes "$encoder" "$mask"
      "$1" "$run/knockout" "$run/probes/knockout.json" "$run/probes" "$ANALYSIS" knockout "$encoder" "$mask"
      all+="$run/knockout "
      [[ -z $VQA_PYTHON ]] || "$1" "$run/vqa" "$run/vqa/table1.json" "$run/stage2" "$LANGUAGE" vqa "$encoder" "$mask"
      tasks+="$run/vqa "
    done
    "$1" "$encoder-report/report" "$encoder-report/results.json" "${all% }" "$ANALYSIS" report "$encoder"
  done
  [[ -z $VQA_PYTHON ]] || "$1" table1/table1 table1/table1.json "${tasks% }" "$ANALYSIS" table1
}

queued() { # NAME: its job's number, if it waits or runs
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
  printf '  %-30s %-38s %s\n' "$1" "slurm/$5.sbatch ${*:6}" "$status"
}

declare -A job # part -> number of its job
submit_part() {
  local name=$1 result=$2 need after="" id
  [[ ! -e $RUNS/$result ]] || return 0
  id=$(queued "$name")
  if [[ -n $id ]]; then
    echo "  $id  $name (in the queue already)"
  else
    for need in $3; do after+=${job[$need]:+:${job[$need]}}; done
    mkdir -p "$RUNS/${name%/*}/logs"
    # shellcheck disable=SC2086
    id=$(sbatch --parsable --job-name="$RUNS/$name" --output="$RUNS/${name%/*}/logs/${name#*/}.log" $4 \
      ${after:+--dependency=afterok$after --kill-on-invalid-dep=yes} "slurm/$5.sbatch" "${@:6}")
    id=${id%%;*} # of several clusters, the name of this one follows
    echo "  $id  $name"
  fi
  job[$name]=$id
}

echo "plan, into $RUNS:"
parts print_part
if [[ ${1:-} == --dry-run ]]; then exit; fi
for variable in PYTHON ${VQA_PYTHON:+VQA_PYTHON} CAPTIONS CAPTION_IMAGES INSTRUCTIONS INSTRUCTION_IMAGES SEGMENTATION; do
  [[ -e ${!variable} ]] || { echo "slurm/env.sh: $variable=${!variable} does not exist" >&2; exit 1; }
done
echo "submitted:"
parts submit_part
