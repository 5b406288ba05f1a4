"""`FreezeGuard`: freezes modules, and gives them back as they were."""

from __future__ import annotations

from torch import nn


class FreezeGuard:
    """Holds modules frozen and in evaluation mode, and remembers how they were."""

    def __init__(self, *modules: nn.Module) -> None:
        self._parameters: list[nn.Parameter] = []
        self._training: list[nn.Module] = []
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Freeze one more module."""
        self._parameters += [p for p in module.parameters() if p.requires_grad]
        self._training += [part for part in module.modules() if part.training]
        module.requires_grad_(False).eval()

    def restore(self) -> None:
        """Set every parameter and module back to what it was."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module in self._training:
            module.training = True
        self._parameters, self._training = [], []
