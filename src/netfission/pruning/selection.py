"""Select an exact number of the highest-scoring weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from netfission.utils.errors import invalid


def select(
    scores: Mapping[str, Tensor], keep: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Select the `keep` highest-scoring weights over all tensors together.

    Args:
        scores: name → score tensor, any floating dtype; higher is kept. `-inf` marks weights that are
            removed already; they come last.
        keep: exact number of weights to keep, 0 to the number of scores.
        generator: a CPU generator that chooses among equal scores at the threshold; default the first ones.

    Returns:
        name → bool tensor of the same shape, True where kept, with exactly `keep` True in all.

    Raises:
        ValueError: a score is NaN.

    Example:
        >>> select({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])}, keep=2)
        {'a': tensor([False,  True]), 'b': tensor([True])}
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert 0 <= keep <= flat.numel()
    if flat.isnan().any():
        names = [name for name, score in scores.items() if score.isnan().any()]
        found = f"NaN in {', '.join(names[:3])}"
        raise invalid("pruning scores", "numbers", found=found, hint="check the images and weights")
    kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if keep:
        # Finding the threshold by kthvalue is several times faster than topk.
        threshold = flat.kthvalue(flat.numel() - keep + 1).values
        torch.gt(flat, threshold, out=kept)
        ties = (flat == threshold).nonzero().squeeze(1)
        if generator is not None:
            ties = ties[torch.randperm(len(ties), generator=generator).to(ties.device)]
        kept[ties[: keep - int(kept.sum())]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}
