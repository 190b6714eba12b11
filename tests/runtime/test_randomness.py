import torch

from cdistill.runtime.randomness import derive_seed, generator, shuffled_indices


def test_seeds_depend_on_every_argument_and_on_nothing_else():
    seeds = {derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "b", 1), derive_seed(0, "a", 2)}
    assert len(seeds) == 4
    assert derive_seed(0, "a", 1) == 2372310422423236912  # the same on every machine


def test_generators_of_one_purpose_agree():
    first, second = (torch.randn(5, generator=generator(3, "noise", 7)) for _ in range(2))
    assert torch.equal(first, second)


def test_each_epoch_visits_every_item_once():
    walk = shuffled_indices(10, seed=0, start=0, count=30)
    for epoch in walk.reshape(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(walk[:10], walk[10:20])


def test_the_walk_does_not_depend_on_how_it_is_cut():
    whole = shuffled_indices(7, seed=1, start=0, count=50)
    parts = torch.cat([shuffled_indices(7, 1, start, 5) for start in range(0, 50, 5)])
    assert torch.equal(whole, parts)
