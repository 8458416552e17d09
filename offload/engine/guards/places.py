"""Where the module keeps its parameters: exchanges are refused, additions are told of."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from offload.engine.paging.pages import PagedParameter, paged_by_owner
from offload.errors import GuardError, listed

_NO_GUARD = torch._C.DisableTorchFunctionSubclass


class Places:
    """Where a module holds its parameters: conversions such as `.to("meta")` put others there.

    What joins the module later, such as adapters, the engine neither moves nor trains. torch tells
    of every registration; the module is walked only after one that concerns it.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[PagedParameter]) -> None:
        paged_of = paged_by_owner(parameters)
        self._module = module
        self._places = [
            (owner._parameters, name, paged_of[id(parameter)])
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in paged_of
        ]
        self._known = set(module.parameters())
        self._owners = weakref.WeakSet(module.modules())
        self._has_additions = False
        hook = _Registration(self)
        self._handles = [
            register_module_module_registration_hook(hook),
            register_module_parameter_registration_hook(hook),
        ]

    def check(self) -> None:
        """Every place holds the parameter that it held, over the memory that it had.

        Warns of parameters that have been added since the last call and require gradients.

        Raises:
            GuardError: a place does not; names the parameter.
        """
        with _NO_GUARD():
            for held, name, parts in self._places:
                parameter = held.get(name)
                if parameter is None:
                    continue  # moved, as parametrizations do: wherever it is, it is the same object
                moved = _moved(parameter, parts)
                if moved is not None:
                    raise GuardError(
                        f"parameter {moved.state.name} was replaced: the engine trains the one it "
                        "was given",
                        remedy="convert or exchange parameters before offload.initialize; change "
                        "values in place",
                    )
            if self._has_additions:
                self._warn_of_additions()

    def note_registration(self, owner: nn.Module) -> None:
        """A parameter or a module was registered with `owner`."""
        self._has_additions = self._has_additions or owner in self._owners

    def remove(self) -> None:
        """The engine is closed."""
        for handle in self._handles:
            handle.remove()

    def _warn_of_additions(self) -> None:
        self._has_additions = False
        self._owners.update(self._module.modules())
        added = {n: p for n, p in self._module.named_parameters() if p not in self._known}
        self._known.update(added.values())
        names = [name for name, parameter in added.items() if parameter.requires_grad]
        if names:
            warnings.warn(
                f"{listed(names)}: added after offload.initialize, so the engine does not train "
                "them; add adapters and modules before it",
                stacklevel=4,
            )


def _moved(parameter: nn.Parameter, parts: Sequence[PagedParameter]) -> PagedParameter | None:
    """The first of the parts of a parameter that are not in its place any more."""
    composite = parts[0].composite
    if parameter is not parts[0].owner or not (composite is None or composite.is_whole()):
        return parts[0]
    return next((paged for paged in parts if not paged.is_in_place()), None)


class _Registration:
    """A hook on every module of the process, which keeps no engine alive."""

    __slots__ = ("_places",)

    def __init__(self, places: Places) -> None:
        self._places = weakref.ref(places)

    def __call__(self, module: nn.Module, _name: str, _value: Any) -> None:
        places = self._places()
        if places is not None:
            places.note_registration(module)
