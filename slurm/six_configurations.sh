#!/usr/bin/env bash
# Submit the study of slurm/env.sh, by default three encoders under two masks, as jobs that depend on each other:
#   per configuration: stage 1 -> stage 2 -> `probes study` (in one job, or one per arm), and stage 2 -> benchmarks
#   per encoder: starvation and report; once: Table 1 (benchmarks and Table 1 only if VQA_PYTHON is set)
#   slurm/six_configurations.sh --dry-run    print the plan, with the GPU hours of the training jobs if REHEARSAL or MFU is known
#   slurm/six_configurations.sh              print the plan and submit it
#   slurm/six_configurations.sh --rehearse   the same for two steps each on random weights, into $RUNS/rehearsal: tries
#                                            modules, storage, network and time limits before the study; SIZE=1b, tiny
# It can be run again at any time. Finished parts and jobs in the queue are skipped, everything else is submitted, and
# interrupted ones go on where they were. To repeat a part, delete its result and all that depend on it.
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

check_paths() { # VARIABLE...: exit and name all whose path does not exist
  local variable missing='' advice
  for variable in "$@"; do
    if [[ -e ${!variable} ]] || command -v "${!variable}" >/dev/null; then continue; fi
    case $variable in PYTHON) advice='; `make venv` makes it' ;; VQA_PYTHON) advice='; `make vqa-venv` makes it' ;; *) advice='' ;; esac
    echo "slurm/env.sh: $variable=${!variable} does not exist$advice" >&2
    missing=yes
  done
  [[ -z $missing ]] || exit 1
}

check_environment() { # exit unless the packages and Slurm are there
  local import='from importlib.util import find_spec; exit(not (find_spec("lightning") and find_spec("probes")))'
  if ! "$PYTHON" -c "$import" 2>/dev/null; then
    echo "slurm/env.sh: PYTHON=$PYTHON has no llava-bidir; \`make venv\` makes an environment" >&2
    exit 1
  fi
  if ! squeue --me >/dev/null 2>&1; then
    echo "Slurm does not answer to squeue: submit jobs on a cluster's login node. \`probes rehearse\` needs no Slurm" >&2
    exit 1
  fi
}

if [[ -n $rehearse ]]; then
  export RUNS=$RUNS/rehearsal
  if [[ $(realpath -m "$RUNS") == *[[:space:]]* ]]; then
    echo "the rehearsal cannot run in '$(realpath -m "$RUNS")': use a path without spaces" >&2
    exit 2
  fi
  if [[ -n $dry_run ]]; then
    # what of the inputs' settings the plan shows (probes/rehearsal/inputs.py); nothing is written
    export ENCODERS=${ENCODERS%% *} ARMS="trained random0 random1 permuted0 permuted1"
  else
    check_paths PYTHON
    check_environment
    "$PYTHON" -m probes rehearse --inputs-only --out "$RUNS" --size "${SIZE:-7b}" --encoder "${ENCODERS%% *}"
    # shellcheck source=/dev/null
    source "$RUNS/inputs/env.sh"
  fi
  if [[ -n $VQA_PYTHON && ! -e $VQA_PYTHON ]]; then
    echo "no benchmarks: $VQA_PYTHON does not exist; \`make vqa-venv\` makes it"
    export VQA_PYTHON=
  fi
fi

for_each_part() { # HANDLER: call HANDLER NAME RESULTS DEPENDENCIES SBATCH_OPTIONS SCRIPT ARGUMENT... for each part
  local encoder mask run arm studies vqa_runs=""
  for encoder in $ENCODERS; do
    studies=""
    for mask in $MASKS; do
      run=$encoder-$mask
      "$1" "$run/stage1" "$run/stage1/hf" "" "$TRAINING" stage1 "$encoder" "$mask"
      "$1" "$run/stage2" "$run/stage2/hf" "$run/stage1" "$TRAINING" stage2 "$encoder" "$mask"
      if [[ -z $SPLIT ]]; then
        study_part "$1" "$run/study" "$run/stage2" "$ARMS"
      else
        study_part "$1" "$run/study-trained" "$run/stage2" trained
        for arm in $ARMS; do
          [[ $arm == trained ]] || study_part "$1" "$run/study-$arm" "$run/study-trained" "$arm"
        done
      fi
      [[ -z $VQA_PYTHON ]] || "$1" "$run/vqa" "$run/vqa/table1.json" "$run/stage2" "$NODE" vqa "$encoder" "$mask"
      vqa_runs+="$run/vqa "
    done
    "$1" "$encoder/report" "$encoder/report/results.json" "${studies% }" "$ONE_GPU" \
      study "$encoder" "$MASKS" --only starvation report
  done
  [[ -z $VQA_PYTHON ]] || "$1" table1/table1 table1/table1.json "${vqa_runs% }" "$ONE_GPU" table1
}

