"""BLIP in a Trainer and by hand."""

import copy
import csv
import gc
import io
import math
import weakref
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
from tests.helpers.networks import QUIET, Net, blobs, pairs


def fit(blip, module=None, tasks=None, **options):
    trainer = pl.Trainer(**{**QUIET, "callbacks": [blip], **options})
    trainer.fit(module or Net(), datamodule=tasks or pairs())
    return trainer


def loader():
    return DataLoader(blobs(), batch_size=30)


@pytest.mark.parametrize("options", [{}, {"basis": "kronecker"}, {"prior": 1e-4}])
def test_one_callback_and_one_fit_keep_what_fine_tuning_forgets(options):
    def accuracy_on_the_first_task(callbacks):
        torch.manual_seed(0)
        tasks = TaskSequenceDataModule.permute_inputs(
            blobs(), blobs(seed=1), tasks=4, epochs_per_task=6, batch_size=16
        )
        trainer = pl.Trainer(**{**QUIET, "callbacks": callbacks})
        trainer.fit(Net(), datamodule=tasks)
        return trainer.callback_metrics["val_acc/dataloader_idx_0"].item()

    assert accuracy_on_the_first_task([BLIP(**options)]) > accuracy_on_the_first_task([]) + 0.3


def test_what_is_frozen_stays_frozen_through_the_fit():
    class Codes(pl.Callback):
        """Remembers what every boundary froze and looks for it after every later step and boundary."""

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
    fit(blip, callbacks=[blip, codes])
    assert len(codes.kept) == 3 * 4
    assert all((bits > 0).any() for _, _, bits in codes.kept)
    assert blip.used_capacity > 0.01


def test_the_consolidated_state_is_that_of_the_formulas():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))
    before = [theta.detach().clone() for theta in network.parameters()]
    blip = BLIP(prior=1e-3, damping=0, samples=70)
    fisher = diagonal_fisher(network, loader(), samples=70, generator=torch.Generator().manual_seed(0))
    report = blip.consolidate(network, loader())
    for name, fan_in in (("0.weight", 8), ("0.bias", 8), ("2.weight", 4), ("2.bias", 4)):
        prior = 1e-3 * fan_in
        # The information is kept in 16 bits.
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


