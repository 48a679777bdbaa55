"""Score wanda: ``|W| * norm``, the norm of the input channel on harmful data.

Source: Wanda (Sun et al., 2023, arXiv 2306.11695), as Antidote (arXiv 2408.09600) uses it.
"""

import torch


def channel_norm(act_norm: torch.Tensor | None) -> torch.Tensor | None:
    """The activation norm itself."""
    return act_norm
