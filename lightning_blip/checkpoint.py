"""The versions of what BLIP saves: the current one, and older ones brought up to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The version of :meth:`lightning_blip.BLIP.state_dict`.
VERSION = 2


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state in the form of the current version.

    Args:
        state: What any version of :meth:`lightning_blip.BLIP.state_dict` returned.

    Raises:
        ValueError: If a later version saved it.
    """
    version = state.get("version", 0)
    if version > VERSION:
        raise ValueError(
            f"The checkpoint holds version {version} of what BLIP learned, this is version {VERSION}: update "
            "lightning-blip"
        )
    return _from_version_1(state) if version < 2 else dict(state)


def _from_version_1(state: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 had parameters and layers apart, and the freezing's settings in every one of them."""
    frozen, settings = state["frozen"], {"fan": "in", **state["settings"]}
    if settings["basis"] == "kronecker":
        settings["cell"] = "strict"  # the setting had no effect
    ranks = {layer["rank"] for layer in frozen["layers"].values()}
    settings["rank"] = next(iter(ranks), None)
    states = {}
    for name, saved in frozen["parameters"].items():
        states[name] = {"kind": "diagonal", "names": [name], "state": _regrouped(saved, settings)}
    for name, saved in frozen["layers"].items():
        bias = frozen["biases"][name]
        names = [name] if bias is None else [name, bias]
        states[name] = {"kind": "kronecker", "names": names, "state": _regrouped(saved, settings)}
    return {**state, "version": VERSION, "settings": settings, "frozen": states}


def _regrouped(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of one state with those of its freezing and of its pace in groups."""
    freezing = {
        "max_bits": saved["max_bits"],
        "rule": settings["rule"],
        "cell": saved.get("cell", "strict"),
        "rank": saved.get("rank"),
    }
    pace = {name: saved[name] for name in ("total", "steps", "rate")}
    rest = {name: value for name, value in saved.items() if name not in {*freezing, *pace}}
    return {**rest, "freezing": freezing, "pace": pace}