def test_the_paper_to_the_letter():
    blip = BLIP.paper(prior=1e-15, samples=50)
    assert blip.prior == pytest.approx(1e-11)
    assert (blip.rule, blip.cell, blip.scale, blip.pull, blip.samples) == ("paper", "paper", 0.0, 0.0, 50)
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))
    with torch.no_grad():
        network[0].weight[0].fill_(-1.0)  # never active on the inputs below: no information
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
    """Layers with more inputs than outputs, and with fewer; fan_out as torch counts it is no side of them."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Conv2d(8, 40, 2, groups=2), nn.Flatten(), nn.Linear(40 * 5 * 5, 3)
    )


FANS = {"in": {"0": 18, "1": 16, "3": 1000}, "max": {"0": 18, "1": 40, "3": 1000}}


@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_bound_and_prior_go_by_the_inputs_or_by_the_larger_side_of_a_layer(fan, basis):
    network = matrices()
    network.append(nn.Linear(3, 12))
    batches = [(torch.randn(16, 2, 8, 8), torch.zeros(16))]
    blip = BLIP(prior=1e-3, fan=fan, basis=basis)
    blip.consolidate(network, batches)
    for layer, size in {**FANS[fan], "4": 3 if fan == "in" else 12}.items():
        states = [blip.state(name) for name in blip.bits() if name.startswith(layer)]
        assert states[0].bound == pytest.approx(6 / size**0.5)
        assert [state.prior for state in states] == pytest.approx([1e-3 * size] * len(states))
        if basis == "diagonal" or layer == "1":  # in groups it has no Kronecker factors
            assert states[1].bound == 1.0


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_the_prior_that_is_chosen_goes_by_the_same_side_of_a_layer(rule):
    """So that as many bits are frozen: where all layers are as wide, the prior alone differs."""
    network = nn.Sequential(nn.Linear(8, 32))
    batches = [(torch.randn(64, 8), torch.zeros(64))]
    narrow, wide = BLIP(rule=rule), BLIP(rule=rule, fan="max")
    for blip in (narrow, wide):
        blip.consolidate(copy.deepcopy(network), batches)
    assert wide.chosen["prior"] == pytest.approx(narrow.chosen["prior"] / 4, rel=1e-3)


def test_the_papers_setting_for_atari():
    """The larger side, and batches of 62: a rollout of 2,000 steps in 32 parts."""
    blip = BLIP.paper(prior=5e-18, batch_size=62, fan="max")
    assert (blip.fan, blip.prior) == ("max", pytest.approx(5e-18 * 3_844))


def test_a_checkpoint_of_another_fan_is_refused():
    blip = BLIP(prior=1e-3)
    blip.consolidate(nn.Linear(4, 8), [(torch.randn(8, 4), torch.zeros(8))])
    saved = blip.state_dict()
    with pytest.raises(ValueError, match=r"fan='max' differs from the checkpoint's 'in': .*BLIP\(fan='in'\)"):
        BLIP(prior=1e-3, fan="max").load_state_dict(saved)
    BLIP(prior=1e-3).load_state_dict(saved)


def test_new_parameters_of_a_restored_network_have_its_fan():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16))
    batches = [(torch.randn(8, 4), torch.zeros(8))]
    blip, restored = BLIP(prior=1e-3, fan="max"), BLIP(prior=1e-3, fan="max")
    network[1].requires_grad_(False)
    blip.consolidate(network, batches)
    restored.load_state_dict(blip.state_dict())
    network[1].requires_grad_(True)
    restored.consolidate(network, batches)
    assert restored.state("1.weight").bound == pytest.approx(6 / 4)


def test_heads_per_task_are_not_tracked_and_a_shared_one_is():
    heads, shared = BLIP(), BLIP()
    fit(heads, Net(heads=3))
    fit(shared, Net())
    assert sorted(heads.bits()) == ["body.0.bias", "body.0.weight"]
    assert sorted(shared.bits()) == ["body.0.bias", "body.0.weight", "head.bias", "head.weight"]


def test_include_and_exclude_by_pattern():
    blip = BLIP(include=["body.*", "head.weight"], exclude="*.bias")
    fit(blip)
    assert sorted(blip.bits()) == ["body.0.weight", "head.weight"]
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}='nose\.\*' matches none of the parameters"):
            fit(BLIP(**{argument: "nose.*"}))


def test_parameters_that_are_not_trained_are_left_alone():
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
    network.weight.requires_grad_(False)
    blip.consolidate(network, loader())
    assert torch.equal(blip.bits()["weight"], bits)
    assert blip.tasks_learned == 2
    network.bias.requires_grad_(False)
    blip.consolidate(network, loader())
    assert torch.equal(blip.bits()["weight"], bits)


@pytest.mark.parametrize("optimizer", ["adam", "several", "same again"])
def test_it_is_installed_around_whatever_the_module_configured(optimizer):
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
        counts = []

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            assert all(isinstance(one, FrozenBitsOptimizer) for one in trainer.optimizers)
            assert not any(isinstance(one.optimizer, FrozenBitsOptimizer) for one in trainer.optimizers)
            self.counts.append([len(one._optimizer_step_post_hooks) for one in trainer.optimizers])

    blip = BLIP(prior=1e-4)
    module = Optimized()
    fit(blip, module, callbacks=[blip, Wrapped()])
    assert "configure_optimizers" not in vars(module)
    assert blip.tasks_learned == 3
    assert all(count == 1 for counts in Wrapped.counts for count in counts)


def test_a_trainer_per_task_and_any_data_with_consolidate_by_hand():
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

    before = codes()
    pl.Trainer(**QUIET, callbacks=[blip], max_epochs=2).fit(module, loader())
    for name, code in codes().items():
        assert torch.equal(before[name], code)


def test_a_loop_of_plain_pytorch():
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


def test_estimating_leaves_rng_mode_gradients_and_running_statistics():
    module = Net(norm=True)
    module.train()
    module.body[2].eval()
    running = module.body[1].running_mean.clone()
    state = torch.get_rng_state()
    modes = [part.training for part in module.modules()]
    BLIP().consolidate(module, loader())
    assert torch.equal(module.body[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes
    assert all(theta.grad is None for theta in module.parameters())


@pytest.mark.parametrize("by_hand", [False, True])
def test_batches_are_those_that_the_training_step_gets(by_hand):
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


def test_mappings_with_labels_are_understood():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, points):
            return self.layer(points)

    pairs_, named = nn.Linear(8, 6), Named()
    named.layer.load_state_dict(pairs_.state_dict())
    one, other = BLIP(), BLIP()
    one.consolidate(pairs_, loader())
    other.consolidate(named, [{"points": x, "labels": y} for x, y in loader()])
    assert torch.equal(one.bits()["weight"], other.bits()["layer.weight"])


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
    """What a CSVLogger in the folder wrote at the boundaries."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["blip/seconds"]]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_every_logger_hears_what_was_frozen(tmp_path, monkeypatch):
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


def test_in_the_papers_cell_drift_is_seen(tmp_path):
    fit(BLIP(prior=1e-7, cell="paper", scale=0, pull=0), logger=CSVLogger(tmp_path))
    rows = boundary_rows(tmp_path)
    assert rows[1]["blip/drifted_share"] > 0
    assert rows[1]["blip/at_wall_share"] > 0


def poisoned():
    points = blobs()
    x = points.tensors[0].clone()
    tasks = [
        Task("clean", train=points, test=points),
        Task("poisoned", train=TensorDataset(x, points.tensors[1]), test=points),
    ]
    return TaskSequenceDataModule(tasks, batch_size=40), x


