"""Joint training: every sample as often as asked, in mixed order, through the head of its task."""

from collections import Counter

import pytest
import torch

from benchmarks.joint import learn_jointly
from tests.benchmarks.learning import HeadATask, permuted
from tests.helpers.networks import Net, pairs


class Watched(Net):
    """Notes the samples, and the head, of each batch."""

    def __init__(self):
        super().__init__(heads=3)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.head.active, batch[0]))
        return super().training_step(batch, batch_idx)


def learn(net=Watched, stream=None, seed=0, epochs=3):
    torch.manual_seed(0)
    module = net()
    return module, learn_jointly(module, stream or pairs(), epochs=epochs, batch_size=16, seed=seed)


def test_every_sample_is_seen_in_every_epoch_through_the_head_of_its_task():
    module, _ = learn()
    per_epoch = len(module.batches) // 3
    for epoch in range(3):
        batches = module.batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        for task in pairs().tasks:
            x = torch.stack([x for x, _ in task.train])
            seen = torch.cat([x for head, x in batches if head == task.index])
            assert Counter(map(str, seen.tolist())) == Counter(map(str, x.tolist()))


def test_tasks_and_samples_are_mixed_anew_in_every_epoch():
    module, _ = learn()
    per_epoch = len(module.batches) // 3
    heads = [[head for head, _ in module.batches[i * per_epoch : (i + 1) * per_epoch]] for i in range(3)]
    assert all(sorted(order) != order for order in heads)
    assert heads[0] != heads[1] != heads[2]
    first, second = (
        torch.cat([x for head, x in module.batches[i * per_epoch : (i + 1) * per_epoch] if head == 0])
        for i in (0, 1)
    )
    assert not torch.equal(first, second)


def test_the_seed_tells_the_order():
    (one, scores), (same, same_scores), (other, _) = learn(), learn(), learn(seed=1)
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert torch.equal(scores, same_scores)
    assert not torch.equal(one.body[0].weight, other.body[0].weight)


@pytest.mark.parametrize(
    ("net", "stream"), [(Net, permuted), (HeadATask, pairs)], ids=["shared head", "head a task"]
)
def test_all_tasks_are_learned_well(net, stream):
    _, scores = learn(net, stream(), epochs=10)
    assert scores.shape == (3,)
    assert scores.min() > 0.95
