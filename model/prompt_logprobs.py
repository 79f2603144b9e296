"""Log probabilities of a prompt's tokens, for requests with `prompt_logprobs`.

Row i of the model's output predicts token i + 1. So the last row of a chunk predicts the next chunk's first token. The
LM head runs on SLICE rows at a time, because the logits of all rows of a long prompt are larger than the model's own
activations: [16384, 129280] float32 is 8.5 GB.

    x [T, D] --SLICE rows--> logits [SLICE, V] --log softmax--> the k likeliest tokens, and the prompt's own

`prompt_row.py` says what a row is, and its bytes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Chunk, to_device
from model.prompt_row import SLICE
from model.sampling import top_logprobs


class PromptLogprobs:
    """The log probabilities that one step gives."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device | str) -> None:
        """`chunks`: all prompt chunks of the step, which are the last rows of its batch."""
        starts = np.cumsum([0, *(len(chunk.token_ids) for chunk in chunks)])
        spans = [start - starts[-1] + np.arange(len(c.targets)) for start, c in zip(starts, chunks, strict=False)]
        self._rows = to_device(np.concatenate(spans), device)  # counted from the batch's end: below 0
        targets = np.concatenate([np.array(chunk.targets, np.int64) for chunk in chunks])
        self._targets = to_device(targets, device)
        self._top = max(chunk.top for chunk in chunks)
        self._found: list[Tensor] = []

    def compute(self, x: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Run the head. Collective in the replica, if the head is. x [T, D]: the output of the last layer."""
        for rows, targets in zip(self._rows.split(SLICE), self._targets.split(SLICE), strict=True):
            ids, values = top_logprobs(logits_of(x[rows]), targets, self._top)
            self._found.append(torch.stack((ids.int(), values.view(torch.int32)), dim=1))

    def rows(self) -> Tensor:
        """Return the rows [targets, 2, K + 1] int32 on the device, where K is the largest k of the chunks."""
        return torch.cat(self._found)
