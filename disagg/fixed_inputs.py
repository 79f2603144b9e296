"""Fixed inputs: where on the device the steps of a rank find what the host tells them, always in the same place.

A CUDA graph needs that. Nothing here waits for the device: each copy is made behind the steps that were launched before
it, so these still read what was told to them.
"""

from collections import abc

import numpy as np
import torch

from model.batch import page_rows


class FixedInputs:
    """Columns of numbers, one per sequence, and the sequences' pages."""

    def __init__(self, columns: int, rows: int, width: int, device: torch.device) -> None:
        """`rows`: the most rows of a step. `width`: the most pages of a sequence."""
        self.on_gpu = device.type == "cuda"
        self.columns = torch.zeros(columns, rows, dtype=torch.int64, device=device)
        self.page_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        # Two buffers, used in turn: the copy out of one may not have begun when the next step is prepared.
        self._staging = [torch.zeros(columns, rows, dtype=torch.int64, pin_memory=self.on_gpu) for _ in range(2)]
        self._staged: tuple | None = None  # what is in page_table

    def stage(self, columns: abc.Sequence[np.ndarray], places: np.ndarray, rows: int) -> None:
        """Copy columns [B] to the places [B] of the first `rows` rows. The others of these are padding: 0."""
        staging = self._staging[0]
        self._staging.reverse()
        host = staging.numpy()
        host[:, :rows] = 0
        for of_host, column in zip(host, columns, strict=False):
            of_host[places] = column
        self.columns.copy_(staging, non_blocking=True)

    def stage_pages(self, pages: list[abc.Sequence[int]], places: np.ndarray, rows: int) -> None:
        """Copy the pages of B sequences likewise. Padding has the null page. What is there already is not copied."""
        staged = rows, places.tobytes(), pages
        if self._staged == staged:
            return
        table = np.zeros((rows, self.page_table.shape[1]), np.int32)
        table[places] = page_rows(pages, table.shape[1])
        host = torch.from_numpy(table)
        if self.on_gpu:
            host = host.pin_memory()
        self.page_table[:rows].copy_(host, non_blocking=True)
        self._staged = staged
