# The one file to edit before a study is submitted. What is set in the environment wins:
#   RUNS=runs/try ENCODERS=clip slurm/six_configurations.sh --dry-run
# Every job reads it anew when it starts, from the repository's root, where it was submitted.
# A value with several words is options of a command; a path among them must have no space.
# shellcheck shell=bash disable=SC2034

# ---------------------------------------------------------------------------------------------------- the cluster
: "${ACCOUNT=}"                 # empty: the user's default
: "${PARTITION=}"               # empty: the cluster's default
: "${GRES=gpu}"                 # how GPUs are asked for: gpu, gpu:h100, ...; empty: jobs without a GPU
: "${NODES:=1}"                 # of a training job
: "${TASKS_PER_NODE:=8}"        # processes on a node, one for each GPU
: "${CPUS_PER_TASK:=8}"
: "${TRAINING_TIME:=24:00:00}"  # at its end a stage saves, is put back in the queue, and goes on where it was
: "${PROBING_TIME:=12:00:00}"   # the same, from the last whole epoch
: "${LANGUAGE_TIME:=12:00:00}"  # Table 1's benchmarks; the same, from the last whole task
: "${ANALYSIS_TIME:=04:00:00}"  # knockout and reports
: "${SBATCH_MORE=}"             # more options of sbatch: --qos=..., --constraint=...

# ---------------------------------------------------------------------------------------------------- what lies where
: "${PYTHON:=.venv/bin/python}"
: "${VQA_PYTHON=.venv-vqa/bin/python}"                 # made by `make vqa-venv`; empty: the study goes without Table 1
: "${RUNS:=runs/study}"                                # ENCODER-MASK/{stage1,stage2,probes,vqa,logs}, ENCODER-report, table1
: "${LLM:=lmsys/vicuna-7b-v1.5}"                       # directory or hub id; the encoders' are in configs/encoder
: "${CAPTIONS:=data/blip_laion_cc_sbu_558k.json}"      # stage 1
: "${CAPTION_IMAGES:=data/LLaVA-Pretrain/images}"
: "${INSTRUCTIONS:=data/llava_v1_5_mix665k.json}"      # stage 2
: "${INSTRUCTION_IMAGES:=data}"
: "${SEGMENTATION:=data/ADEChallengeData2016}"         # of the dataset that PROBES names below
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}    # filled beforehand: compute nodes often have no network
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# ---------------------------------------------------------------------------------------------------- the study
: "${ENCODERS:=clip dinov2 siglip}"
: "${ENCODER_CONFIGS:=configs/encoder}"                # folder with ENCODER.yaml
: "${MASKS:=causal bidirectional}"
: "${STRATEGY:=-c configs/cluster/zero3.yaml}"         # ddp, zero2, zero3, zero3_offload: over all GPUs of a stage
: "${STAGE1:=-c configs/stage1.yaml}"                  # more options of `fit` may follow: --data.micro_batch_size 8
: "${STAGE2:=-c configs/stage2.yaml}"
: "${PROBES:=-c configs/probes/ade20k.yaml}"            # or voc2012, cityscapes, folder
: "${KNOCKOUT:=--classes ceiling sky wall building floor road bed car}"
: "${VQA:=--batch-size 16}"                            # --data DIR: without a filled cache of the hub

# ---------------------------------------------------------------------------------------------------- derived
_place="${ACCOUNT:+--account=$ACCOUNT} ${PARTITION:+--partition=$PARTITION} --cpus-per-task=$CPUS_PER_TASK $SBATCH_MORE"
_node="--ntasks-per-node=$TASKS_PER_NODE ${GRES:+--gres=$GRES:$TASKS_PER_NODE}"
TRAINING="$_place --nodes=$NODES $_node --time=$TRAINING_TIME"
PROBING="$_place --nodes=1 $_node --time=$PROBING_TIME"
LANGUAGE="$_place --nodes=1 --ntasks-per-node=1 --cpus-per-task=$((CPUS_PER_TASK * TASKS_PER_NODE))"
LANGUAGE+=" ${GRES:+--gres=$GRES:$TASKS_PER_NODE} --time=$LANGUAGE_TIME"
ANALYSIS="$_place --nodes=1 --ntasks-per-node=1 ${GRES:+--gres=$GRES:1} --time=$ANALYSIS_TIME"

if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over from the job
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
fi
export PYTHONUNBUFFERED=1
