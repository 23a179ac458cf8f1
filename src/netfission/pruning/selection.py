"""The highest-scoring weights, an exact number of them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def select(
    scores: Mapping[str, Tensor], keep: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The `keep` highest-scoring weights over all tensors together.

    Args:
        scores: name → score tensor, any floating dtype; higher is kept. `-inf` marks weights that are
            gone already: they come last.
        keep: exact number of weights to keep, 0 to the number of scores.
        generator: a CPU generator that chooses among weights that tie for the last places; default the
            first ones.

    Returns:
        name → bool tensor of the same shape, True where kept, with exactly `keep` True in all.

    Raises:
        ValueError: a score is NaN.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert 0 <= keep <= flat.numel()
    if flat.isnan().any():
        names = [name for name, score in scores.items() if score.isnan().any()]
        raise ValueError(f"pruning scores are NaN in {', '.join(names[:3])}; check the images and weights")
    kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if keep:
        # The threshold by selection is several times faster than sorting out the top by topk.
        threshold = flat.kthvalue(flat.numel() - keep + 1).values
        torch.gt(flat, threshold, out=kept)
        ties = (flat == threshold).nonzero().squeeze(1)
        if generator is not None:
            ties = ties[torch.randperm(len(ties), generator=generator).to(ties.device)]
        kept[ties[: keep - int(kept.sum())]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}
