"""BLIP in a Trainer, and in a loop without one."""

import copy
import csv
import io
import math
import pickle
from itertools import count

import pytest
import pytorch_lightning as pl
import torch
import tqdm.std
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_blip import BLIP, FrozenBitsOptimizer, Task, TaskSequenceDataModule
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.frozen.packing import encode
from tests.helpers.fitting import fit, same
from tests.helpers.networks import QUIET, Net, blobs


def loader():
    return DataLoader(blobs(), batch_size=30)


@pytest.mark.parametrize("options", [{}, {"basis": "kronecker"}, {"prior": 1e-4}])
def test_blip_keeps_the_first_task_that_fine_tuning_forgets(options):
    def accuracy_on_the_first_task(callbacks):
        torch.manual_seed(0)
        tasks = TaskSequenceDataModule.permute_inputs(
            blobs(), blobs(seed=1), tasks=4, epochs_per_task=6, batch_size=16
        )
        return fit(callbacks, tasks=tasks).callback_metrics["val_acc/dataloader_idx_0"].item()

    assert accuracy_on_the_first_task([BLIP(**options)]) > accuracy_on_the_first_task([]) + 0.3


def test_frozen_bits_stay_the_same_until_the_fit_ends():
    class Codes(pl.Callback):
        """Remembers the bits that each boundary froze, and compares them after every later step."""

        def __init__(self, blip):
            self.blip = blip
            self.kept = []

        def codes(self, pl_module):
            parameters = dict(pl_module.named_parameters())
            return {
                name: encode(parameters[name].detach(), self.blip.state(name).bound, 20)
                for name in self.blip.bits()
            }

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            now = self.codes(pl_module)
            for name, code, bits in self.kept:
                frozen = bits > 0
                then, now_ = (part + 2**20 // 3 >> (20 - bits) for part in (code, now[name]))
                assert torch.equal(then[frozen], now_[frozen])

        def on_task_end(self, trainer, pl_module, task):
            self.on_train_batch_end(trainer, pl_module)
            now = self.codes(pl_module)
            self.kept += [(name, now[name], bits.int()) for name, bits in self.blip.bits().items()]

    blip = BLIP(prior=1e-4)
    codes = Codes(blip)
    fit([blip, codes])
    assert len(codes.kept) == 3 * 4
    assert all((bits > 0).any() for _, _, bits in codes.kept)
    assert blip.used_capacity > 0.01


def test_precision_bits_gain_and_grid_follow_the_formulas():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))
    before = [theta.detach().clone() for theta in network.parameters()]
    blip = BLIP(prior=1e-3, damping=0, samples=70)
    fisher = diagonal_fisher(network, loader(), samples=70, generator=torch.Generator().manual_seed(0))
    report = blip.consolidate(network, loader())
    for name, fan_in in (("0.weight", 8), ("0.bias", 8), ("2.weight", 4), ("2.bias", 4)):
        prior = 1e-3 * fan_in
        # Information is stored in 16 bits.
        torch.testing.assert_close(blip.precision()[name], prior + fisher[name], rtol=2**-11, atol=0)
        expected = (0.5 * torch.log2(blip.precision()[name] / prior) + 0.5).floor().clamp(0, 20)
        assert torch.equal(blip.bits()[name], expected.to(torch.uint8))
    total = sum(int(bits.sum()) for bits in blip.bits().values())
    count = sum(theta.numel() for theta in before)
    assert blip.used_capacity == pytest.approx(total / (20 * count))
    assert report["blip/used_capacity"] == blip.used_capacity
    gain = sum(float((0.5 * torch.log2(1 + fisher[n] / (1e-3 * f))).sum()) for n, f in
               (("0.weight", 8), ("0.bias", 8), ("2.weight", 4), ("2.bias", 4)))  # fmt: skip
    assert report["blip/information_gain"] == pytest.approx(gain, rel=1e-4)
    assert report["blip/information_gain/0"] + report["blip/information_gain/2"] == pytest.approx(
        gain, rel=1e-4
    )
    for theta, old, name in zip(network.parameters(), before, blip.bits(), strict=True):
        step = blip.state(name).bound * 2.0**-20
        assert (theta - old).abs().max() <= step / 2 * 1.2


