#!/usr/bin/env bash
# Submit the study of slurm/env.sh, by default three encoders under two masks, as jobs that depend on each other:
# stage 1 -> stage 2 -> `probes study` of a mask -> that of both masks, with the report; and stage 2 -> benchmarks.
#   slurm/submit.sh               check all settings and submit what is not finished
#   slurm/submit.sh --dry-run     check all settings and print a table of the jobs
#   slurm/submit.sh --dry-run -v  print the calls of sbatch, too, with names in place of job numbers
# It can be run again at any time: finished parts are skipped, and a job starts after earlier ones of its name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run='' verbose=''
for word in "$@"; do
  case $word in
    --dry-run) dry_run=yes ;;
    -v) verbose=yes ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' slurm/submit.sh; exit ;;
    *) echo "unknown argument $word; usage: $0 [--dry-run [-v]] [--help]" >&2; exit 2 ;;
  esac
done
# shellcheck source=slurm/env.sh
source slurm/env.sh
# shellcheck source=slurm/checks.sh
source slurm/checks.sh
rows=()

submit() { # NAME RESULT DEPENDENCY OPTIONS SCRIPT ARGUMENT...: put the job's number, ":" first, into id; "" if finished
  id=''
  [[ ! -e $RUNS/$2 ]] || return 0
  # shellcheck disable=SC2206
  local call=(sbatch --parsable --job-name="$RUNS/$1" --output="$RUNS/logs/${1//\//-}.log" $4 --kill-on-invalid-dep=yes)
  call+=(--dependency="singleton${3:+,afterok$3}" "slurm/$5.sbatch" "${@:6}")
  if [[ -n $dry_run ]]; then
    [[ -z $verbose ]] || echo "${call[*]}"
    local shape costs=''
    case $4 in
      "$TRAINING") shape="$NODES $TASKS_PER_NODE $TRAINING_TIME" ;;
      "$NODE") shape="1 $TASKS_PER_NODE $NODE_TIME" ;;
      *) shape="1 1 $ONE_GPU_TIME" ;;
    esac
    if [[ $5 == stage ]]; then costs=${estimates[$6 $7]:-}; fi
    rows+=("$1 ${shape% *} $(seconds "${shape##* }" || echo 0) ${costs:-- -} ${3//:/ }")
    id=$1
  else
    mkdir -p "$RUNS/logs"
    id=$("${call[@]}")
    id=${id%%;*} # on a federation, the name of the cluster follows
    echo "$id $1"
  fi
  id=:$id
}

print_table() {
  printf '%s\n' "${rows[@]}" | awk '
    BEGIN { format = "%-28s %12s %12s %16s %12s  %s\n"
      printf format, "job", "nodes x GPUs", "hours asked", "hours estimated", "GB on a GPU", "after" }
    { after = $7; for (i = 8; i <= NF; i++) after = after ", " $i
      printf format, $1, $2 " x " $3, sprintf("%.1f", $4 / 3600), $5, $6, after
      asked += $2 * $3 * $4 / 3600; estimated += $2 * $3 * $5 }
    END { printf "%d jobs: %.0f GPU-hours asked, %.0f estimated for the stages\n", NR, asked, estimated }'
}

stop_if_wrong() {
  [[ ${#wrong[@]} == 0 ]] && return
  printf 'slurm/env.sh: %s\n' "${wrong[@]}" >&2
  exit 1
}

check_settings
if [[ -z $dry_run ]]; then stop_if_wrong; fi
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
if [[ -n $dry_run ]]; then
  print_table
  stop_if_wrong
fi
