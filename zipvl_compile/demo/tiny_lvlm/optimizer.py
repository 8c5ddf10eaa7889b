"""The optimizer of the stages: AdamW, or Muon for the matrices inside layers and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon) makes every update of a matrix nearly orthogonal.  In a thousand steps
on few patches the model of the large canvas learns with it what several thousand of AdamW's do not teach it.
"""

from __future__ import annotations

import math

import torch


class Optimizer:
    """One or two optimizers of torch over one model, stepped together.

    rates: parts of the model with the rate of each.  muon: the rate of matrices inside layers, as a multiple of their
    part's; 0 leaves all to AdamW.  betas: of AdamW.  Norms and biases have no weight decay.
    """

    def __init__(
        self,
        rates: list[tuple[torch.nn.Module, float]],
        weight_decay: float,
        muon: float,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        plain, hidden = [], []
        for part, rate in rates:
            inside = set(_matrices_inside_layers(part)) if muon else set()
            others = [parameter for parameter in part.parameters() if parameter not in inside]
            matrices = [parameter for parameter in others if parameter.dim() > 1]
            flat = [parameter for parameter in others if parameter.dim() <= 1]
            plain.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
            plain.append({"params": flat, "lr": rate, "weight_decay": 0.0})
            hidden.append({"params": [p for p in part.parameters() if p in inside], "lr": rate * muon})
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(plain, betas=betas)]
        if muon:
            # With this scale a rate moves a matrix as much as the same rate of AdamW does.
            scale = "match_rms_adamw"
            hidden = [group for group in hidden if group["params"]]
            self.optimizers.append(torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn=scale))
        self.groups = [group for one in self.optimizers for group in one.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]

    def set_rate(self, step: int, steps: int, warmup: int) -> None:
        """Linear warm-up, then a cosine down to 2% of each group's rate."""
        factor = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of ``loss``, which is cut to norm 1."""
        for one in self.optimizers:
            one.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for one in self.optimizers:
            one.step()


def _matrices_inside_layers(part: torch.nn.Module) -> list[torch.Tensor]:
    """The weights of linear modules within ``part``; not its own, if it is the head that gives words."""
    return [module.weight for name, module in part.named_modules() if name and isinstance(module, torch.nn.Linear)]
