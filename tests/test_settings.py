"""BLIP's arguments: which values are refused, alone, together, and when a checkpoint is resumed."""

import math
import re
from dataclasses import FrozenInstanceError, fields

import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_blip import BLIP
from lightning_blip.settings import Settings
from tests.helpers.fitting import fit, same
from tests.helpers.networks import blobs

# Each value with the message it is refused with.
WRONG_VALUES = [
    ("prior", 0, "prior=0 must be positive"),
    ("prior", -1e-6, "prior=-1e-06 must be positive"),
    ("prior", math.nan, "prior=nan must be positive"),
    ("prior", "mine", "prior='mine' must be a number, or \"auto\""),
    ("max_bits", 0, "max_bits=0 must be 1 to 20"),
    ("max_bits", 21, "max_bits=21 must be 1 to 20"),
    ("max_bits", math.nan, "max_bits=nan must be a whole number"),
    ("max_bits", 2.5, "max_bits=2.5 must be a whole number"),
    ("prior", math.inf, 'prior=inf must be a number, or "auto"'),
    ("scale", "strong", "scale='strong' must be a number"),
    ("scale", None, "scale=None must be a number"),
    ("every", 1.5, "every=1.5 must be a whole number"),
    ("rank", 2.0, "rank=2.0 must be a whole number"),
    ("samples", None, "samples=None must be a whole number"),
    ("average", "no", "average='no' must be True or False"),
    ("rule", "mine", "rule='mine' must be one of ('exact', 'paper')"),
    ("cell", "mine", "cell='mine' must be one of ('strict', 'paper')"),
    ("basis", "mine", "basis='mine' must be one of ('diagonal', 'kronecker')"),
    ("scale", -1, "scale=-1 must not be negative"),
    ("scale", math.nan, "scale=nan must not be negative"),
    ("pull", -1, "pull=-1 must not be negative"),
    ("pull", math.nan, "pull=nan must not be negative"),
    ("pull", "strong", "pull='strong' must be a number, or \"auto\""),
    ("damping", -1.0, "damping=-1.0 must not be negative"),
    ("damping", math.nan, "damping=nan must not be negative"),
    ("damping", "much", "damping='much' must be a number, or \"auto\""),
    ("every", 0, "every=0 must be a number of steps"),
    ("expected_tasks", 0, "expected_tasks=0 must be at least 1"),
    ("forgetting_budget", 0.0, "forgetting_budget=0.0 must be positive"),
    ("forgetting_budget", math.nan, "forgetting_budget=nan must be positive"),
    ("rank", 0, "rank=0 must be at least 1"),
    ("samples", 0, "samples=0 must be at least 1"),
    ("smoothing", -0.1, "smoothing=-0.1 must be 0 to 1"),
    ("smoothing", 1.1, "smoothing=1.1 must be 0 to 1"),
    ("likelihood", "categoricl", "likelihood='categoricl' is not known: give one of 'categorical'"),
    ("labels", "mine", "labels='mine' "),
    ("norm_stats", "mine", "norm_stats='mine' must be one of ('per_task', 'freeze', 'shared', None)"),
    ("fan", "out", "fan='out' must be one of ('in', 'max')"),
]
# Patterns are compared with the names of a network, at the start of a fit.
PATTERNS = ("include", "exclude")


def learned(**options):
    """Return what a BLIP with these arguments saves after one task."""
    blip = BLIP(**options)
    blip.consolidate(nn.Linear(8, 6), DataLoader(blobs(), batch_size=30))
    return blip.state_dict()


@pytest.mark.parametrize(("name", "value", "message"), WRONG_VALUES)
def test_a_wrong_value_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        BLIP(**{name: value})


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_without_a_match_is_refused_when_the_fit_starts(name):
    with pytest.raises(ValueError, match=rf"^{name}='nose\.\*' matches none of the parameters"):
        fit(BLIP(**{name: "nose.*"}))


def test_every_argument_has_a_wrong_value_here():
    names = {name for name, _, _ in WRONG_VALUES} | set(PATTERNS)
    assert names == {one.name for one in fields(Settings)}


