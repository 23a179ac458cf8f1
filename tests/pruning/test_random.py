import torch

from netfission.pruning.random import random


def test_scores_are_uniform_in_every_tensor(generator: torch.Generator) -> None:
    weights = {"large": torch.zeros(40, 100, 5), "small": torch.ones(5000)}
    for score in random(torch.nn.Identity(), weights, [], generator).values():
        ordered = score.flatten().sort().values
        n = ordered.numel()
        distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, one false alarm in 1000
        assert 0 <= ordered[0] <= ordered[-1] < 1


def test_scores_know_nothing_of_the_weights() -> None:
    drawn = [
        random(torch.nn.Identity(), {"w": weight}, [], torch.Generator().manual_seed(3))["w"]
        for weight in (torch.zeros(20), torch.arange(20.0))
    ]
    assert torch.equal(*drawn)