study_part() { # HANDLER NAME DEPENDENCY ARMS: the study of some arms; uses the loop's variables
  local arm results="$2.done"
  for arm in $4; do results+=" $encoder/$mask/$arm/metrics.json"; done
  # shellcheck disable=SC2086
  "$1" "$2" "$results" "$3" "$NODE" study "$encoder" "$mask" --arms $4 --only $STEPS
  studies+="$2 "
}

is_finished() { # RESULTS: all of them are there
  local file
  for file in $1; do [[ -e $RUNS/$file ]] || return 1; done
}

queued_job() { # NAME: print the id of its job if it is in the queue
  squeue --me --noheader --format='%A %Z/%j' | while read -r id path; do
    if [[ $path == "$(pwd -P)/$RUNS/$1" ]]; then echo "$id"; fi
  done
}

print_part() {
  local status="after $3"
  if is_finished "$2"; then
    status=finished
  elif [[ -z $3 ]]; then
    status=""
  fi
  printf '  %-36s %-52s %s\n' "$1" "slurm/$5.sbatch ${*:6}" "$status"
}

print_hours() { # of the training jobs that are not finished
  local name hours total=0 gpus=$((NODES * TASKS_PER_NODE)) source=() known
  if [[ -e $REHEARSAL ]]; then
    source=(--rehearsal "$REHEARSAL")
  elif [[ -n $MFU ]]; then
    # shellcheck disable=SC2206
    source=(--mfu "$MFU" --peak-tflops "$PEAK_TFLOPS" --text-tokens $TEXT_TOKENS)
    source+=(--llm "$LLM" --encoder-configs "$ENCODER_CONFIGS")
  else
    echo "GPU hours: unknown. \`probes rehearse --out $(dirname "$REHEARSAL")\` measures them; MFU=0.4 assumes a speed"
    return
  fi
  if ! [[ -x $PYTHON ]] && ! command -v "$PYTHON" >/dev/null; then
    echo "GPU hours: unknown. PYTHON=$PYTHON does not exist; \`make venv\` makes it"
    return
  fi
  # shellcheck disable=SC2086
  if ! known=$(PYTHONPATH=. "$PYTHON" slurm/gpu_hours.py "${source[@]}" --masks $MASKS -- $ENCODERS 2>&1); then
    echo "GPU hours: unknown. ${known##*$'\n'}"
    return
  fi
  while read -r name hours; do
    if [[ $name == at ]]; then
      echo "GPU hours, at $hours:"
    elif [[ $name == */stage* ]] && ! is_finished "$name/hf"; then
      printf '  %-36s %10.1f   %.1f h on %d GPUs\n' "$name" "$hours" "$(awk "BEGIN {print $hours / $gpus}")" "$gpus"
      total=$(awk "BEGIN {print $total + $hours}")
    fi
  done <<<"$known"
  printf '  %-36s %10.1f   without studies and benchmarks\n' "all" "$total"
}

declare -A job # part -> job id
submit_part() {
  local name=$1 dependency after="" id
  ! is_finished "$2" || return 0
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
if [[ -n $dry_run ]]; then
  [[ -n $rehearse ]] || { echo; print_hours; }
  exit
fi
check_paths PYTHON ${VQA_PYTHON:+VQA_PYTHON} CAPTIONS CAPTION_IMAGES INSTRUCTIONS INSTRUCTION_IMAGES SEGMENTATION
echo "submitted:"
for_each_part submit_part