def test_the_papers_preset_rounds_parameters_to_their_frozen_bits():
    blip = BLIP.paper(prior=1e-15, samples=50)
    assert blip.prior == pytest.approx(1e-11)
    assert (blip.rule, blip.cell, blip.scale, blip.pull, blip.samples) == ("paper", "paper", 0.0, 0.0, 50)
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))
    with torch.no_grad():
        network[0].weight[0].fill_(-1.0)  # never active on the inputs below, so without information
        network[0].bias[0] = -100.0
    blip = BLIP.paper(prior=1e-9)
    blip.consolidate(network, loader())
    bits = blip.bits()["0.weight"]
    assert (bits[0] == 0).all()
    assert (network[0].weight[0] == 0).all()
    assert (bits[1:] > 0).any()
    kept = 2.0 ** bits.float()
    bound = blip.state("0.weight").bound
    steps = network[0].weight / bound * kept
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def matrices():
    """Return layers with more inputs than outputs and with fewer; none has torch's fan_out as a side."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Conv2d(8, 40, 2, groups=2), nn.Flatten(), nn.Linear(40 * 5 * 5, 3)
    )


FANS = {"in": {"0": 18, "1": 16, "3": 1000}, "max": {"0": 18, "1": 40, "3": 1000}}


@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_bound_and_prior_depend_on_the_side_of_a_layer_that_fan_names(fan, basis):
    network = matrices()
    network.append(nn.Linear(3, 12))
    batches = [(torch.randn(16, 2, 8, 8), torch.zeros(16))]
    blip = BLIP(prior=1e-3, fan=fan, basis=basis)
    blip.consolidate(network, batches)
    for layer, size in {**FANS[fan], "4": 3 if fan == "in" else 12}.items():
        states = [blip.state(name) for name in blip.bits() if name.startswith(layer)]
        assert states[0].bound == pytest.approx(6 / size**0.5)
        assert [state.prior for state in states] == pytest.approx([1e-3 * size] * len(states))
        if basis == "diagonal" or layer == "1":  # a convolution in groups has no Kronecker factors
            assert states[1].bound == 1.0


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_the_chosen_prior_depends_on_the_side_of_a_layer_that_fan_names(rule):
    """As many bits are frozen with either side, so in a network of one layer the prior alone differs."""
    network = nn.Sequential(nn.Linear(8, 32))
    batches = [(torch.randn(64, 8), torch.zeros(64))]
    narrow, wide = BLIP(rule=rule), BLIP(rule=rule, fan="max")
    for blip in (narrow, wide):
        blip.consolidate(copy.deepcopy(network), batches)
    assert wide.chosen["prior"] == pytest.approx(narrow.chosen["prior"] / 4, rel=1e-3)


def test_a_parameter_tracked_only_after_restoring_has_the_same_fan():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16))
    batches = [(torch.randn(8, 4), torch.zeros(8))]
    blip, restored = BLIP(prior=1e-3, fan="max"), BLIP(prior=1e-3, fan="max")
    network[1].requires_grad_(False)
    blip.consolidate(network, batches)
    restored.load_state_dict(blip.state_dict())
    network[1].requires_grad_(True)
    restored.consolidate(network, batches)
    assert restored.state("1.weight").bound == pytest.approx(6 / 4)


def test_a_shared_head_is_tracked_and_heads_per_task_are_not():
    heads, shared = BLIP(), BLIP()
    fit(heads, Net(heads=3))
    fit(shared, Net())
    assert sorted(heads.bits()) == ["body.0.bias", "body.0.weight"]
    assert sorted(shared.bits()) == ["body.0.bias", "body.0.weight", "head.bias", "head.weight"]


def test_parameters_are_included_and_excluded_by_pattern():
    blip = BLIP(include=["body.*", "head.weight"], exclude="*.bias")
    fit(blip)
    assert sorted(blip.bits()) == ["body.0.weight", "head.weight"]


def test_a_parameter_that_is_not_trained_is_neither_tracked_nor_rounded():
    module = Net()
    module.body[0].weight.requires_grad_(False)
    before = module.body[0].weight.clone()
    blip = BLIP()
    fit(blip, module)
    assert "body.0.weight" not in blip.bits()
    assert torch.equal(module.body[0].weight, before)


def test_a_parameter_that_stops_being_trained_keeps_its_bits():
    blip, network = BLIP(prior=1e-4), nn.Linear(8, 6)
    blip.consolidate(network, loader())
    bits = blip.bits()["weight"]
    assert bits.any()
    network.weight.requires_grad_(False)
    blip.consolidate(network, loader())
    assert torch.equal(blip.bits()["weight"], bits)
    assert blip.tasks_learned == 2
    network.bias.requires_grad_(False)
    blip.consolidate(network, loader())
    assert torch.equal(blip.bits()["weight"], bits)


@pytest.mark.parametrize("optimizer", ["adam", "several", "same again"])
def test_every_optimizer_that_the_module_configures_is_wrapped_once(optimizer):
    class Optimized(Net):
        automatic_optimization = optimizer != "several"

        def configure_optimizers(self):
            if optimizer == "several":
                return [torch.optim.SGD(self.body.parameters(), lr=0.1),
                        torch.optim.Adam(self.head.parameters())]  # fmt: skip
            if optimizer == "adam":
                return torch.optim.AdamW(self.parameters(), lr=0.01)
            if not hasattr(self, "kept"):
                self.kept = torch.optim.SGD(self.parameters(), lr=0.1)
            return self.kept

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if optimizer != "several":
                return loss
            self.manual_backward(loss)
            for one in self.optimizers():
                one.step()
                one.zero_grad()
            return None

    class Wrapped(pl.Callback):
        def __init__(self):
            self.counts = []

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            assert all(isinstance(one, FrozenBitsOptimizer) for one in trainer.optimizers)
            assert not any(isinstance(one.optimizer, FrozenBitsOptimizer) for one in trainer.optimizers)
            self.counts.append([len(one._optimizer_step_post_hooks) for one in trainer.optimizers])

    blip = BLIP(prior=1e-4)
    module, wrapped = Optimized(), Wrapped()
    fit([blip, wrapped], module)
    assert "configure_optimizers" not in vars(module)
    assert blip.tasks_learned == 3
    batches = 3 * 2 * 3  # tasks, epochs and batches per epoch
    assert wrapped.counts == [[1, 1] if optimizer == "several" else [1]] * batches


def test_with_a_trainer_per_task_and_consolidate_frozen_bits_stay_the_same():
    blip = BLIP(prior=1e-4)
    module = Net()
    for _ in range(2):
        trainer = pl.Trainer(**QUIET, callbacks=[blip], max_epochs=1)
        trainer.fit(module, loader())
        before = {name: bits.clone() for name, bits in blip.bits().items()}
        blip.consolidate(trainer, loader())
        assert all((blip.bits()[name] >= before[name]).all() for name in before)
    assert blip.tasks_learned == 2

    def codes():
        return {name: blip.state(name).frozen_code(theta) for name, theta in module.named_parameters()}

    assert all(bits.any() for bits in blip.bits().values())
    before, weight = codes(), module.body[0].weight.detach().clone()
    pl.Trainer(**QUIET, callbacks=[blip], max_epochs=2).fit(module, loader())
    assert not torch.equal(module.body[0].weight, weight)
    for name, code in codes().items():
        assert torch.equal(before[name], code)


def test_a_loop_of_plain_pytorch_freezes_bits_that_are_saved():
    blip, network = BLIP(prior=1e-4), nn.Linear(8, 6)
    optimizer = blip.wrap(torch.optim.SGD(network.parameters(), lr=0.5), network)
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        blip.consolidate(network, loader())
    assert blip.used_capacity > 0
    restored = BLIP(prior=1e-4)
    restored.load_state_dict(blip.state_dict())
    assert restored.used_capacity == blip.used_capacity


def test_consolidating_changes_neither_random_state_nor_mode_nor_gradients_nor_running_statistics():
    module = Net(norm=True)
    module.train()
    module.body[2].eval()
    module.body[0].weight.grad = torch.ones(16, 8)
    running = module.body[1].running_mean.clone()
    state = torch.get_rng_state()
    modes = [part.training for part in module.modules()]
    BLIP().consolidate(module, loader())
    assert torch.equal(module.body[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes
    grads = {name: theta.grad for name, theta in module.named_parameters() if theta.grad is not None}
    assert same(grads, {"body.0.weight": torch.ones(16, 8)})


@pytest.mark.parametrize("by_hand", [False, True])
def test_information_is_measured_on_the_batches_that_the_training_step_gets(by_hand):
    class Doubling(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    def state_of(module, points):
        torch.manual_seed(0)
        blip = BLIP(prior=1e-4)
        module = module()
        trainer = pl.Trainer(**QUIET, callbacks=[blip], precision="64-true", max_epochs=1)
        if by_hand:
            points = DataLoader(points, batch_size=40)
            trainer.fit(module, points)
            blip.consolidate(trainer, points)
        else:
            trainer.fit(module, datamodule=TaskSequenceDataModule([Task("a", train=points)], batch_size=40))
        assert blip.tasks_learned == 1
        return blip.precision()["body.0.weight"]

    x, y = blobs().tensors
    expected = state_of(Net, TensorDataset(2 * x, y))
    torch.testing.assert_close(state_of(Doubling, TensorDataset(x, y)), expected)


def test_a_mapping_with_labels_is_read_like_a_pair():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, points):
            return self.layer(points)

    pairs_, named = nn.Linear(8, 6), Named()
    named.layer.load_state_dict(pairs_.state_dict())
    one, other = BLIP(), BLIP()
    one.consolidate(pairs_, list(loader()))
    other.consolidate(named, [{"points": x, "labels": y} for x, y in loader()])
    assert torch.equal(one.bits()["weight"], other.bits()["layer.weight"])
    assert torch.equal(one.precision()["weight"], other.precision()["layer.weight"])
    assert (one.precision()["weight"] > one.chosen["prior"] * 8).all()


EXPECTED = {
    "blip/used_capacity",
    "blip/information_gain",
    "blip/information_gain/body.0",
    "blip/information_gain/head",
    "blip/newly_frozen_share",
    "blip/at_wall_share",
    "blip/drifted_share",
    "blip/seconds",
}


def boundary_rows(folder):
    """Return the metrics that a CSVLogger in the folder wrote at the boundaries."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["blip/seconds"]]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_every_logger_gets_the_metrics_of_each_boundary(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [CSVLogger(tmp_path), WandbLogger(save_dir=tmp_path, project="test")]
    trainer = fit(BLIP(prior=1e-4), logger=loggers, log_every_n_steps=1)
    rows = boundary_rows(tmp_path)
    assert len(rows) == 3
    for row in rows:
        assert row.keys() >= EXPECTED
        assert 0 < row["blip/used_capacity"] < 1
        assert row["blip/drifted_share"] == 0
        assert row["blip/seconds"] > 0
    assert rows[0]["blip/newly_frozen_share"] > rows[2]["blip/newly_frozen_share"]
    assert rows[0]["blip/at_wall_share"] == 0
    summary = dict(trainer.loggers[1].experiment.summary)
    assert summary["blip/used_capacity"] == pytest.approx(rows[-1]["blip/used_capacity"])
    trainer.loggers[1].experiment.finish()