def test_a_batch_size_of_the_papers_code_below_1_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size=0 must be at least 1"):
        BLIP.paper(batch_size=0)


@pytest.mark.parametrize(("name", "value"), [("rule", "paper"), ("cell", "paper"), ("scale", 0.5)])
def test_arguments_of_the_diagonal_basis_are_refused_in_the_kronecker_basis(name, value):
    message = rf"^{name}={value!r} .* basis='kronecker': leave it out, or take basis='diagonal'"
    with pytest.raises(ValueError, match=message):
        BLIP(basis="kronecker", **{name: value})


def test_a_rank_is_refused_in_the_diagonal_basis():
    message = r"^rank=3 has no effect in basis='diagonal': leave it out, or take basis='kronecker'"
    with pytest.raises(ValueError, match=message):
        BLIP(rank=3)


def test_a_forgetting_budget_is_refused_beside_a_prior():
    with pytest.raises(ValueError, match=r"^forgetting_budget=0.1 chooses the prior, .*prior=1e-05"):
        BLIP(prior=1e-5, forgetting_budget=0.1)


# Of each setting that a resumed run may not change: the arguments of two runs that differ in it alone.
DIFFERENT = {
    "prior": ({"prior": 1e-4}, {"prior": 0.1}),
    "max_bits": ({}, {"max_bits": 12}),
    "rule": ({}, {"rule": "paper"}),
    "cell": ({}, {"cell": "paper"}),
    "basis": ({}, {"basis": "kronecker"}),
    "rank": ({"basis": "kronecker"}, {"basis": "kronecker", "rank": 3}),
    "pull": ({}, {"pull": 1.0}),
    "damping": ({}, {"damping": 0.5}),
    "norm_stats": ({"norm_stats": "shared"}, {"norm_stats": "freeze"}),
    "fan": ({}, {"fan": "max"}),
}


def test_every_setting_that_is_fixed_on_resuming_is_compared_here():
    assert DIFFERENT.keys() == Settings().fixed().keys()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_checkpoint_with_another_setting_is_refused_and_changes_nothing(name, reverse):
    saved_with, resumed_with = reversed(DIFFERENT[name]) if reverse else DIFFERENT[name]
    saved, blip = learned(**saved_with), BLIP(**resumed_with)
    here, there = getattr(blip, name), saved["settings"][name]
    message = f"{name}={here!r} differs from the checkpoint's {there!r}: resume with BLIP({name}={there!r})"
    before = blip.state_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        blip.load_state_dict(saved)
    assert same(blip.state_dict(), before)
    resumed = BLIP(**{**saved_with, name: there})
    resumed.load_state_dict(saved)
    assert resumed.tasks_learned == 1


def test_norm_stats_that_are_not_given_are_those_of_the_checkpoint():
    blip = BLIP()
    blip.load_state_dict(learned(norm_stats="freeze"))
    assert blip.norm_stats_in_use == "freeze"


def test_all_other_settings_may_change_on_resuming():
    blip = BLIP(
        scale=0.5, every=3, expected_tasks=2, forgetting_budget=1.0, average=False, samples=20, smoothing=0.0,
        likelihood="gaussian", labels="empirical", include="weight", exclude="bias",
    )  # fmt: skip
    changed = {one.name for one in fields(Settings) if getattr(blip, one.name) != getattr(BLIP(), one.name)}
    assert changed == {one.name for one in fields(Settings)} - DIFFERENT.keys()
    blip.load_state_dict(learned())
    assert blip.tasks_learned == 1


def test_the_papers_preset_for_atari_takes_the_larger_side_and_batches_of_62():
    blip = BLIP.paper(prior=5e-18, batch_size=62, fan="max")
    assert (blip.fan, blip.prior) == ("max", pytest.approx(5e-18 * 3_844))


def test_settings_cannot_be_changed():
    blip = BLIP(pull=2.0)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'pull'"):
        blip.pull = 1.0
    assert blip.pull == blip.chosen["pull"] == 2.0
