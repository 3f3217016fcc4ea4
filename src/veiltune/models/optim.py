"""AdamW that can be put away and taken up again bit for bit; both parties train with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ResumableAdamW:
    """AdamW over named parameters, with a step count and a state of plain tensors.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> optimizer = ResumableAdamW({"w": weight}, weight_decay=0.0)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.apply(learning_rate=0.5)
    >>> round(weight.item(), 3), optimizer.step
    (0.5, 1)
    >>> optimizer.restore(None)  # back to the start
    >>> weight.item(), optimizer.step
    (1.0, 0)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> None:
        self.step = 0
        self._parameters = dict(parameters)
        self._initial = {name: p.detach().clone() for name, p in self._parameters.items()}
        groups = [{"params": list(self._parameters.values())}]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)

    def apply(self, *, learning_rate: float) -> None:
        """Updates the parameters from their gradients and clears those."""
        self.step += 1
        if not self._parameters:
            return
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drops gathered gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """A copy of the step, the parameters and the moments."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self._parameters.items():
            tensors[f"param.{name}"] = parameter.detach().clone()
            for moment in _MOMENTS:
                if parameter in self._adamw.state:
                    tensors[f"{moment}.{name}"] = self._adamw.state[parameter][moment].clone()
        return tensors

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Goes back to a state, or to the parameters as they were at construction for None."""
        self.clear()
        self._adamw.state.clear()
        self.step = 0 if state is None else int(state["step"])
        for name, parameter in self._parameters.items():
            source = self._initial[name] if state is None else state[f"param.{name}"]
            with torch.no_grad():
                parameter.copy_(source)
            if state is not None and f"exp_avg.{name}" in state:
                moments = {moment: state[f"{moment}.{name}"].clone() for moment in _MOMENTS}
                self._adamw.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