def test_a_loss_that_is_not_finite_names_task_and_batch_and_changes_nothing(tmp_path):
    tasks, x = poisoned()

    class Poison(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            self.before = [theta.detach().clone() for theta in pl_module.parameters()]
            if task.name == "poisoned":
                x.fill_(math.nan)

    blip, module = BLIP(prior=1e-4, pull=0), Net()
    poison = Poison()
    with pytest.raises(FloatingPointError, match=r"Task 'poisoned': .*batch 0"):
        fit(blip, module, tasks, callbacks=[poison, blip])
    assert blip.tasks_learned == 1
    assert all(state.tasks == 1 for state in map(blip.state, blip.bits()))
    for theta, before in zip(module.parameters(), poison.before, strict=True):
        assert torch.equal(theta, before)


def test_saved_in_every_checkpoint_and_refused_with_other_settings(tmp_path):
    blip = BLIP(prior=1e-4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(blip, callbacks=[blip, checkpoint], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["BLIP"]
    restored = BLIP(prior=1e-4)
    restored.load_state_dict(saved)
    for name in blip.bits():
        assert torch.equal(restored.bits()[name], blip.bits()[name])
        assert torch.equal(restored.precision()[name], blip.precision()[name])
    with pytest.raises(ValueError, match=r"prior=0.1 differs from the checkpoint's 0.0001"):
        BLIP(prior=0.1).load_state_dict(saved)
    with pytest.raises(ValueError, match="rule='paper' differs"):
        BLIP(prior=1e-4, rule="paper").load_state_dict(saved)


def test_a_checkpoint_that_knows_nothing_of_it_is_warned_of(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    pl.Trainer(**{**QUIET, "enable_checkpointing": True}, callbacks=[checkpoint], max_epochs=1).fit(
        Net(), datamodule=pairs()
    )
    with pytest.warns(UserWarning, match="saved without BLIP"):
        pl.Trainer(**QUIET, callbacks=[BLIP()], max_epochs=2).fit(
            Net(), datamodule=pairs(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_gradients_that_are_not_finite_change_nothing():
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


def test_another_network_is_refused():
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
        (lambda: BLIP(prior=0), "prior=0 must be positive"),
        (lambda: BLIP(prior=-1e-6), "prior=-1e-06 must be positive"),
        (lambda: BLIP(prior=math.nan), "prior=nan must be positive"),
        (lambda: BLIP(max_bits=21), "max_bits=21 must be 1 to 20"),
        (lambda: BLIP(max_bits=0), "max_bits=0 must be 1 to 20"),
        (lambda: BLIP(rule="mine"), "rule='mine' must be one of"),
        (lambda: BLIP(cell="mine"), "cell='mine' must be one of"),
        (lambda: BLIP(labels="mine"), "labels='mine' is not known"),
        (lambda: BLIP(fan="out"), r"fan='out' must be one of \('in', 'max'\)"),
        (lambda: BLIP.paper(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: BLIP(scale=-1), "scale=-1 must not be negative"),
        (lambda: BLIP(pull=-1), "pull=-1 must not be negative"),
        (lambda: BLIP(samples=0), "samples=0 must be at least 1"),
        (lambda: fit(BLIP(), NoForward()), "NoForward has no forward"),
        (lambda: fit(BLIP(), Net().to(torch.bfloat16)), "'body.0.weight' is torch.bfloat16"),
        (lambda: fit(BLIP(), Net().half()), "'body.0.weight' is torch.float16"),
        (lambda: BLIP().consolidate(nn.Linear(8, 6), [torch.zeros(3, 8)]), "batch of type Tensor is neither"),
        (lambda: fit(BLIP(), heads_alone()), "No parameter is tracked"),
    ],
)
def test_bad_arguments_get_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_that_cannot_be_read_are_refused_at_the_first_one():
    class Alone(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("must not be reached")

    class Triples(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.zeros(8), 0, "path"

    tasks = TaskSequenceDataModule([Task("triples", train=Triples(), classes=(0,))])
    with pytest.raises(ValueError, match="neither a pair"):
        fit(BLIP(), Alone(), tasks)


@pytest.mark.parametrize(
    ("terminal", "seconds", "shown"), [(True, 2, True), (False, 2, False), (True, 0, False)]
)
def test_a_progress_bar_shows_in_a_terminal_while_a_long_estimate_runs(monkeypatch, terminal, seconds, shown):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    screen, clock = Screen(), count(0, seconds)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))
    BLIP().consolidate(nn.Linear(8, 6), loader())
    assert ("Fisher information" in screen.getvalue()) is shown


def test_a_blip_holds_no_optimizer_after_a_fit():
    blip = BLIP(prior=1e-4)
    trainer = fit(blip)
    (wrapper,) = trainer.strategy.optimizers
    assert isinstance(wrapper, FrozenBitsOptimizer)
    gone = weakref.ref(wrapper)
    del trainer, wrapper
    gc.collect()
    assert gone() is None
    assert blip.tasks_learned == 3
