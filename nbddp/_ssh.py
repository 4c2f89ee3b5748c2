"""ssh: one client for each host, with the user's own configuration, keys and agent."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from nbddp._engines import Engine, Here, Link, how_it_ended, said

# Nothing may ask for a password where nobody can answer; a connection that is dead is noticed; nothing is forwarded. A
# connection that the user shares is used, but none is shared that would end with the run; and a command that the user
# has for a host does not take the place of this one.
_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ControlMaster=no"),
    *("-o", "IgnoreUnknown=RemoteCommand"),
    *("-o", "RemoteCommand=none"),
    *("-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "ForwardX11=no"),
    *("-o", "ForwardAgent=no"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "LogLevel=ERROR"),
    "-T",
)

# ssh's own exit status, whatever was the matter; others are the command's.
_SSH = 255
_NO_COMMAND = 127
_NOT_RUNNABLE = 126

_PASSWORD = re.compile(r"Permission denied \((.*)\)|(Too many authentication failures)")
_HOST_KEY = re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known", re.I)
_NO_WAY = re.compile(
    r"Could not resolve hostname|Connection refused|No route to host|timed out|Network is unreachable", re.I
)
_NO_PACKAGE = re.compile(r"No module named '?nbddp")
_OLD_PYTHON = re.compile(r"unknown option:? -P", re.I)


class Ssh(Engine):
    """Hosts that the user's ssh reaches without a question."""

    title = "ssh"
    # Even from a disk on the network a bare interpreter is there by then.
    answer_seconds = 60.0
    # It goes on for as long as anything that a shell's start-up file has left running holds its stdout open.
    client_seconds = 0.5

    def links(self, command: Sequence[str]) -> Sequence[Link]:
        """Return a client for each host."""
        links = []
        for node, host in enumerate(self.placement.hosts):
            # The far side hands one string to a shell.
            remote = "exec " + " ".join(shlex.quote(word) for word in [*command, str(node)])
            links.append(Link(["ssh", *_OPTIONS, "--", host, remote], [node]))
        return links

    def explain(self, link: Link, status: int | None, words: Sequence[str]) -> str:
        """Return what keeps ssh from reaching the host, or how the command on it ended."""
        host = self.placement.hosts[link.nodes[0]]
        name, text = self.name(link.nodes[0]), "\n".join(words)
        if status is not None and status < 0:
            return f"{name}: the ssh client that leads to {host} {how_it_ended(status)}"
        if status == _SSH and _HOST_KEY.search(text):
            return (
                f"{name}: the host key of {host} is not the one that ssh knows, or it knows none{said(words)}. See "
                f"that it is the right machine, with 'ssh {host}' in a terminal, which also remembers its key"
            )
        if status == _SSH and (found := _PASSWORD.search(text)):
            return (
                f"{name}: {host} does not let ssh in without a password ({found[1] or found[2]}); a notebook cannot "
                f"answer for you. 'ssh-copy-id {host}' puts your key there, or an agent (ssh-add) unlocks it"
            )
        if status == _SSH and _NO_WAY.search(text):
            return f"{name}: {host} cannot be reached{said(words)}. Does 'ssh {host} true' work in a terminal?"
        if _OLD_PYTHON.search(text):
            return f"{name}: {older_interpreter(self.placement.python)}"
        # csh has no status of its own for it.
        csh_says = any(
            f"{self.placement.python}: {words}" in text for words in ("Command not found", "Permission denied")
        )
        if status in (_NO_COMMAND, _NOT_RUNNABLE) or (status != _SSH and csh_says):
            return f"{name}: {no_interpreter(self.placement.python)}{said(words)}"
        if _NO_PACKAGE.search(text):
            return f"{name}: {no_package(self.placement.python)}"
        if status == _SSH:
            return f"{name}: the connection to {host} was lost{said(words)}"
        return f"{name} {how_it_ended(status)}{said(words)}"

    @staticmethod
    def here(argument: str, env: Mapping[str, str]) -> Here:
        """Return the number behind the command, and the address that the client has connected to."""
        words = env.get("SSH_CONNECTION", "").split()
        return Here(int(argument), words[2] if len(words) > 2 else None)

    def name(self, node: int) -> str:
        """Return the number with the host."""
        return f"node{node} ({self.placement.hosts[node]})"


def older_interpreter(python: str) -> str:
    """Return that an interpreter on a node is older than nbddp can be."""
    return (
        f"{python} is a Python there that is older than 3.11, and code that is pickled by one release cannot be run by "
        "another. --python PATH names another interpreter, which must exist on every node"
    )


def no_interpreter(python: str) -> str:
    """Return that there is no such interpreter on a node."""
    return (
        f"there is no {python} there. The notebook's interpreter is taken unless --python PATH names another, "
        "which must exist on every node"
    )


def no_package(python: str) -> str:
    """Return that nbddp is not installed there."""
    return f"{python} has no nbddp there. Install the notebook's version into that environment, on every node"
