"""Machines for tests: Linux namespaces on this machine, each with a network address, a disk, processes and an sshd of its own.

A host sees this machine's files. What it writes goes to a layer in memory, but for /shared, which all of them have in common. Nothing of it is
visible outside, not even the network between them, and all of it is gone when the processes are: also when the tests are killed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import ROOT

USER = "ubuntu"
HOME = f"/home/{USER}"

_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "rsync")
_SEARCHED = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"

# Runs as process 1 of a host: a disk, a user, an sshd. $1 is an empty folder for the layer, $2 the shared folder, $3 the host's name, $4 a public
# key. The host's name is an address of the loopback, as Debian and Ubuntu install it. The user has the id 0, so that it may read an environment that
# belongs to root; listed first, it is the one that ssh asks for its home.
_INIT = f"""set -eu
mount -t tmpfs layer "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
hostname "$3"
cd "$1/root"
mkdir -p shared tmp/ray
mount --bind "$2" shared
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
for folder in dev/shm tmp/ray run; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
exec chroot . /bin/sh -eu -c '
printf "127.0.0.1 localhost\n127.0.1.1 %s\n" "$1" > /etc/hosts
{{ echo "{USER}:*:0:0::{HOME}:/bin/bash"; cat /etc/passwd; }} > /run/passwd
cat /run/passwd > /etc/passwd
rm -rf {HOME}
mkdir -p /home /run/sshd
cp -r /etc/skel {HOME}
mkdir -m 700 {HOME}/.ssh
echo "$2" > {HOME}/.ssh/authorized_keys
ssh-keygen -q -t ed25519 -N "" -f /run/host_key
exec "$(command -v sshd)" -D -e -f /dev/null -o HostKey=/run/host_key -o UsePAM=no -o UseDNS=no -o PasswordAuthentication=no
' init "$3" "$4"
"""


@dataclass(frozen=True)
class Host:
    """A host that runs."""

    name: str
    address: str
    pid: int
    """Of its process 1, as it is numbered here."""

    def path(self, path: str) -> Path:
        """Where a file of the host is found from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def command(self, argv: Sequence[str | Path], **environment: str) -> list[str]:
        """A command line that runs another on this host, in the project's folder, as its user and with nothing of the caller's environment."""
        path = f"PATH={Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        given = [f"{name}={value}" for name, value in environment.items()]
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--uts", "--root", f"--wd={self.path(str(ROOT))}"]
        return [*enter, "env", "-i", path, f"HOME={HOME}", f"USER={USER}", f"PYTHONPATH={ROOT}", *given, *map(str, argv)]

    def run(self, *argv: str | Path, timeout_s: float = 600, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run one command on this host to its end."""
        return subprocess.run(self.command(argv, **environment), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def missing() -> str:
    """Return what this machine lacks for hosts, or an empty text."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "root on Linux"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool, path=_SEARCHED) is None]:
        return ", ".join(lacking)
    elsewhere = [path for path in (str(ROOT), sys.prefix, sys.base_prefix) if os.stat(path).st_dev != os.stat("/").st_dev]
    if elsewhere:
        # A layer over / holds nothing of what is mounted below.
        return f"{elsewhere[0]} on the file system of /"
    with tempfile.TemporaryDirectory(prefix="sn-hosts-", dir="/tmp") as folder:
        needed = [
            f"mount -t tmpfs layer {folder}",
            f"cd {folder}",
            "mkdir upper work root",
            "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root",
            "ip link add type bridge",
            "ip link add type veth",
        ]
        attempt = ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "sh", "-ec", "; ".join(needed)]
        done = subprocess.run(attempt, capture_output=True, text=True)
    return f"namespaces, overlayfs, bridges or veth ({done.stderr.strip()})" if done.returncode else ""


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Start hosts in one network and end them; each reaches all others by ssh, with the key in the first one's home."""
    with tempfile.TemporaryDirectory(prefix="sn-hosts-", dir="/tmp") as folder, ExitStack() as started:
        key = Path(folder, "id_ed25519")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
        shared = Path(folder, "shared")
        shared.mkdir()
        running: list[Host] = []
        for number, name in enumerate(names, start=9):
            layer = Path(folder, name)
            layer.mkdir()
            pid = started.enter_context(_namespaces("sh", "-c", _INIT, "init", layer, shared, name, key.with_suffix(".pub").read_text().strip()))
            host = Host(name, f"10.0.0.{number}", pid)
            running.append(host)
            _plug_in(host, running[0])
        for host in running:
            _wait_for_sshd(host)
        first = running[0].path(f"{HOME}/.ssh/id_ed25519")
        first.write_bytes(key.read_bytes())
        first.chmod(0o600)
        yield running


@contextmanager
def _namespaces(*argv: str | Path) -> Iterator[int]:
    """Run a command as process 1 of namespaces of its own; gives its number here."""
    # With the tests dies unshare, with it process 1, with that everything in its namespaces.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", *map(str, argv)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": _SEARCHED})
    try:
        end, tick = time.monotonic() + 30, threading.Event()
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
            assert time.monotonic() < end
            tick.wait(0.02)
        yield children[0].pid
    finally:
        inside = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(inside, timeout=30)


def _plug_in(host: Host, first: Host) -> None:
    """Give a host its address; the first one holds the switch."""
    if host is first:
        _ip(host, "link", "add", "switch", "type", "bridge")
        _ip(host, "addr", "add", f"{host.address}/24", "dev", "switch")
        _ip(host, "link", "set", "switch", "up")
    else:
        _ip(first, "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _ip(first, "link", "set", host.name, "master", "switch", "up")
        _ip(host, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip(host, "link", "set", "eth0", "up")
        # Ray asks the system which address it would take to the internet; without such a way it takes 127.0.0.1.
        _ip(host, "route", "add", "default", "via", first.address)
    _ip(host, "link", "set", "lo", "up")


def _ip(host: Host, *argv: str) -> None:
    subprocess.run(["nsenter", "--target", str(host.pid), "--net", "ip", *argv], check=True)


def _wait_for_sshd(host: Host) -> None:
    end, tick = time.monotonic() + 60, threading.Event()
    while "SSH-2.0" not in host.run("bash", "-c", "read -r line < /dev/tcp/127.0.0.1/22; echo $line").stdout:
        assert psutil.pid_exists(host.pid), f"{host.name} has ended"
        assert time.monotonic() < end, f"{host.name} has no sshd"
        tick.wait(0.1)
