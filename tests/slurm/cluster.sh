#!/usr/bin/env bash
# A real, throw-away Slurm cluster on 127.0.0.1, for the tests (slurmctld + N slurmd + munge, optional slurmdbd/MariaDB).
#   cluster.sh up [DIR] | down [DIR] | status [DIR] | env [DIR] | wipe [DIR]
#   cluster.sh kill|stop|start DIR NAME   one daemon: slurmctld, slurmdbd, slurmd-n1 (kill: and all that runs there)
# DIR (default $SLURM_LAB_DIR, else ./.slurm) holds every file: config, keys, pids, logs, spool, database.
# Knobs (read by `up`): SLURM_LAB_NODE_TIMEOUT=120  SLURM_LAB_JOB_AGE=600  SLURM_LAB_ARRAY=1001  SLURM_LAB_NODES=2  SLURM_LAB_CPUS=16  SLURM_LAB_GPUS=8  SLURM_LAB_MEM_MB=65536
#   SLURM_LAB_ACCT=1|0  SLURM_LAB_PORT=26800   (slurmctld=PORT, slurmdbd=PORT+1, node i=PORT+10+i)
#   SLURM_LAB_APART=0   so many of the nodes, the last ones, are each in a partition of their own name only
# Runs as the calling user (root or not); no systemd, no cgroups, nothing outside DIR.
set -euo pipefail
umask 022
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C

cmd=${1:-help}
dir=${2:-${SLURM_LAB_DIR:-./.slurm}}
t0=$(date +%s.%N)
since() { awk -v a="$t0" -v b="$(date +%s.%N)" 'BEGIN{printf "%.1f", b-a}'; }
die() { echo "cluster.sh: $*" >&2; exit 1; }

case $cmd in up|down|status|env|wipe|kill|stop|start) ;; *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2;; esac
[ "$cmd" = up ] && mkdir -p "$dir"
[ -d "$dir" ] || { [ "$cmd" = down ] || [ "$cmd" = wipe ] && exit 0; echo "down (no $dir)"; exit 3; }
dir=$(cd "$dir" && pwd -P)
[ -O "$dir" ] || die "$dir is not yours"
# never touch a directory that is not a cluster's (lab.env marks one)
if [ ! -f "$dir/lab.env" ]; then
  case $cmd in
    up) [ -z "$(ls -A "$dir")" ] || die "$dir is not empty and not a test cluster";;
    down|wipe) exit 0;;
    status) echo down; exit 3;;
  esac
fi

