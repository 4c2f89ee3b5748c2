"""Several machines on one: a real Slurm, real sshds, and network namespaces for machines with addresses of their own.

A machine is a `Place`: what its daemons are started by, and the address at which the others reach it. Without more, all
machines are this one, and have addresses of the loopback interface; as root, `Namespaces` makes some that differ in
address, host name and /etc/hosts, and have a link that can be cut.

Every daemon runs in the foreground as a child of this process, has an environment of its own, as small as an init's,
and dies with this process. Nothing listens but on loopback or inside a namespace. Whatever Slurm or sshd starts for a
user has ``NODE`` in its environment, and this process's ``MARK``, whatever environment the user asked for: by these
the check for leftovers finds it (see leftovers.py).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.leftovers import MARK, NODE

# Where daemons are, which is not on every user's PATH.
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

# In the environment of a daemon, and of what it starts for a user: the cluster's folder.
_CLUSTER = "NBDDP_TEST_CLUSTER"

# A node's states while jobs can run there, without the "*" of one that does not answer.
_USED = ("idle", "mixed", "allocated", "completing")

# Seconds for what should take a moment: a daemon's start or end, a command.
_MOMENT = 20.0

# Seconds in which what a test has started should be gone.
_SETTLED = 8.0

# Seconds between two looks at something.
_LOOK = 0.01

# The kernel takes the ports of connections from 32768 on, so that what is free below stays so but for other tests.
_PORTS = range(20000, 32000)


def own_address() -> str:
    """Return the address to which this machine's host name leads, or an empty string."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


@dataclass(frozen=True)
class Place:
    """Where a machine's daemons run.

    Attributes:
        address: At which the other machines reach it.
        host_name: What its own processes have for a host name.
        prefix: What a command is put behind to run there.
    """

    address: str = "127.0.0.1"
    host_name: str = socket.gethostname().partition(".")[0]
    prefix: tuple[str, ...] = ()


def missing(*commands: str) -> list[str]:
    """Return those of these commands that are not installed."""
    return [command for command in commands if shutil.which(command, path=_PATH) is None]


def why_no_slurm() -> str:
    """Return what keeps a Slurm from being started here; an empty string if nothing does."""
    if lacking := missing("munged", "slurmctld", "slurmd", "srun", "setpriv"):
        return f"that takes {', '.join(lacking)}, which `make cluster` installs as root"
    if not (address := own_address()).startswith("127."):
        return (
            "its daemons listen at the address to which this machine's name leads, "
            f"{address or 'which is none'}, and must at one of loopback: see /etc/hosts"
        )
    return ""


