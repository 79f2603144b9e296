"""Secret: who may speak on a deployment's ports, and what makes it private.

One file, the same for every job, is the secret. All keys are derived from it, by hashes with a label: a pair for the
ends that listen, and a pair for the ends that connect. ZeroMQ's CURVE encrypts each connection with them. An end that
connects must know the listener's public key before it can say a word, and the listener accepts one client key only. So
whoever has the secret may take part, and nobody else is heard.
"""

import hashlib
import os
import stat
import threading
import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

SHORTEST, LONGEST = 32, 4096  # bytes of a secret
MAKE_ONE = "head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE"

_lock = threading.Lock()  # links' threads may guard their first sockets at once
_authenticators: weakref.WeakKeyDictionary[zmq.Context, ThreadAuthenticator] = weakref.WeakKeyDictionary()


class KeyPair(NamedTuple):
    """A Curve25519 key pair, in ZeroMQ's text form."""

    public: bytes
    private: bytes

    @classmethod
    def derive(cls, secret: bytes, label: bytes) -> "KeyPair":
        """Make the pair of this label, of at most 8 bytes. (The curve's library clamps a private key itself.)"""
        private = z85.encode(hashlib.blake2b(secret, digest_size=32, person=b"moesaic " + label).digest())
        return cls(zmq.curve_public(private), private)


@dataclass(frozen=True)
class Secret:
    """The keys of a deployment. Every end of every connection has both pairs."""

    server: KeyPair = field(repr=False)
    client: KeyPair = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> "Secret":
        return cls(KeyPair.derive(secret, b"server"), KeyPair.derive(secret, b"client"))

    @classmethod
    def read(cls, path: str) -> "Secret":
        """Read the file of --secret-file. Raises ValueError with the rule that the file breaks."""
        if not zmq.has("curve"):
            raise ValueError("--secret-file needs CURVE, which this build of libzmq lacks: pip install pyzmq has it")
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(LONGEST + 1) if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise ValueError(f"--secret-file {path}: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise ValueError(f"--secret-file {path}: it must be a file")
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"--secret-file {path}: only its owner may have access to it: chmod 600 {path}")
        secret = content.strip()
        if not SHORTEST <= len(secret) <= LONGEST:
            has = f"over {LONGEST}" if len(secret) > LONGEST else str(len(secret))
            rule = f"a secret has {SHORTEST} to {LONGEST}, white space around it aside"
            raise ValueError(f"--secret-file {path}: it has {has} bytes; {rule}: {MAKE_ONE}")
        return cls.derive(secret)

    def guard(self, sock: zmq.Socket) -> None:
        """Let `sock`, which will listen, accept only ends that have the secret. Call it before it is bound."""
        domain = self.server.public.decode()
        with _lock:
            authenticator = _authenticators.get(sock.context)
            if authenticator is None:
                authenticator = ThreadAuthenticator(sock.context)
                authenticator.start()
                _authenticators[sock.context] = authenticator
            authenticator.configure_curve_callback(domain, _Only(self.client.public))
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.server.private)
        sock.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the authenticator nobody is accepted

    def show(self, sock: zmq.Socket) -> None:
        """Let `sock`, which will connect, prove that it has the secret. Call it before it is connected."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.server.public)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.client.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.client.private)


class _Only:
    """The only client key that is accepted, as the authenticator asks for it."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def stop_guarding(context: zmq.Context) -> None:
    """End a context's authenticator, which would otherwise keep the context from ending."""
    with _lock:
        authenticator = _authenticators.pop(context, None)
    if authenticator is not None:
        authenticator.stop()