# sun_path is 108 bytes: keep sockets in a short directory when DIR is deep
if [ ${#dir} -le 70 ]; then sock=$dir/sock
else sock=${TMPDIR:-/tmp}/slab-$(id -u)-$(printf %s "$dir" | cksum | cut -d' ' -f1); fi

export SLURM_LAB_DIR=$dir  # also marks our daemons: a recorded pid counts only while its environment names DIR

pid_of() {  # NAME -> live pid, or fails
  local p; p=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ -n "$p" ] || return 1
  grep -qzxF "SLURM_LAB_DIR=$dir" "/proc/$p/environ" 2>/dev/null && echo "$p"
}
note() { [ -z "${SLURM_LAB_VERBOSE:-}" ] || echo "  $(since) s $*"; }
wait_for() {  # SECONDS WHAT LOGFILE CMD...
  local end=$(( $(date +%s) + $1 )) what=$2 logf=$3; shift 3
  until "$@" >/dev/null 2>&1; do
    if [ "$(date +%s)" -ge "$end" ]; then
      echo "cluster.sh: $what not ready; last lines of $logf:" >&2; tail -n 8 "$logf" >&2 || :
      exit 1
    fi
    sleep 0.05
  done
  note "$what ready"
}
spawn() {  # NAME CMD...   (foreground daemon, own session, pid file)
  local name=$1; shift
  setsid "$@" >>"$dir/log/$name.out" 2>&1 </dev/null 9>&- &
  echo $! >"$dir/run/$name.pid"
}
stop() {  # NAME [SECONDS]
  local p i; p=$(pid_of "$1") || { rm -f "$dir/run/$1.pid"; return 0; }
  kill -TERM "$p" 2>/dev/null || :
  for ((i = 0; i < ${2:-5} * 20; i++)); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  if pid_of "$1" >/dev/null; then kill -KILL "$p" 2>/dev/null || :; fi
  rm -f "$dir/run/$1.pid"
}

env_lines() {
  echo "export SLURM_CONF=$dir/etc/slurm.conf"
  echo "export SLURM_LAB_DIR=$dir"
}

need() {
  local miss=() b
  declare -A pkg=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge)
  if [ "$acct" = 1 ]; then pkg[slurmdbd]=slurmdbd; pkg[mariadbd]=mariadb-server; pkg[mariadb]=mariadb-client; fi
  for b in "${!pkg[@]}"; do [ -x "$(type -P "$b")" ] || miss+=("${pkg[$b]}"); done
  [ ${#miss[@]} = 0 ] || die "missing Debian packages: ${miss[*]}
  apt-get install -y --no-install-recommends ${miss[*]}$([ "$acct" = 1 ] && echo '   (or SLURM_LAB_ACCT=0 for no accounting)')"
}

up() {
  nodes=${SLURM_LAB_NODES:-2} cpus=${SLURM_LAB_CPUS:-16} gpus=${SLURM_LAB_GPUS:-8}
  mem=${SLURM_LAB_MEM_MB:-65536} acct=${SLURM_LAB_ACCT:-1} port=${SLURM_LAB_PORT:-26800}
  apart=${SLURM_LAB_APART:-0}
  need
  echo "$port" | grep -qxE '[0-9]+' || die "SLURM_LAB_PORT=$port is not a number"
  local want="nodes=$nodes cpus=$cpus gpus=$gpus mem=$mem acct=$acct port=$port apart=$apart"
  if [ -f "$dir/lab.env" ] && [ "$(cat "$dir/lab.env")" != "$want" ]; then down; fi
  export SLURM_CONF=$dir/etc/slurm.conf
  if [ -f "$dir/lab.env" ] && all_alive && idle; then echo "up (already), $nodes nodes"; return; fi

  local b
  for b in "$port" $((port + 1)) $((port + 11)); do  # somebody else's lab on these ports?
    if ! [ -f "$dir/run/slurmctld.pid" ] && (exec 3<>"/dev/tcp/127.0.0.1/$b") 2>/dev/null; then
      die "port $b is taken; set SLURM_LAB_PORT"; fi
  done
  local me host i; me=$(id -un); host=$(hostname -s)
  mkdir -p "$dir"/{etc,log,run,spool,state} "$sock"; chmod 755 "$dir"/{etc,log,run} "$sock"; chmod 700 "$dir/state"
  echo "$want" >"$dir/lab.env"
  [ -s "$dir/etc/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$dir/etc/munge.key")
  chmod 600 "$dir/etc/munge.key"

  {
    cat <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
SlurmctldDebug=info
AuthType=auth/munge
AuthInfo=socket=$sock/munge,cred_expire=10
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.own.pid
SlurmdPidFile=$dir/run/slurmd-%n.own.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
PlugStackConfig=$dir/etc/plugstack.conf
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=3000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldTimeout=60
SlurmdTimeout=${SLURM_LAB_NODE_TIMEOUT:-120}
InactiveLimit=0
KillWait=2
MinJobAge=${SLURM_LAB_JOB_AGE:-600}
MaxArraySize=${SLURM_LAB_ARRAY:-1001}
JobRequeue=1
RebootProgram=/bin/false
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStoreFlags=job_comment
CONF
    if [ "$acct" = 1 ]; then cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$sock/munge
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=limits
CONF
    else echo "AccountingStorageType=accounting_storage/none"; fi
    local gres=""
    if [ "$gpus" -gt 0 ]; then echo "GresTypes=gpu"; gres=" Gres=gpu:$gpus"; fi
    for ((i = 1; i <= nodes; i++)); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 10 + i)) CPUs=$cpus RealMemory=$mem$gres State=UNKNOWN"
    done
    echo "PartitionName=lab Nodes=n[1-$((nodes - apart))] Default=YES MaxTime=INFINITE State=UP PriorityTier=1"
    for ((i = nodes - apart + 1; i <= nodes; i++)); do
      echo "PartitionName=n$i Nodes=n$i MaxTime=INFINITE State=UP PriorityTier=1"
    done
    echo "PartitionName=urgent Nodes=n[1-$nodes] MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF"
  } >"$dir/etc/slurm.conf"
  : >"$dir/etc/gres.conf"
  if [ "$gpus" -gt 0 ]; then  # links to /dev/null stand for /dev/nvidiaN: Slurm then sets CUDA_VISIBLE_DEVICES
    mkdir -p "$dir/gpu"; for ((i = 0; i < gpus; i++)); do ln -sfn /dev/null "$dir/gpu/$i"; done
    echo "Name=gpu File=$dir/gpu/[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
  fi
  : >"$dir/etc/plugstack.conf"

  if ! pid_of munged >/dev/null; then
    rm -f "$sock/munge" "$sock/munge.lock"
    spawn munged munged -F --force --socket="$sock/munge" --key-file="$dir/etc/munge.key" \
      --pid-file="$dir/run/munged.own.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
  fi
  if [ "$acct" = 1 ]; then db_up; fi
  wait_for 10 munged "$dir/log/munged.log" sh -c "munge -n -S '$sock/munge' | unmunge -S '$sock/munge'"
  if [ "$acct" = 1 ] && ! pid_of slurmdbd >/dev/null; then
    (umask 077; cat >"$dir/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$sock/munge
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
CommunicationParameters=NoInAddrAny
SlurmUser=$me
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$me
StorageLoc=slurm_acct
CONF
    )
    MYSQL_UNIX_PORT=$sock/mysql spawn slurmdbd slurmdbd -D
    wait_for 60 slurmdbd "$dir/log/slurmdbd.log" sacctmgr -n -Q list cluster
  fi
  pid_of slurmctld >/dev/null || spawn slurmctld slurmctld -D -f "$dir/etc/slurm.conf"
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool/n$i"
    pid_of "slurmd-n$i" >/dev/null || spawn "slurmd-n$i" slurmd -D -f "$dir/etc/slurm.conf" -N "n$i"
  done
  wait_for 30 "nodes" "$dir/log/slurmctld.log" idle
  echo "up, $nodes nodes x $cpus CPUs x $gpus GPUs, accounting $acct, $(since) s"
  echo "use: eval \"\$($0 env $dir)\""
}

