"""Muon for the hidden matrices, AdamW for everything else, as one optimizer."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Named = tuple[str, nn.Parameter]
Signature = list[tuple[str, str, tuple[int, ...]]]
GATE_LR = 1e-2


def parameter_groups(model: Any, muon: bool = True) -> dict[str, list[Named]]:
    """Choose which optimizer trains what.

    Muon takes the weights of linear layers, the head apart (tied or not, and an adapter's of it), as long as they are
    matrices: a layer with one output is a vector. AdamW takes all else: embeddings, head, norms, biases, decay gates
    (`A_log`, `dt_bias`), taps of short convolutions, routers and fused experts. Of these only what has at least two
    dimensions is decayed. What lies between two passes (`model.between`) is a group of its own, whatever its shapes:
    AdamW's, without decay.

    Args:
        model: a `SleepForCausalLM`, or anything else with its methods (a PEFT model of it).
        muon: whether Muon takes part; else its matrices are AdamW's.

    Returns:
        `"adamw"`, `"adamw_no_decay"`, `"muon"` and `"between"`, each a list of name and parameter: every trainable
        parameter once, frozen ones not at all.

    Source: Jordan et al. 2024 (Muon), for hidden matrices only; Lee et al. 2026 (arXiv 2605.26099), Muon for matrices.
    """
    head = model.get_output_embeddings()
    # PEFT wraps the head that it trains.
    of_head = set() if head is None else set(head.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in of_head]
    matrices = {id(module.weight) for module in linear if min(module.weight.shape) > 1}
    groups: dict[str, list[Named]] = {"adamw": [], "adamw_no_decay": [], "muon": [], "between": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "between" in name.split("."):
            kind = "between"
        elif muon and id(parameter) in matrices:
            kind = "muon"
        else:
            kind = "adamw" if parameter.ndim > 1 else "adamw_no_decay"
        groups[kind].append((name, parameter))
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, with one set of groups and one state.

    A learning-rate scheduler scales each group's own rate. Muon's update is scaled as Jordan's was ("original", torch's
    default): at these rates a pretrained model moves about as far per step as AdamW at 5e-5 would move it.

    Args:
        groups: what `parameter_groups` returns.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled, of Muon's matrices and AdamW's parameters with at least two dimensions.
        fused: AdamW's fused kernel.
        gate_lr: learning rate of what lies between two passes. AdamW moves a parameter by about its rate per step, and
            a gate has to go from 0 to about 1: at 1e-2 that is some hundred steps, at 5e-5 it would be 20,000.

    Raises:
        ValueError: no trainable parameters.

    Source: Lee et al. 2026 (arXiv 2605.26099), experiments: Muon for matrices, AdamW at 5e-5 for the rest.
    """

    def __init__(
        self,
        groups: dict[str, list[Named]],
        lr: float = 5e-5,
        muon_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        fused: bool = False,
        gate_lr: float = GATE_LR,
    ):
        if not any(groups.values()):
            raise ValueError("nothing to optimize, every parameter is frozen: set requires_grad=True of some")
        makers: dict[str, Callable[[list], torch.optim.Optimizer]] = {
            "adamw": lambda g: torch.optim.AdamW(g, lr, betas, eps, weight_decay, fused=fused or None),
            "adamw_no_decay": lambda g: torch.optim.AdamW(g, lr, betas, eps, 0.0, fused=fused or None),
            "muon": lambda g: torch.optim.Muon(g, muon_lr, weight_decay),
            "between": lambda g: torch.optim.AdamW(g, gate_lr, betas, eps, 0.0, fused=fused or None),
        }
        self._optimizers = {
            kind: makers[kind]([{"params": named, "kind": kind, "param_shapes": [tuple(p.shape) for _, p in named]}])
            for kind, named in groups.items()
            if named
        }
        super().__init__([group for part in self._optimizers.values() for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: computes the loss and its gradients again, and returns it; called once.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, optimizer in self._optimizers.items():
            # Loading a state, and sharding the model, put others in their place.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Args:
            state_dict: of an optimizer of the same parameters.

        Raises:
            ValueError: a state of other parameters, before anything has changed.
        """
        check_signature(state_dict, signature(self.param_groups))
        super().load_state_dict(state_dict)


def signature(groups: Iterable[dict[str, Any]]) -> Signature:
    """Optimizer, name and shape of every parameter, in order."""
    return [
        (group["kind"], name, tuple(shape))
        for group in groups
        for name, shape in zip(group["param_names"], group["param_shapes"], strict=True)
    ]


def check_signature(state_dict: dict[str, Any], ours: Signature) -> None:
    """Check that an optimizer's state was written for these parameters.

    Args:
        state_dict: of a `MuonAdamW`.
        ours: the parameters that it should be for.

    Raises:
        ValueError: naming the first parameter that differs.
    """
    if not all("param_shapes" in group for group in state_dict["param_groups"]):
        raise ValueError(
            "this optimizer state was not written by MuonAdamW: continue with the optimizer that wrote it, or start a "
            "new run from the checkpoint's weights"
        )
    for theirs, mine in itertools.zip_longest(signature(state_dict["param_groups"]), ours):
        if theirs != mine:
            saved, here = (
                "nothing" if entry is None else f"{entry[1]} {list(entry[2])} ({entry[0]})" for entry in (theirs, mine)
            )
            raise ValueError(
                "this optimizer state belongs to another model or another choice of what to train: it has "
                f"{saved} where this model has {here}. Build the model and freeze its parameters as in the run that "
                "wrote it, with the same muon_learning_rate or None"
            )
