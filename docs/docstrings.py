"""How the docstrings of the package are read for the site: examples as such, Sphinx's roles as links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`([\w.]+)`")


class Docstrings(griffe.Extension):
    """Makes of the docstrings what mkdocstrings understands."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrites them once all names are known.

        Args:
            pkg: The package, read whole.
            **kwargs: Not used.
        """
        _rewrite(pkg)


def _rewrite(item: griffe.Object) -> None:
    if item.docstring:
        text = re.sub(r"^Example:$", "Examples:", item.docstring.value, flags=re.MULTILINE)
        item.docstring.value = _ROLE.sub(lambda role: _link(item, role[1]), text)
    for member in item.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member)


def _link(item: griffe.Object, name: str) -> str:
    """A link to what a name means where it stands; none if the site does not have it."""
    scope = item.parent if isinstance(item, griffe.Function | griffe.Attribute) and item.parent else item
    try:
        target = item.modules_collection[scope.resolve(name)].canonical_path
    except (griffe.NameResolutionError, KeyError):
        target = name
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