idle() {  # every node answers and none is down/unknown
  local n; n=$(conf_nodes)
  [ "$(sinfo -h -N -o '%N %T' 2>/dev/null | sort -u | grep -cE ' (idle|mixed|allocated|completing)$')" = "$n" ]
}
conf_nodes() { tr ' ' '\n' <"$dir/lab.env" | sed -n 's/^nodes=//p'; }
conf_acct() { tr ' ' '\n' <"$dir/lab.env" | sed -n 's/^acct=//p'; }
names() {
  local i n; n=$(conf_nodes)
  for ((i = 1; i <= n; i++)); do echo "slurmd-n$i"; done
  echo slurmctld
  if [ "$(conf_acct)" = 1 ]; then echo slurmdbd; echo mariadbd; fi
  echo munged
}
all_alive() { local n; for n in $(names); do pid_of "$n" >/dev/null || return 1; done; }

db_up() {
  pid_of mariadbd >/dev/null && return
  local tiny="--skip-log-bin --performance-schema=OFF --innodb-buffer-pool-size=64M --innodb-log-file-size=16M
    --innodb-flush-method=nosync --innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=0 --innodb-use-native-aio=0"
  if [ ! -d "$dir/db/mysql" ]; then
    mkdir -p "$dir/db"
    mariadb-install-db --no-defaults --datadir="$dir/db" --user="$(id -un)" --auth-root-authentication-method=socket \
      --auth-root-socket-user="$(id -un)" --skip-test-db $tiny >"$dir/log/mariadb-install.out" 2>&1 \
      || die "mariadb-install-db failed: $(tail -n 3 "$dir/log/mariadb-install.out")"
  fi
  note "database directory"
  rm -f "$sock/mysql"
  spawn mariadbd mariadbd --no-defaults --user="$(id -un)" --datadir="$dir/db" --socket="$sock/mysql" \
    --pid-file="$dir/run/mariadbd.own.pid" --skip-networking --innodb-lock-wait-timeout=900 $tiny
  wait_for 30 mariadbd "$dir/log/mariadbd.out" mariadb --no-defaults -S "$sock/mysql" -u "$(id -un)" -e 'select 1'
}

