"""A one-node SLURM on this machine, from Debian's packages munge, slurmctld and slurmd; for tests and by hand:

apt-get install -y munge slurmctld slurmd
python tests/slurm_one_node.py      # prints the line to export; Ctrl-C ends it

It writes to one folder only, and its daemons run as the current user.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

SLURM_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives: 120 seconds by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
OverTimeLimit=0
KillWait=10
InactiveLimit=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4096 Gres=gpu:1 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=other Nodes={host} MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Return a message that names the programs not installed, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    return f"{', '.join(absent)} not installed (apt-get install munge slurmctld slurmd)" if absent else None


@contextlib.contextmanager
def one_node(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start the daemons in an empty folder; yield the environment variables with which commands find them.

    Raises:
        RuntimeError: if the node is not idle within a minute; the message has the ends of the logs.
    """
    host = socket.gethostname().split(".")[0]
    ports = dict(zip(("controller_port", "node_port"), free_ports(2), strict=True))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(SLURM_CONF.format(host=host, user=getpass.getuser(), folder=folder, cpus=cpus, **ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")  # a pretend GPU
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    environment = {"SLURM_CONF": str(conf), "PATH": SEARCHED}
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    commands = [
        ["munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(start(command, environment, out.fileno()))
            if command[0] == "munged":
                wait_until(lambda: (folder / "munge.socket").exists(), 20, folder)
        wait_until(lambda: sinfo(environment) == "idle", 60, folder)
        yield environment
    finally:
        run(["scancel", "--user", getpass.getuser()], environment)
        deadline = time.monotonic() + 20
        while run(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def start(command: Sequence[str], environment: dict[str, str], out: int) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground, with its output in a file."""
    program = shutil.which(command[0], path=SEARCHED) or command[0]
    return subprocess.Popen([program, *command[1:]], env=os.environ | environment, stdout=out, stderr=out)


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Return what a client prints, or an empty string if it fails."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def sinfo(environment: dict[str, str]) -> str:
    """Return the state of the node."""
    return run(["sinfo", "--noheader", "--partition=debug", "--format=%T"], environment)


def wait_until(done: Callable[[], bool], seconds: float, folder: Path) -> None:
    """Wait until a condition holds; raise RuntimeError with the logs after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            logs = [f"{p.name}:\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(folder.glob("*.log"))]
            raise RuntimeError("the node did not come up\n" + "\n".join(logs))
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


if __name__ == "__main__":
    if why := missing():
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as place, one_node(Path(place)) as found:
        print(f"export SLURM_CONF={found['SLURM_CONF']} PATH={found['PATH']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
