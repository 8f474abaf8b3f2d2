#!/usr/bin/env bash
# Submit the study of slurm/env.sh, by default three encoders under two masks, as jobs that depend on each other:
# stage 1 -> stage 2 -> `probes study` of a mask -> that of both masks, with the report; and stage 2 -> benchmarks.
#   slurm/submit.sh --dry-run    print the calls of sbatch, with names in place of job numbers
# It can be run again at any time: finished parts are skipped, and a job starts after earlier ones of its name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/env.sh
source slurm/env.sh
case $* in
  '') dry_run='' ;;
  --dry-run) dry_run=yes ;;
  *) echo "unknown argument $1; usage: $0 [--dry-run]" >&2; exit 2 ;;
esac
missing=''
for variable in PYTHON ${VQA_PYTHON:+VQA_PYTHON} CAPTIONS CAPTION_IMAGES INSTRUCTIONS INSTRUCTION_IMAGES SEGMENTATION; do
  if [[ -n $dry_run || -e ${!variable} ]] || command -v "${!variable}" >/dev/null; then continue; fi
  echo "slurm/env.sh: $variable=${!variable} does not exist" >&2
  missing=yes
done
[[ -z $missing ]] || exit 1

submit() { # NAME RESULT DEPENDENCY OPTIONS SCRIPT ARGUMENT...: put the job's number, ":" first, into id; "" if finished
  id=''
  [[ ! -e $RUNS/$2 ]] || return 0
  # shellcheck disable=SC2206
  local call=(sbatch --parsable --job-name="$RUNS/$1" --output="$RUNS/logs/${1//\//-}.log" $4 --kill-on-invalid-dep=yes)
  call+=(--dependency="singleton${3:+,afterok$3}" "slurm/$5.sbatch" "${@:6}")
  if [[ -n $dry_run ]]; then
    echo "${call[*]}"
    id=$1
  else
    mkdir -p "$RUNS/logs"
    id=$("${call[@]}")
    id=${id%%;*} # on a federation, the name of the cluster follows
    echo "$id $1"
  fi
  id=:$id
}

for encoder in $ENCODERS; do
  studies=''
  for mask in $MASKS; do
    run=$encoder-$mask
    submit "$run/stage1" "$run/stage1/hf" "" "$TRAINING" stage 1 "$encoder" "$mask"
    submit "$run/stage2" "$run/stage2/hf" "$id" "$TRAINING" stage 2 "$encoder" "$mask"
    stage2=$id
    # shellcheck disable=SC2086
    submit "$run/study" "$encoder/report/results.json" "$stage2" "$NODE" study "$encoder" "$mask" --arms $ARMS --only $STEPS
    studies+=$id
    [[ -z $VQA_PYTHON ]] || submit "$run/vqa" "$run/vqa/table1.json" "$stage2" "$NODE" vqa "$encoder" "$mask"
  done
  # shellcheck disable=SC2086
  submit "$encoder/report" "$encoder/report/results.json" "$studies" "$ONE_GPU" study "$encoder" "$MASKS" --arms $ARMS
done