down() {
  local n i
  export SLURM_CONF=$dir/etc/slurm.conf
  if pid_of slurmctld >/dev/null; then  # end the jobs first: a slurmstepd outlives its slurmd
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel -Q 2>/dev/null || :
    for ((i = 0; i < 100; i++)); do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
  fi
  for n in $(names); do
    case $n in mariadbd) stop "$n" 15;; *) stop "$n" 5;; esac
  done
  # jobs slurmctld could not end any more (it was dead): their environment names our slurm.conf
  local p
  for p in /proc/[0-9]*; do
    { grep -qzxF "SLURM_CONF=$dir/etc/slurm.conf" "$p/environ" && grep -qz '^SLURM_JOB_ID=' "$p/environ" \
      && kill -KILL "${p#/proc/}"; } 2>/dev/null || :
  done
  for p in /proc/[0-9]*; do  # and their slurmstepd, known by the spool socket or log it holds open
    { grep -qx 'slurmstepd' "$p/comm" && ls -l "$p/fd" | grep -qF " $dir/" && kill -KILL "${p#/proc/}"; } 2>/dev/null || :
  done
  rm -f "$sock"/*
}
status() {
  export SLURM_CONF=$dir/etc/slurm.conf
  local n rc=0
  for n in $(names); do
    if pid_of "$n" >/dev/null; then echo "$n up pid $(pid_of "$n")"; else echo "$n down"; rc=3; fi
  done
  [ $rc = 0 ] && sinfo -N -o '%N %T %C %G'
  return $rc
}
kill_one() {  # a daemon; with a node's daemon its jobs, as when the node fails
  local p q; p=$(pid_of "$1") || return 0
  kill -KILL "$p"; rm -f "$dir/run/$1.pid"
  case $1 in slurmd-*) ;; *) return 0;; esac
  for q in /proc/[0-9]*; do
    { grep -qzxF "SLURMD_NODENAME=${1#slurmd-}" "$q/environ" && grep -qzxF "SLURM_CONF=$dir/etc/slurm.conf" "$q/environ" \
      && kill -KILL "${q#/proc/}"; } 2>/dev/null || :
    { grep -qx 'slurmstepd' "$q/comm" && ls -l "$q/fd" | grep -qF " $dir/spool/${1#slurmd-}/" && kill -KILL "${q#/proc/}"; } 2>/dev/null || :
  done
}
start_one() {
  export SLURM_CONF=$dir/etc/slurm.conf
  pid_of "$1" >/dev/null && return 0
  case $1 in
    slurmctld) spawn slurmctld slurmctld -D -f "$dir/etc/slurm.conf";;
    slurmdbd) MYSQL_UNIX_PORT=$sock/mysql spawn slurmdbd slurmdbd -D;;
    slurmd-*) spawn "$1" slurmd -D -f "$dir/etc/slurm.conf" -N "${1#slurmd-}";;
    *) die "no such daemon: $1";;
  esac
}
case $cmd in up|down|wipe) exec 9>"$dir/lab.lock"; flock 9;; esac
case $cmd in
  up) up;;
  down) down; echo "down, $(since) s";;
  wipe)
    down
    (cd "$dir" && rm -rf etc log run spool state gpu db lab.env lab.lock)
    rm -rf "$sock"; rmdir "$dir" 2>/dev/null || :
    echo "wiped";;
  status) status;;
  kill) kill_one "${3:?which daemon}";;
  stop) stop "${3:?which daemon}";;
  start) start_one "${3:?which daemon}";;
  env) env_lines;;
esac
