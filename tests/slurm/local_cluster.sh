#!/usr/bin/env bash
# A Slurm cluster with one node on this machine, from Debian's packages, to try the scripts on a CPU and for CI.
#   tests/slurm/local_cluster.sh up      install slurm-wlm and munge if missing, start them, wait for the node
#   tests/slurm/local_cluster.sh down    stop them and remove the files that `up` wrote; the packages stay installed
# It needs root but neither systemd nor cgroups, so it works in a container. Both commands can be repeated.
# Tested with Slurm 22.05 (Debian 12).
set -euo pipefail

home=/var/lib/llava-bidir-slurm # state, logs and process ids
conf=/etc/slurm/slurm.conf
cgroup=/etc/slurm/cgroup.conf
mark="# written by tests/slurm/local_cluster.sh"

fail() {
  echo "local_cluster.sh: $*" >&2
  exit 1
}

is_alive() { # PID; false for a zombie
  grep -qs '^State:.[^ZX]' "/proc/$1/status"
}

is_running() { # NAME of a file with a process id
  [[ -s $home/$1.pid ]] && is_alive "$(<"$home/$1.pid")"
}

install_packages() {
  command -v slurmctld slurmd munged >/dev/null && return
  command -v apt-get >/dev/null || fail "Slurm is not installed, and neither is apt-get to install it"
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
# a requeued job waits until its old credential has expired: 10 s instead of two minutes
AuthInfo=cred_expire=10
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
# two tasks must fit even on one core
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2)) State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  # No plugin uses cgroups, but slurmd requires a version; "disabled" does not exist in 22.05.
  printf '%s\n' "$mark" "CgroupPlugin=cgroup/v1" "CgroupAutomount=no" >"$cgroup"
}

start() {
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /etc/munge /var/lib/munge /var/log/munge
  if [[ ! -s /etc/munge/munge.key ]]; then
    install -o munge -g munge -m 400 <(head -c 1024 /dev/urandom) /etc/munge/munge.key
  fi
  # A munged that is already running is used and not stopped later.
  munge -n >/dev/null 2>&1 || runuser -u munge -- munged --pid-file=/run/munge/llava-bidir.pid
  [[ ! -e /run/munge/llava-bidir.pid ]] || cp /run/munge/llava-bidir.pid "$home/munged.pid"
  is_running slurmctld || slurmctld -c
  is_running slurmd || slurmd -c
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
  fail "the node did not start within 30 s; its logs are in $home"
}

stop() { # NAME
  local pid _
  is_running "$1" || return 0
  pid=$(<"$home/$1.pid")
  kill "$pid"
  for _ in {1..50}; do
    is_alive "$pid" || return 0
    sleep 0.2
  done
  kill -9 "$pid"
}

[[ $(id -u) == 0 ]] || fail "must run as root to install Slurm and to start its daemons"
if [[ -e $conf ]] && ! grep -qxF "$mark" "$conf"; then
  fail "$conf was not written by this script; this machine belongs to another Slurm cluster"
fi
case ${1:-} in
  up)
    install_packages
    if ! is_running slurmctld || ! is_running slurmd; then write_config; fi
    start
    wait_for_node
    ;;
  down)
    if is_running slurmctld; then scancel --partition=local || true; fi
    for name in slurmd slurmctld munged; do stop "$name"; done
    sed -i "/$(printf %s "$mark" | sed 's|/|\\/|g')\$/d" /etc/hosts 2>/dev/null || true
    rm -rf "$home" "$conf" "$cgroup"
    ;;
  *) fail "usage: tests/slurm/local_cluster.sh up | down" ;;
esac
