#!/usr/bin/env bash
# A real Slurm of one node on this machine, from Debian's packages: for CI, and for trying the scripts out on a CPU.
#   slurm/local_cluster.sh up      installs slurm-wlm and munge if they are missing, starts them, waits for the node
#   slurm/local_cluster.sh down    ends them and removes what `up` wrote; the packages stay
# Needs root, no systemd and no cgroups, so it works in a container. Both commands may be repeated.
# Tried with Slurm 22.05 (Debian 12).
set -euo pipefail

home=/var/lib/llava-bidir-slurm # state, logs, process ids
conf=/etc/slurm/slurm.conf
cgroup=/etc/slurm/cgroup.conf
mark="# written by slurm/local_cluster.sh"

fail() {
  echo "local_cluster.sh: $*" >&2
  exit 1
}

alive() { # PID; a zombie that nobody collects is not
  grep -qs '^State:.[^ZX]' "/proc/$1/status"
}

running() { # NAME of a process-id file
  [[ -s $home/$1.pid ]] && alive "$(<"$home/$1.pid")"
}

install_packages() {
  command -v slurmctld slurmd munged >/dev/null && return
  command -v apt-get >/dev/null || fail "Slurm is not installed, and there is no apt-get to install it with"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

write_config() {
  local host cpus
  host=$(hostname -s)
  cpus=$(nproc)
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host $mark" >>/etc/hosts
  mkdir -p "$home"/{state,spool} /etc/slurm
  cat >"$conf" <<CONF
$mark
ClusterName=llava-bidir-local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
# two tasks must fit, on however few cores
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2)) State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  # no plugin uses cgroups, yet slurmd asks for a kind; "disabled" came only after 22.05
  printf '%s\n' "$mark" "CgroupPlugin=cgroup/v1" "CgroupAutomount=no" >"$cgroup"
}

start() {
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /etc/munge /var/lib/munge /var/log/munge
  if [[ ! -s /etc/munge/munge.key ]]; then
    install -o munge -g munge -m 400 <(head -c 1024 /dev/urandom) /etc/munge/munge.key
  fi
  # a munged that runs already serves as well, and is not ours to end
  munge -n >/dev/null 2>&1 || runuser -u munge -- munged --pid-file=/run/munge/llava-bidir.pid
  [[ ! -e /run/munge/llava-bidir.pid ]] || cp /run/munge/llava-bidir.pid "$home/munged.pid"
  running slurmctld || slurmctld -c
  running slurmd || slurmd -c
}

wait_for_node() {
  local _
  for _ in {1..60}; do
    if sinfo -h -o %t 2>/dev/null | grep -Eqx 'idle|mix|alloc'; then
      sinfo -N -l
      return
    fi
    sleep 0.5
  done
  tail -n 20 "$home"/slurm*.log >&2
  fail "the node did not come up within 30 s; its logs are in $home"
}

stop() { # NAME
  local pid _
  running "$1" || return 0
  pid=$(<"$home/$1.pid")
  kill "$pid"
  for _ in {1..50}; do
    alive "$pid" || return 0
    sleep 0.2
  done
  kill -9 "$pid"
}

[[ $(id -u) == 0 ]] || fail "needs root, to install Slurm and to start its daemons"
if [[ -e $conf ]] && ! grep -qxF "$mark" "$conf"; then
  fail "$conf is there and not of this script: this machine has a Slurm of its own"
fi
case ${1:-} in
  up)
    install_packages
    if ! running slurmctld || ! running slurmd; then write_config; fi
    start
    wait_for_node
    ;;
  down)
    if running slurmctld; then scancel --partition=local || true; fi
    for name in slurmd slurmctld munged; do stop "$name"; done
    sed -i "/$(printf %s "$mark" | sed 's|/|\\/|g')\$/d" /etc/hosts 2>/dev/null || true
    rm -rf "$home" "$conf" "$cgroup"
    ;;
  *) fail "usage: slurm/local_cluster.sh up | down" ;;
esac
