# Checks of the settings of env.sh, before jobs are submitted: `check_settings` puts all that is wrong into the array
# wrong, and hours and memory that `llava-bidir fit --dry-run` estimates into the table estimates.
# shellcheck shell=bash
wrong=()
declare -A estimates # of "STAGE ENCODER": hours and GB on a GPU

check_settings() {
  check_words
  check_paths
  check_scheduler
  if check_python; then check_options; fi
}

check_words() { # numbers, times and names
  local name word
  mask=causal # of the trainings that are estimated: the last one that exists
  for name in NODES TASKS_PER_NODE CPUS_PER_TASK; do
    if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then wrong+=("$name=${!name}: expected a number from 1"); fi
  done
  for name in TRAINING_TIME NODE_TIME ONE_GPU_TIME; do
    if ! word=$(seconds "${!name}"); then
      wrong+=("$name=${!name}: expected HOURS:MINUTES:SECONDS, DAYS-HOURS, or MINUTES")
    elif [[ $name == TRAINING_TIME && $word -le 1200 || $word -le 120 ]]; then
      wrong+=("$name=${!name} are $word s: a job saves and requeues itself before, and has no time to do anything else")
    fi
  done
  for word in $ENCODERS; do
    if [[ ! -f $ENCODER_CONFIGS/$word.yaml ]]; then
      wrong+=("ENCODERS=$ENCODERS: $ENCODER_CONFIGS has no $word.yaml, only $(cd "$ENCODER_CONFIGS" 2>/dev/null && echo ./*.yaml)")
    fi
  done
  for word in $MASKS; do
    if [[ " causal bidirectional prefix " == *" $word "* || "$STAGE1 $STRATEGY" == *--import* ]]; then
      mask=$word
    else
      wrong+=("MASKS=$MASKS: $word is none of causal, bidirectional, prefix; a mask of your own needs --import in STRATEGY and STUDY")
    fi
  done
  for word in $ARMS; do
    if ! [[ $word =~ ^(trained|(random|permuted|adapter|untrained)[0-9]+)$ ]]; then
      wrong+=("ARMS=$ARMS: $word is none of trained, random0, permuted0, adapter0, untrained0, or another draw of these")
    fi
  done
  if [[ ! -d $LAYOUT && " ade20k voc2012 cityscapes " != *" $LAYOUT "* && $STUDY != *--import* ]]; then
    wrong+=("LAYOUT=$LAYOUT is no folder, and none of ade20k, voc2012, cityscapes")
  fi
  if [[ -z ${ENCODERS// /} || -z ${MASKS// /} ]]; then wrong+=("ENCODERS=$ENCODERS MASKS=$MASKS: expected at least one each"); fi
}

seconds() { # TIME of Slurm -> seconds; status 1 if it is none
  [[ $1 =~ ^(([0-9]+)-)?([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]] || return 1
  local days=${BASH_REMATCH[2]} a=$((10#${BASH_REMATCH[3]})) b=${BASH_REMATCH[5]} c=${BASH_REMATCH[7]}
  if [[ -n $days ]]; then echo $((86400 * 10#$days + 3600 * a + 60 * 10#${b:-0} + 10#${c:-0}))
  elif [[ -n $c ]]; then echo $((3600 * a + 60 * 10#$b + 10#$c))
  else echo $((60 * a + 10#${b:-0})); fi
}

check_paths() {
  local name parent=$RUNS
  for name in CAPTIONS CAPTION_IMAGES INSTRUCTIONS INSTRUCTION_IMAGES SEGMENTATION; do
    [[ -e ${!name} ]] || wrong+=("$name=${!name} does not exist")
  done
  until [[ -e $parent ]]; do parent=$(dirname "$parent"); done
  [[ -d $parent && -w $parent ]] || wrong+=("RUNS=$RUNS: cannot write in $parent")
}

check_scheduler() { # asks Slurm for account, partition, GPUs, limits and what SBATCH_MORE has
  local options told before=''
  if ! command -v sbatch >/dev/null; then
    told='there is no sbatch here, which checks ACCOUNT, PARTITION, GRES and SBATCH_MORE'
    if [[ -n $dry_run ]]; then echo "Not checked: $told" >&2; else wrong+=("$told"); fi
    return
  fi
  for options in "$TRAINING" "$NODE" "$ONE_GPU"; do
    # shellcheck disable=SC2086
    if ! told=$(sbatch --test-only $options --wrap true 2>&1) && [[ $told != "$before" ]]; then
      wrong+=("Slurm refuses$(tr -s ' ' <<<" $options"): $(tail -n 1 <<<"$told")")
      before=$told
    fi
  done
}

check_python() { # status 1 if further checks cannot run
  local told
  if [[ -n $VQA_PYTHON ]] && ! "$VQA_PYTHON" -c 'from importlib.util import find_spec as f; exit(not f("lmms_eval"))' 2>/dev/null; then
    wrong+=("VQA_PYTHON=$VQA_PYTHON is no Python with lmms-eval: make vqa-venv, or set it to nothing")
  fi
  if ! command -v "$PYTHON" >/dev/null; then told='there is no such program'
  elif told=$("$PYTHON" -c 'import llava_bidir, probes' 2>&1); then return 0; fi
  wrong+=("PYTHON=$PYTHON: $(tail -n 1 <<<"$told"); make venv installs one")
  return 1
}

check_options() { # of the three commands, which refuse what is wrong; stages are estimated
  local stage encoder told status hours gb image nowhere=/nowhere/hf
  [[ $NODES$TASKS_PER_NODE =~ ^[0-9]+$ ]] || return 0
  for encoder in $ENCODERS; do
    [[ -f $ENCODER_CONFIGS/$encoder.yaml ]] || continue
    for stage in 1 2; do
      fit_words "$stage" "$encoder" "$mask" null
      status=0
      told=$("$PYTHON" -m llava_bidir fit "${fit_words[@]}" --trainer.num_nodes "$NODES" --trainer.devices "$TASKS_PER_NODE" \
        --out "$RUNS/$encoder-$mask/stage$stage" --dry-run --json 2>&1) || status=$?
      if [[ $status != 0 ]]; then
        refused "STAGE$stage, $encoder" "$told"
      else
        read -r hours gb image < <(estimate <<<"$told")
        estimates[$stage $encoder]="$hours $gb"
        if [[ -n $image ]]; then wrong+=("STAGE$stage, $encoder: there is no image $image"); fi
      fi
    done
  done
  # A model that is not there yet is refused last.
  # shellcheck disable=SC2086
  if ! told=$("$PYTHON" -m probes study "$nowhere" "$LAYOUT" --data.root "$SEGMENTATION" $STUDY --only $STEPS --out "$nowhere" --dry-run 2>&1) &&
    [[ $told != *"$nowhere"* ]]; then refused "STUDY, STEPS" "$told"; fi
  [[ -n $VQA_PYTHON ]] || return 0
  # shellcheck disable=SC2086
  if ! told=$("$PYTHON" -m llava_bidir vqa "$nowhere" --python "$VQA_PYTHON" $VQA --out "$nowhere" 2>&1) &&
    [[ $told != *"$nowhere"* ]]; then refused VQA "$told"; fi
}

refused() { # SETTING OUTPUT: note the last line of an output, unless it is about a path that was named before
  local line before
  line=$(tail -n 1 <<<"$2")
  for before in "${wrong[@]}"; do
    before=${before% does not exist}
    if [[ $before == [A-Z]*=/* && $line == *"no file ${before#*=}"* ]]; then return; fi
  done
  wrong+=("$1: $line")
}

estimate() { # JSON of `fit --dry-run` -> hours and GB on a GPU, "-" for what is not known, and a missing image
  "$PYTHON" -c '
import json, sys
nodes, gpus_a_node = map(int, sys.argv[1:])
text = sys.stdin.read()
costs = json.loads(text[text.index("{") :])
hours = costs.get("gpu_hours")
print("-" if hours is None else f"{hours / nodes / gpus_a_node:.1f}", round(costs["memory_gb"]["total"]), *costs["missing_images"][:1])
' "$NODES" "$TASKS_PER_NODE"
}