class Slurm:
    """A Slurm of one partition, "test"; all its nodes have two CPUs each, whatever this machine has.

    Args:
        folder: A new folder, for everything. Its path must be short: there are sockets in it.
        nodes: How many; they are called a0, a1, and so on.
        gpus: How many each node claims to have. They are terminals: enough to be counted and handed out.
        places: Where the nodes are; this machine if not given.
        controller: Where the controller is, and the commands are run.
        conf: More lines for slurm.conf; the last line for a key is the one that counts.

    Attributes:
        nodes: The nodes' names.
        ports: Those of "slurmctld" and of each node.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        gpus: int = 0,
        places: Sequence[Place] = (),
        controller: Place | None = None,
        conf: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.nodes = [f"a{index}" for index in range(nodes)]
        self.controller_place = controller or Place(own_address())
        self._places = dict(zip(self.nodes, places or [Place(own_address())] * nodes, strict=True))
        self._gpus = gpus
        self._more = conf
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start_munge()
            self._start_all()
        except BaseException:
            self.close()
            raise

    @property
    def env(self) -> dict[str, str | None]:
        """What a kernel needs in its environment so that its ``srun`` is one of this Slurm's."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, check: bool = True, timeout: float = _MOMENT) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands where the controller is."""
        return subprocess.run(
            [*self.controller_place.prefix, *command],
            env=_joined(self.env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    def squeue(self) -> list[dict[str, str]]:
        """Return the jobs that are not over: their id, name, state, nodes, and reason to wait."""
        keys = ("id", "name", "state", "nodes", "reason")
        shown = self.run("squeue", "--noheader", "--all", "--format=%i|%j|%T|%N|%r").stdout
        return [dict(zip(keys, line.split("|"), strict=True)) for line in shown.splitlines()]

    def states(self) -> dict[str, str]:
        """Return each node's state, such as "idle", "allocated", "down*"."""
        shown = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).stdout
        return dict(line.split() for line in shown.splitlines())

    def steps(self) -> list[psutil.Process]:
        """Return every slurmstepd on the nodes."""
        return self._steps(*self.nodes)

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd and every slurmstepd there, as if at once; what runs below these lives on."""
        daemon = self._daemons.pop(name)
        kill(daemon)
        _kill_all(lambda: self._steps(name), f"slurmstepd on {name}")

    def restart_node(self, name: str) -> None:
        """Start a node's slurmd again, and wait until it is in use; what it had to do before is not over by that."""
        self._start_node(name)
        self._until_listening(name)
        _until(lambda: self.states().get(name) in _USED, f"the use of {name}; see the logs in {self.folder}")

    def kill_controller(self, *, politely: bool = False) -> None:
        """Kill slurmctld; it loses jobs that are a few seconds old, unless it is asked politely."""
        daemon = self._daemons.pop("slurmctld")
        if politely:
            daemon.terminate()
            daemon.wait(_MOMENT)
        else:
            kill(daemon)

    def restart_controller(self) -> None:
        """Start slurmctld again, and wait until it answers."""
        self._start_controller()
        _until(self.states, f"an answer of slurmctld; see {self.folder}")

    def wait_idle(self, *names: str) -> None:
        """Wait until these nodes, or all, have nothing to do and could have."""
        _until(
            lambda: set(map(self.states().get, names or self.nodes)) == {"idle"} or self._check(),
            f"idle nodes; see the logs in {self.folder}",
        )

    def restore(self) -> list[dict[str, str]]:
        """Start what was killed, and cancel the jobs that are not over soon; return these."""
        if "slurmctld" not in self._daemons:
            self.restart_controller()
        for name in self.nodes:
            if name not in self._daemons:
                self._start_node(name)
        with contextlib.suppress(TimeoutError):
            _until(lambda: not self.squeue(), "the end of all jobs", _SETTLED)
        if left := self.squeue():
            self.run("scancel", "--signal=KILL", *(job["id"] for job in left), check=False)
            self.run("scancel", *(job["id"] for job in left), check=False)
        self.wait_idle()
        return left

    def close(self) -> None:
        """Kill the daemons and what they have started, and remove the folder."""
        for daemon in self._daemons.values():
            kill(daemon)
        self._daemons.clear()
        _kill_all(lambda: self._steps(*self.nodes), "every slurmstepd")
        _clear(self.folder)

    def _start_all(self) -> None:
        # Another test may have taken a port meanwhile: the daemon then ends, and other ports are tried.
        for attempt in range(3):
            self._write_conf()
            try:
                self._start_controller()
                for name in self.nodes:
                    self._start_node(name)
                self.wait_idle()
                return
            except ChildProcessError:
                if attempt == 2:
                    raise
                for name in ("slurmctld", *self.nodes):
                    if daemon := self._daemons.pop(name, None):
                        kill(daemon)

    def _check(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                log = (self.folder / f"{name}.out").read_text()
                raise ChildProcessError(f"{name} has ended with {daemon.returncode}: {log[-2000:]}")
        return False

    def _start_munge(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        paths = [
            f"--{name}={self.folder / 'munge'}.{suffix}"
            for name, suffix in (("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("seed-file", "seed"))
        ]
        self._start("munge", ["munged", "--foreground", "--force", f"--log-file={self.folder / 'munge.log'}", *paths])
        _until(lambda: (self.folder / "munge.sock").exists() or self._check(), "munged's socket")

    def _start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-D", "-i"], self.controller_place)
        self._until_listening("slurmctld")  # whoever comes too early waits for a second

    def _until_listening(self, name: str) -> None:
        table = Path(f"/proc/{self._daemons[name].pid}/net/tcp")
        entry = f":{self.ports[name]:04X} 00000000:0000 0A "
        _until(lambda: self._check() or entry in table.read_text(), f"{name}; see the logs in {self.folder}")

    def _start_node(self, name: str) -> None:
        self._start(name, ["slurmd", "-D", "-N", name], self._places[name])

    def _start(self, name: str, command: Sequence[str], place: Place | None = None) -> None:
        env = {"SLURM_CONF": str(self.folder / "slurm.conf"), _CLUSTER: str(self.folder)}
        self._daemons[name] = start_daemon(command, self.folder / f"{name}.out", env, place or Place())

    def _steps(self, *names: str) -> list[psutil.Process]:
        """Return the slurmstepds on these nodes: a title hides their environment, but they have the node's log open."""
        logs = [f"{self.folder}/{name}.log" for name in names]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.name() == "slurmstepd" and process.status() != psutil.STATUS_ZOMBIE:
                    links = [os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
                    found += [process] if set(logs) & set(links) else []
        return found

    def _write_conf(self) -> None:
        user = getpass.getuser()
        self.ports = dict(zip(("slurmctld", *self.nodes), free_ports(1 + len(self.nodes)), strict=True))
        here = self.controller_place
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={here.host_name}({here.address})",
            f"SlurmctldPort={self.ports['slurmctld']}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"AuthInfo=socket={self.folder}/munge.sock",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool.%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/%n.log",
            f"TaskProlog={self.folder}/prolog",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",  # the CPUs given here, not those that there are
            "ReturnToService=2",
            "MpiDefault=none",
            "KillWait=5",
            "GresTypes=gpu",
            *self._more,
        ]
        if not any(place.prefix for place in (here, *self._places.values())):
            # slurmd and srun listen where this machine's host name leads, whatever is said here: see the fixture.
            lines.append("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
        gres = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        for name, place in self._places.items():
            lines.append(
                f"NodeName={name} NodeHostname={place.host_name} NodeAddr={place.address} Port={self.ports[name]} "
                f"CPUs=2 RealMemory=2000{gres}"
            )
        lines.append("PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (self.folder / "state").mkdir(exist_ok=True)
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = f"Name=gpu File=/dev/tty[0-{self._gpus - 1}]\n" if self._gpus > 1 else "Name=gpu File=/dev/tty0\n"
        (self.folder / "gres.conf").write_text(devices if self._gpus else "")
        # What a prolog prints becomes the task's environment, after srun's --export.
        marks = " ".join(f"{key}={value}" for key, value in _marks(self.folder, "$SLURMD_NODENAME").items())
        (self.folder / "prolog").write_text(f"#!/bin/sh\nprintf 'export %s\\n' {marks}\n")
        (self.folder / "prolog").chmod(0o755)


class Sshd:
    """An sshd per host, for this user and a key of its own, without PAM; nothing outside the folder is read or written.

    ``ssh -F CONFIG a true`` works for every host that was asked for. The same file has hosts with which it does not:

    - "changed": the first host, but with a key that is not the one in known_hosts;
    - "stranger": the first host, but with a key that is in no known_hosts, where ssh would ask;
    - "password": the first host, but the user's key is refused, where ssh would ask for a password;
    - "dead": nothing listens;
    - "silent": takes connections, and never says a word.

    The last two are at this machine's loopback, wherever the hosts are.

    Args:
        folder: A new folder, for everything.
        hosts: Their names, and where they are.

    Attributes:
        config: For ``ssh -F``.
        home: What ``HOME`` is on every host, and so where a shell looks for its start-up files; the working directory
            is the user's real home.
        ports: Each host's.
    """

    def __init__(self, folder: Path, hosts: Mapping[str, Place] | None = None) -> None:
        self.folder = folder
        self.config = folder / "ssh_config"
        self.home = folder / "home"
        self.home.mkdir()
        self.hosts = dict(hosts or {"a": Place("127.0.0.1"), "b": Place("127.0.0.2")})
        self.ports: dict[str, int] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Not listening, a port is refused to whoever connects, and to whoever wants it.
        self._dead, self._silent = (socket.create_server(("127.0.0.1", 0), backlog=8) for _ in range(2))
        self._dead.close()
        self._dead = socket.socket()
        self._dead.bind(("127.0.0.1", 0))
        try:
            for key in ("key", "wrong", *(f"host_{name}" for name in self.hosts)):
                subprocess.run(
                    ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / key)], check=True
                )
            shutil.copy(folder / "key.pub", folder / "authorized_keys")
            if os.getuid() == 0:
                # Where sshd puts those who have not logged in yet; made by what starts the system's own.
                Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
            for name in self.hosts:
                self.restart_host(name)
            self._write_config()
        except BaseException:
            self.close()
            raise

    @property
    def env(self) -> dict[str, str | None]:
        """What a kernel needs in its environment so that plain ``ssh`` reads the configuration of these hosts."""
        commands = self.folder / "bin"
        if not commands.exists():
            commands.mkdir()
            ssh = commands / "ssh"
            ssh.write_text(
                f'#!/bin/sh\nexec {shutil.which("ssh", path=_PATH)} -F {shlex.quote(str(self.config))} "$@"\n'
            )
            ssh.chmod(0o755)
        return {"PATH": f"{commands}:{_PATH}", "SSH_AUTH_SOCK": None}

    def command(self, host: str, *words: str) -> list[str]:
        """Return the command that runs these words on a host."""
        return ["ssh", "-F", str(self.config), host, *words]

    def sessions(self, host: str) -> list[psutil.Process]:
        """Return the processes of a host's sshd that serve a connection, one or two for each."""
        daemon = self._daemons.get(host)
        found = [] if daemon is None else psutil.Process(daemon.pid).children(recursive=True)
        return [process for process in found if _is_sshd(process)]

    def drop(self, host: str) -> None:
        """End every connection to a host, as a network would; what runs there lives on."""
        _kill_all(lambda: self.sessions(host), f"the connections to {host}")

    def kill_host(self, host: str) -> None:
        """Kill a host's sshd and end every connection; what runs there lives on."""
        os.kill(self._daemons[host].pid, signal.SIGSTOP)  # no new connection meanwhile
        for process in self.sessions(host):
            with contextlib.suppress(psutil.Error):
                process.kill()
        kill(self._daemons.pop(host))

    def restart_host(self, host: str) -> None:
        """Start a host's sshd, at the port that it had if it had one."""
        place = self.hosts[host]
        log = self.folder / f"{host}.log"
        conf = self.folder / f"sshd_{host}"
        sshd = shutil.which("sshd", path=_PATH) or "sshd"  # it wants to be called by its full path
        for _ in range(3):  # another test may have taken the port meanwhile
            port = self.ports.get(host) or free_ports(1)[0]
            conf.write_text(_sshd_config(self.folder, host, f"{place.address}:{port}"))
            daemon = start_daemon([sshd, "-D", "-e", "-f", str(conf)], log, {_CLUSTER: str(self.folder)}, place)
            if _says(daemon, log, "Server listening"):
                self._daemons[host] = daemon
                self.ports[host] = port
                return
        raise ChildProcessError(f"sshd has ended: {log.read_text()[-2000:]}")

    def restore(self) -> list[psutil.Process]:
        """Start what was killed, and end the connections that are not over soon; return what served these."""
        for host in self.hosts:
            if host not in self._daemons:
                self.restart_host(host)
        with contextlib.suppress(TimeoutError):
            _until(lambda: not any(map(self.sessions, self.hosts)), "the end of all connections", _SETTLED)
        left = [process for host in self.hosts for process in self.sessions(host)]
        for host in self.hosts:
            self.drop(host)
        return left

    def close(self) -> None:
        """Kill every sshd and what runs below it, and remove the folder."""
        for daemon in self._daemons.values():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(daemon.pid)
                process.suspend()
                for child in process.children(recursive=True):
                    child.kill()
            kill(daemon)
        self._daemons.clear()
        self._dead.close()
        self._silent.close()
        _clear(self.folder)

    def _write_config(self) -> None:
        first = next(iter(self.hosts))
        places = {name: (self.hosts[name].address, self.ports[name]) for name in self.hosts}
        known = [
            f"[{address}]:{port} {(self.folder / f'host_{name}.pub').read_text()}"
            for name, (address, port) in places.items()
        ]
        (self.folder / "known_hosts").write_text("".join(known))
        address, port = places[first]
        wrong = f"[{address}]:{port} {(self.folder / 'wrong.pub').read_text()}"
        (self.folder / "known_changed").write_text(wrong)
        (self.folder / "known_nobody").write_text("")
        places |= dict.fromkeys(("changed", "stranger", "password"), places[first])
        places |= {"dead": self._dead.getsockname(), "silent": self._silent.getsockname()}
        special = {
            "changed": {"UserKnownHostsFile": "known_changed"},
            "stranger": {"UserKnownHostsFile": "known_nobody", "StrictHostKeyChecking": "ask", "BatchMode": "no"},
            "password": {"IdentityFile": "wrong", "BatchMode": "no"},
        }
        lines = []
        for name, (address, port) in places.items():
            options = {
                "HostName": address,
                "Port": str(port),
                "User": getpass.getuser(),
                "IdentityFile": "key",
                "UserKnownHostsFile": "known_hosts",
                "StrictHostKeyChecking": "yes",
                "BatchMode": "yes",
            } | special.get(name, {})
            for key in ("IdentityFile", "UserKnownHostsFile"):
                options[key] = f'"{self.folder / options[key]}"'
            lines += [f"Host {name}", *(f"  {key} {value}" for key, value in options.items())]
        lines += ["Host *", "  GlobalKnownHostsFile none", "  IdentitiesOnly yes", "  IdentityAgent none"]
        self.config.write_text("\n".join(lines) + "\n")


def _sshd_config(folder: Path, host: str, listen: str) -> str:
    # What runs leave there is then found.
    temp = f'"{tempfile.gettempdir()}"'
    environment = {"HOME": f'"{folder}/home"', "TMPDIR": temp, **_marks(folder, host)}
    marks = " ".join(f"{key}={value}" for key, value in environment.items())
    return f"""ListenAddress {listen}
HostKey "{folder}/host_{host}"
AuthorizedKeysFile "{folder}/authorized_keys"
PidFile none
UsePAM no
PermitRootLogin yes
PasswordAuthentication yes
KbdInteractiveAuthentication no
PermitUserRC no
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 100
SetEnv {marks}
"""


class Namespaces:
    """Machines of their own, as root: each has an address, a host name and an /etc/hosts, and a cable to one switch.

    They have names for nothing but themselves, and each for itself a name that leads to loopback, as Debian's installer
    writes it: an address that works must come from somewhere else. All of it is held by one process for each machine,
    and gone with that; the machine on which the tests run has no part in it, and nothing leads out.

    Args:
        folder: A new folder, for the machines' files.
        names: What they are called.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ("login", "a", "b")) -> None:
        self._folder = folder
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self.places: dict[str, Place] = {}
        try:
            self._hold("switch", "ip link add bridge type bridge; ip link set bridge up")
            for number, name in enumerate(names, 1):
                self._add(name, f"10.77.0.{number}")
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Place:
        """Return where a machine is."""
        return self.places[name]

    def cut(self, name: str) -> None:
        """Pull a machine's cable: it sees that, and the others see nothing but silence."""
        self._on_switch(f"ip link set to-{name} down")

    def mend(self, name: str) -> None:
        """Plug a machine's cable in again."""
        self._on_switch(f"ip link set to-{name} up")

    def close(self) -> None:
        """Remove the machines; what runs there is the business of who started it."""
        for holder in self._holders.values():
            kill(holder)
        self._holders.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, name: str, address: str) -> None:
        hosts = self._folder / f"{name}.hosts"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        holder = self._hold(name, f"hostname {name}; mount --bind {shlex.quote(str(hosts))} /etc/hosts")
        self._on_switch(
            f"ip link add to-{name} type veth peer name eth0 netns {holder.pid}; "
            f"ip link set to-{name} master bridge; ip link set to-{name} up"
        )
        prefix = (*_enter(holder, "--mount"), f"--wdns={self._folder}", "--")
        subprocess.run([*prefix, "ip", "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        subprocess.run([*prefix, "ip", "link", "set", "eth0", "up"], check=True)
        self.places[name] = Place(address, name, prefix)

    def _hold(self, name: str, script: str) -> subprocess.Popen[bytes]:
        """Start the process that holds a machine's namespaces."""
        own = ["unshare", "--net", "--uts", "--mount", "--propagation", "private"]
        script = f"set -e; ip link set lo up; {script}; echo ready; exec sleep infinity"
        log = self._folder / f"{name}.out"
        holder = start_daemon([*own, "sh", "-c", script], log, {}, Place())
        self._holders[name] = holder
        if not _says(holder, log, "ready"):
            raise ChildProcessError(f"no machine {name}: {log.read_text()}")
        return holder

    def _on_switch(self, script: str) -> None:
        subprocess.run([*_enter(self._holders["switch"]), "--", "sh", "-ec", script], check=True, env={"PATH": _PATH})


def _enter(holder: subprocess.Popen[bytes], *options: str) -> tuple[str, ...]:
    return ("nsenter", f"--target={holder.pid}", "--net", "--uts", *options)


def start_daemon(command: Sequence[str], log: Path, env: Mapping[str, str], place: Place) -> subprocess.Popen[bytes]:
    """Start a process that stays in the foreground, in a session of its own, and dies with this one."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [*place.prefix, "setpriv", "--pdeathsig", "KILL", *command],
            env={"PATH": _PATH, "LANG": "C.UTF-8", **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and wait for its end."""
    process.kill()
    process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports at which nobody listens, at no address."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            if port not in found:
                found.append(port)
    return found


def _joined(env: Mapping[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in {**os.environ, **env}.items() if value is not None}


def _is_sshd(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.name() == "sshd")
    return False


def _marks(folder: Path, node: str) -> dict[str, str]:
    """Return what a user's processes on a node have in their environment."""
    return {_CLUSTER: str(folder), NODE: node, MARK: os.environ.get(MARK, "")}


def _processes(folder: Path) -> list[psutil.Process]:
    """Return what has a cluster's mark in its environment and is not over."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_CLUSTER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _clear(folder: Path) -> None:
    """Kill what a cluster's daemons have left, and remove its folder."""
    _kill_all(lambda: _processes(folder), f"what was started below {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def _kill_all(find: Callable[[], Sequence[psutil.Process]], what: str) -> None:
    """Kill processes until there are none: meanwhile they may have started others."""

    def gone() -> bool:
        found = find()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return not found

    _until(gone, f"the end of {what}")


def _says(daemon: subprocess.Popen[bytes], log: Path, words: str) -> bool:
    """Wait until a daemon has said something; tell whether it has, and not ended."""
    _until(lambda: daemon.poll() is not None or words in log.read_text(), f"{words!r} in {log}")
    return daemon.poll() is None


def _until(holds: Callable[[], object], what: str, seconds: float = _MOMENT) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(_LOOK)
