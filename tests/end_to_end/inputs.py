"""What the models are run on. Apart from checkpoints.py: ranks need no transformers."""

from __future__ import annotations

import torch


def input_ids() -> torch.Tensor:
    """[2, 13] token ids."""
    return torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(3))
