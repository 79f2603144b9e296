"""ExpertRows: the chosen experts of one answer, as its replica sends them, token by token."""

import base64
from typing import NamedTuple

from parallel.chosen_experts import ID_BYTES


class RowShape(NamedTuple):
    """The experts of one token."""

    layers: int  # MoE layers
    top_k: int

    @property
    def num_bytes(self) -> int:
        return self.layers * self.top_k * ID_BYTES


NO_EXPERTS = RowShape(0, 0)


class ExpertRows:
    """The bytes received so far: [tokens, MoE layers, K] little-endian uint16, cut anywhere."""

    def __init__(self, shape: RowShape, max_tokens: int) -> None:
        """`max_tokens`: the most tokens that the request can run through the model; 0 if it does not ask."""
        self._shape, self._max_tokens = shape, max_tokens
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        """Append the experts of the next tokens. Raises ValueError if there are too many, and keeps none of them."""
        if len(self._data) + len(data) > self._max_tokens * self._shape.num_bytes:
            raise ValueError(f"sent chosen experts of more than {self._max_tokens} tokens")
        self._data += data

    def clear(self) -> None:
        """Forget the experts of an attempt that failed: the next attempt begins with the first token."""
        self._data.clear()

    def encode(self, tokens: int) -> dict:
        """Return the answer's field for `tokens` tokens. Raises ValueError if not exactly these were received."""
        layers, top_k = self._shape
        if len(self._data) != tokens * self._shape.num_bytes:
            raise ValueError(
                f"sent {len(self._data)} bytes of chosen experts, not {tokens} tokens x {layers} layers x {top_k} x "
                f"{ID_BYTES} bytes"
            )
        data = base64.b64encode(self._data).decode()
        return {"shape": [tokens, layers, top_k], "dtype": "uint16", "data": data}
