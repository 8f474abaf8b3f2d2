# Settings of the study. Edit this file before you submit jobs. Environment variables take precedence:
#   RUNS=runs/try ENCODERS=clip slurm/submit.sh --dry-run
# Every job reads this file when it starts, in the folder it was submitted from: the root of the repository.
# A value with several words holds command line options. Paths in such a value must not contain spaces.
# shellcheck shell=bash disable=SC2034

# ---------------------------------------------------------------------------------------------------- the cluster
: "${ACCOUNT=}"                 # empty: your default account
: "${PARTITION=}"               # empty: the cluster's default partition
: "${GRES=gpu}"                 # type of the GPUs: gpu, gpu:h100, ...; empty: no GPUs
: "${NODES:=1}"                 # nodes of a training job
: "${TASKS_PER_NODE:=8}"        # processes per node, one per GPU
: "${CPUS_PER_TASK:=8}"
: "${TRAINING_TIME:=24:00:00}"  # a stage saves before this limit, requeues itself and resumes
: "${NODE_TIME:=12:00:00}"      # probes and Table 1; likewise, going on after the last complete pass or task
: "${ONE_GPU_TIME:=04:00:00}"   # reports and tables
: "${SBATCH_MORE=}"             # further options of sbatch: --qos=..., --constraint=...

# ---------------------------------------------------------------------------------------------------- paths
: "${PYTHON:=.venv/bin/python}"
: "${VQA_PYTHON=.venv-vqa/bin/python}"                 # created by `make vqa-venv`; empty: no Table 1
: "${RUNS:=runs/study}"                                # all results
: "${LLM:=lmsys/vicuna-7b-v1.5}"                       # directory or hub id; for the encoders see configs/encoder
: "${CAPTIONS:=data/blip_laion_cc_sbu_558k.json}"      # stage 1
: "${CAPTION_IMAGES:=data/LLaVA-Pretrain/images}"
: "${INSTRUCTIONS:=data/llava_v1_5_mix665k.json}"      # stage 2
: "${INSTRUCTION_IMAGES:=data}"
: "${SEGMENTATION:=data/ADEChallengeData2016}"         # root folder of the dataset
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}    # fill it first: compute nodes often have no network
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# ---------------------------------------------------------------------------------------------------- the study
: "${ENCODERS:=clip dinov2 siglip}"
: "${ENCODER_CONFIGS:=configs/encoder}"                # folder that holds ENCODER.yaml
: "${MASKS:=causal bidirectional}"
: "${STRATEGY:=-c configs/cluster/zero3.yaml}"         # or ddp, fsdp2, zero2, zero3_offload
: "${STAGE1:=-c configs/stage1.yaml}"                  # may be followed by options of `fit`: --data.micro_batch_size 8
: "${STAGE2:=-c configs/stage2.yaml}"
: "${LAYOUT:=ade20k}"                                  # or voc2012, cityscapes; of other images, their folder
: "${ARMS:=trained random0 random1 permuted0 permuted1 adapter0 adapter1}" # fewer than two draws of each: no verdict beyond random models
: "${STUDY:=-c ade20k --fit --add knockout.classes=sky,ceiling,grass}" # options of `probes study`; the paper's classes
: "${STEPS:=solve fit knockout}"                       # of the jobs of a mask, with the analyses that STUDY adds
: "${VQA:=--batch-size 16}"                            # options of `llava-bidir vqa`

# ---------------------------------------------------------------------------------------------------- derived
if [[ -d $LAYOUT ]]; then SEGMENTATION=$LAYOUT; fi
_common="${ACCOUNT:+--account=$ACCOUNT} ${PARTITION:+--partition=$PARTITION} --cpus-per-task=$CPUS_PER_TASK $SBATCH_MORE"
_node="--ntasks-per-node=$TASKS_PER_NODE ${GRES:+--gres=$GRES:$TASKS_PER_NODE}"
TRAINING="$_common --nodes=$NODES $_node --time=$TRAINING_TIME"
NODE="$_common --nodes=1 --ntasks-per-node=1 --cpus-per-task=$(expr "$CPUS_PER_TASK" \* "$TASKS_PER_NODE" 2>/dev/null || true)"
NODE+=" ${GRES:+--gres=$GRES:$TASKS_PER_NODE} --time=$NODE_TIME" # the command starts a process per GPU
ONE_GPU="$_common --nodes=1 --ntasks-per-node=1 ${GRES:+--gres=$GRES:1} --time=$ONE_GPU_TIME"
JOB=${SLURM_JOB_ID:-}
# of a task of a job array: the id of the last task is that of the whole array
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not inherit it from the job
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
fi
export PYTHONUNBUFFERED=1

fit_words() { # STAGE ENCODER MASK ADAPTER: put the options of `llava-bidir fit` for a stage into the array fit_words
  local config data
  case $1 in
    1) config=$STAGE1 data=(--data.annotations "$CAPTIONS" --data.images "$CAPTION_IMAGES") ;;
    2) config=$STAGE2 data=(--data.annotations "$INSTRUCTIONS" --data.images "$INSTRUCTION_IMAGES" --model.adapter "$4") ;;
  esac
  # shellcheck disable=SC2206
  fit_words=($config -c "$ENCODER_CONFIGS/$2.yaml" $STRATEGY --model.llm "$LLM" --model.image_attention "$3" "${data[@]}")
}
