"""The limits and keys that run.py's flags give to the HTTP door. Imports no optional package."""

import hmac
import math
from dataclasses import dataclass

MOST_KEY_BYTES = 1_000_000  # of --api-key-file


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a request may take, from its submission to the router on. None: no limit."""

    total: float | None = None
    first_token: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Timeouts":
        """Parse `S[,F]`: seconds in all, and to the first token. Raises ValueError."""
        if text is None:
            return cls()
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"--request-timeout is {text!r}; it must be S or S,F, both of them seconds above 0")
        return cls(*numbers)


class Keys:
    """The keys that clients may use. Without any, every client may come."""

    def __init__(self, keys: list[bytes]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: str | None) -> "Keys":
        """Read a file with one key per line. Raises ValueError if it cannot be read, or has none."""
        if path is None:
            return cls([])
        try:
            with open(path, "rb") as file:
                text = file.read(MOST_KEY_BYTES + 1)
        except OSError as error:
            raise ValueError(f"--api-key-file {path}: cannot be read ({error.strerror})") from None
        if len(text) > MOST_KEY_BYTES:
            raise ValueError(f"--api-key-file {path}: it must have at most {MOST_KEY_BYTES:,} bytes")
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise ValueError(f"--api-key-file {path}: it has no key; it must have one per line")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def admit(self, authorization: bytes) -> bool:
        """Does a header `Bearer KEY` have one of the keys? All keys are compared, each in constant time."""
        scheme, _, key = authorization.partition(b" ")
        equal = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(equal))
