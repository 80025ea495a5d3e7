"""Megatron's mixed-precision optimizer on one device: BF16 parameters, float32 main copies, gradients and Adam moments.

Mirrors Float16OptimizerWithFloat16Params (megatron/core/optimizer/optimizer.py), _get_param_groups
(megatron/core/optimizer/__init__.py), clip_grads.py and OptimizerParamScheduler at core_v0.14.0; the scheduler is
megatron-core's own.
"""

from __future__ import annotations

import argparse

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from training.embedded.errors import TrainingError


class MainParamOptimizer:
    """AdamW over float32 main parameters.

    After construction every parameter of the model has a float32 `main_grad`, to which backward passes add: linear
    layers by themselves (fp8_linear), the others through a hook.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.main = [parameter.detach().float().clone() for parameter in self.parameters]
        for parameter, main in zip(self.parameters, self.main, strict=True):
            main.grad = parameter.main_grad = torch.zeros_like(main)
            parameter.register_post_accumulate_grad_hook(_move_grad_to_main)
        # Biases and norms are not decayed (no_weight_decay_cond at the pin).
        groups = [
            {"params": [m for n, m in self._named_main() if not _undecayed(n, m)], "wd_mult": 1.0},
            {"params": [m for n, m in self._named_main() if _undecayed(n, m)], "wd_mult": 0.0},
        ]
        for group in groups:
            # The scheduler prefers these to its own: a checkpoint's peak survives a change of flags, as upstream.
            group.update(max_lr=args.lr, min_lr=args.min_lr, lr_mult=1.0)
        self.adam = torch.optim.AdamW(
            groups,
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
        )
        self.clip_grad = args.clip_grad

    @property
    def param_groups(self) -> list[dict]:
        """What OptimizerParamScheduler sets `lr` and `weight_decay` on."""
        return self.adam.param_groups

    @property
    def lr(self) -> float:
        """The learning rate that the next step uses."""
        return self.adam.param_groups[0]["lr"]

    def step(self) -> float:
        """Clip, step, round the main parameters into the model, clear gradients. Returns the norm before clipping."""
        norm = self.grad_norm()
        if self.clip_grad > 0.0:
            # clip_grad_by_total_norm_fp32 at the pin, epsilon included.
            coefficient = self.clip_grad / (norm + 1.0e-6)
            if coefficient < 1.0:
                torch._foreach_mul_([main.grad for main in self.main], coefficient)
        self.adam.step()
        self.copy_main_to_model()
        torch._foreach_zero_([main.grad for main in self.main])
        return norm

    def grad_norm(self) -> float:
        """L2 norm of all main gradients."""
        return _l2_norm([main.grad for main in self.main])

    def params_norm(self) -> float:
        """L2 norm of all parameters."""
        return _l2_norm(self.main)

    def zeros_in_grad(self) -> int:
        """Number of gradient elements that are exactly zero."""
        return sum(int((main.grad == 0).sum()) for main in self.main)

    @torch.no_grad()
    def copy_main_to_model(self) -> None:
        """Round the float32 main parameters into the model's BF16 ones."""
        torch._foreach_copy_(self.parameters, self.main)

    @torch.no_grad()
    def copy_model_to_main(self) -> None:
        """Take the model's parameters as the main ones: after loading weights without optimizer state."""
        torch._foreach_copy_(self.main, self.parameters)

    def moments(self, kind: str) -> dict[str, Tensor]:
        """Adam's `exp_avg` or `exp_avg_sq` by parameter name, float32; zeros before the first step."""
        return {
            n: self.adam.state[m][kind] if m in self.adam.state else torch.zeros_like(m) for n, m in self._named_main()
        }

    def load(
        self, main: dict[str, Tensor], exp_avg: dict[str, Tensor], exp_avg_sq: dict[str, Tensor], steps: int
    ) -> None:
        """Restore main parameters, both moments and Adam's step count; the model's parameters follow the main ones."""
        with torch.no_grad():
            for name, parameter in self._named_main():
                parameter.copy_(main[name])
                self.adam.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": exp_avg[name].to(parameter.device),
                    "exp_avg_sq": exp_avg_sq[name].to(parameter.device),
                }
        self.copy_main_to_model()

    def steps(self) -> int:
        """Number of steps taken."""
        state = self.adam.state.get(self.main[0])
        return int(state["step"]) if state else 0

    def _named_main(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, self.main, strict=True))


def build_scheduler(optimizer: MainParamOptimizer, args: argparse.Namespace) -> OptimizerParamScheduler:
    """megatron-core's scheduler, counting samples (get_optimizer_param_scheduler, training.py:978)."""
    batch = args.global_batch_size
    decay_iters = args.lr_decay_iters or args.train_iters
    warmup = args.lr_warmup_iters * batch
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay_iters * batch
    constant = args.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_iters * batch,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay if constant else args.start_weight_decay,
        end_wd=args.weight_decay if constant else args.end_weight_decay,
        wd_incr_steps=args.train_iters * batch,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def load_scheduler(scheduler: OptimizerParamScheduler, state: dict) -> None:
    """Restore the scheduler; one that differs from the checkpoint's is refused, as upstream, unless overridden."""
    try:
        scheduler.load_state_dict(state)
    except AssertionError as error:
        raise TrainingError(
            f"the checkpoint's schedule is another one ({error}); --override-opt_param-scheduler takes the flags'"
        ) from error


def _undecayed(name: str, parameter: Tensor) -> bool:
    return name.endswith(".bias") or parameter.dim() == 1


def _move_grad_to_main(parameter: Tensor) -> None:
    if parameter.grad is not None:  # a linear layer has added its own already
        parameter.main_grad += parameter.grad
        parameter.grad = None


def _l2_norm(tensors: list[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(tensors)).norm().item()