def test_in_the_papers_cell_frozen_bits_drift_and_the_drift_is_logged(tmp_path):
    fit(BLIP(prior=1e-7, cell="paper", scale=0, pull=0), logger=CSVLogger(tmp_path))
    rows = boundary_rows(tmp_path)
    assert rows[1]["blip/drifted_share"] > 0
    assert rows[1]["blip/at_wall_share"] > 0


def poisoned():
    """Return two tasks, and the inputs of the second one."""
    points = blobs()
    x = points.tensors[0].clone()
    tasks = [
        Task("clean", train=points, test=points),
        Task("poisoned", train=TensorDataset(x, points.tensors[1]), test=points),
    ]
    return TaskSequenceDataModule(tasks, batch_size=40), x


def test_a_loss_that_is_not_finite_is_refused_with_task_and_batch_and_changes_nothing():
    tasks, x = poisoned()

    class Poison(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            self.before = [theta.detach().clone() for theta in pl_module.parameters()]
            if task.name == "poisoned":
                x.fill_(math.nan)

    blip, module = BLIP(prior=1e-4, pull=0), Net()
    poison = Poison()
    with pytest.raises(FloatingPointError, match=r"Task 'poisoned': .*batch 0"):
        fit([poison, blip], module, tasks)
    assert blip.tasks_learned == 1
    assert [blip.state(name).tasks for name in blip.bits()] == [1] * 4
    for theta, before in zip(module.parameters(), poison.before, strict=True):
        assert torch.equal(theta, before)


def test_every_checkpoint_restores_bits_and_precision(tmp_path):
    blip = BLIP(prior=1e-4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit([blip, checkpoint], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["BLIP"]
    restored = BLIP(prior=1e-4)
    restored.load_state_dict(saved)
    assert blip.tasks_learned == restored.tasks_learned == 3
    assert same(restored.bits(), blip.bits())
    assert same(restored.precision(), blip.precision())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda blip: pickle.loads(pickle.dumps(blip))])
@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_a_copy_beside_a_wrapped_optimizer_learns_on_by_itself(basis, duplicate):
    blip, network = BLIP(prior=1e-4, basis=basis), nn.Linear(8, 6)
    optimizer = blip.wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
    for tasks_learned in (0, 1):
        twin = duplicate(blip)
        assert twin.as_dict() == blip.as_dict()
        assert twin.tasks_learned == tasks_learned
        twin.predicted_forgetting(network)
        assert same(twin.state_dict(), blip.state_dict())
        before = copy.deepcopy(blip.state_dict())
        twin.consolidate(copy.deepcopy(network), loader())
        assert twin.tasks_learned == tasks_learned + 1
        assert same(blip.state_dict(), before)
        network(torch.randn(5, 8)).sum().backward()
        optimizer.step()
        blip.consolidate(network, loader())


def test_a_copy_of_the_blip_of_a_trainer_learns_on_by_itself():
    blip, module = BLIP(prior=1e-4), Net()
    fit(blip, module)
    for twin in (copy.deepcopy(blip), pickle.loads(pickle.dumps(blip))):
        assert same(twin.state_dict(), blip.state_dict())
        fit(twin, copy.deepcopy(module))
        assert (twin.tasks_learned, blip.tasks_learned) == (6, 3)


def test_resuming_from_a_checkpoint_without_blip_warns(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(checkpoint, enable_checkpointing=True, max_epochs=1)
    with pytest.warns(UserWarning, match="saved without BLIP"):
        fit(BLIP(), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


def test_gradients_that_are_not_finite_are_refused_and_change_nothing():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 6))

        def forward(self, x):
            return (x @ self.weight).square().sum(1, keepdim=True).sqrt() + torch.zeros(6)

    network, blip = Rooted(), BLIP()
    with pytest.raises(FloatingPointError, match="Fisher information of 'weight' is not finite"):
        blip.consolidate(network, loader())
    assert blip.tasks_learned == 0
    assert (network.weight == 0).all()


def test_consolidating_another_network_is_refused():
    blip = BLIP()
    blip.consolidate(nn.Linear(8, 6), loader())
    with pytest.raises(ValueError, match="learned about 'weight', which the module does not have"):
        blip.consolidate(nn.Sequential(nn.Linear(8, 6)), loader())


class NoForward(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def heads_alone():
    network = Net(heads=3)
    network.body.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(BLIP(), NoForward()), "NoForward has no forward"),
        (lambda: fit(BLIP(), Net().to(torch.bfloat16)), "'body.0.weight' is torch.bfloat16"),
        (lambda: fit(BLIP(), Net().half()), "'body.0.weight' is torch.float16"),
        (lambda: BLIP().consolidate(nn.Linear(8, 6), [torch.zeros(3, 8)]), "batch of type Tensor is neither"),
        (lambda: fit(BLIP(), heads_alone()), "No parameter is tracked"),
    ],
)
def test_a_module_or_batch_that_blip_cannot_use_is_refused_with_its_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_that_cannot_be_read_is_refused_before_the_first_training_step():
    class Unreached(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("must not be reached")

    class Triples(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.zeros(8), 0, "path"

    tasks = TaskSequenceDataModule([Task("triples", train=Triples(), classes=(0,))])
    with pytest.raises(ValueError, match="neither a pair"):
        fit(BLIP(), Unreached(), tasks)


@pytest.mark.parametrize(
    ("terminal", "seconds", "shown"), [(True, 2, True), (False, 2, False), (True, 0, False)]
)
def test_a_long_estimate_shows_a_progress_bar_in_a_terminal_only(monkeypatch, terminal, seconds, shown):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    screen, clock = Screen(), count(0, seconds)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))
    BLIP().consolidate(nn.Linear(8, 6), loader())
    assert ("Fisher information" in screen.getvalue()) is shown
