"""Access: the flags that decide who may speak on this job's ports.

Without a secret, ports are open to processes of this machine only. An address that other machines can reach needs one.
"""

from argparse import ArgumentParser, Namespace
from ipaddress import ip_address

from disagg.control.secret import Secret
from parallel.interface import resolve


def add_access(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("access, to the ports between jobs").add_argument
    add(
        "--secret-file",
        metavar="FILE",
        help="a secret that all jobs of a deployment share: it encrypts their messages, and shuts strangers out",
    )
    add("--insecure", action="store_true", help="open ports that other machines can reach without a secret")


def read_secret(args: Namespace, *hosts: str) -> Secret | None:
    """Return the secret of the flags, if there is one. `hosts`: where this job will listen, or whom it will believe.

    Raises ValueError if other machines could speak there without a secret, and --insecure does not allow it.
    """
    if args.secret_file is not None:
        if args.insecure:
            raise ValueError("--insecure is for ports without a --secret-file")
        return Secret.read(args.secret_file)
    reachable = [] if args.insecure else [host for host in hosts if not is_loopback(host)]
    if reachable:
        raise ValueError(
            f"other machines can reach {reachable[0]}: give all jobs the same --secret-file, or, in a network where "
            "every process may read prompts and take part, --insecure"
        )
    return None


def is_loopback(host: str) -> bool:
    """Does `host` mean this machine alone? A host without an address counts as such: using it is an error anyway."""
    try:
        return ip_address(resolve(host)).is_loopback
    except OSError:
        return True
