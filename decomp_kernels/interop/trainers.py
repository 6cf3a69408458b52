"""Callbacks for transformers.Trainer and what is made of it, such as TRL's SFTTrainer.

    Trainer(model, args, callbacks=[RankAllocatorCallback(), ...], ...)

    RankAllocatorCallback      AdaLoRA's rank allocator, after each optimizer step
    SelectDirectionsCallback   LoRA-Dash's choice of directions, once
    MPCLossCallback            the gradient of the pattern constraint, in each optimizer step
    SaveAdapterCallback        the adapter alone, beside each checkpoint and at the end
    CheckGradientsCallback     stops a run in which part of the adapter is not trained

Importing this file imports transformers.
"""

import base64
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from decomp_kernels.constraints import mpc_loss
from decomp_kernels.interop.contents import which_adapter
from decomp_kernels.interop.files import save_adapter
from decomp_kernels.interop.tensor_file import decode, encode
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.adalora import AdaLoRA, RankAllocator
from decomp_kernels.methods.lora_dash import LoRADash, select_directions

FOLDER = "adapter"  # where SaveAdapterCallback writes, inside a checkpoint and inside output_dir


class RankAllocatorCallback(TrainerCallback, ExportableState):
    """AdaLoRA's rank allocator in the Trainer: ``RankAllocator.step`` after each optimizer step.

    The schedule is that of the model's AdaLoRA; its total_step is the Trainer's max_steps.  A step
    that a gradient scaler skipped is not observed.  The allocator's state stands in a checkpoint's
    trainer_state.json, 11 bytes a trained number, and a resumed run goes on with it.  The
    orthogonality term of the method's loss is MPCLossCallback's.

    allocator: the RankAllocator of the run; its ``ranks()`` are those of the last masking.
    """

    allocator: RankAllocator | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.allocator = RankAllocator(_active(kwargs["model"], AdaLoRA)[0], state.max_steps)
        if state.global_step:
            self.allocator.load_state_dict(_saved_state(state.stateful_callbacks, type(self)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.allocator is not None
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.allocator.step(kwargs["model"], state.global_step + 1)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the allocator's tensors as a safetensors file in base64."""
        tensors = {} if self.allocator is None else self.allocator.state_dict()
        text = base64.b64encode(b"".join(encode(tensors))).decode()
        return {"args": {}, "attributes": {"saved": text}}


class SelectDirectionsCallback(TrainerCallback):
    """LoRA-Dash's directions, selected once ``after_steps`` optimizer steps are taken.

    100 is the paper's warm-up.  A checkpoint of that step or of a later one holds the directions.
    """

    def __init__(self, after_steps: int = 100) -> None:
        if type(after_steps) is not int or after_steps < 1:
            raise ValueError(f"after_steps must be a whole number from 1 on, got {after_steps!r}")
        self.after_steps = after_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _active(kwargs["model"], LoRADash)
        if state.max_steps <= self.after_steps:
            raise ValueError(
                f"after_steps must be below the {state.max_steps} steps of the run, or the "
                f"directions are never trained, got {self.after_steps}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after_steps:
            select_directions(kwargs["model"])


class MPCLossCallback(TrainerCallback):
    """Trains on the task's loss + ``mpc_loss(model, kind, coef, ...)``, whose options these are.

    The gradient of a sum is the sum of the gradients: this one is added once in each optimizer
    step, before the first micro-batch, whatever the accumulation.  So it is clipped with the rest,
    scaled as fp16's gradient scaler has it, and equal on all ranks of DistributedDataParallel.
    The logged loss is the task's alone.  DeepSpeed and FSDP keep gradients elsewhere: refused.

    AdaLoRA's own term: MPCLossCallback("o", 0.5, squared=False, reduction="mean_over_matrices").
    """

    def __init__(
        self,
        kind: str = "o",
        coef: float = 0.1,
        *,
        squared: bool = True,
        reduction: str = "sum",
    ) -> None:
        self.kind, self.coef, self.squared, self.reduction = kind, coef, squared, reduction

    def loss(self, model: nn.Module) -> torch.Tensor:
        """The term itself, a scalar."""
        return mpc_loss(model, self.kind, self.coef, squared=self.squared, reduction=self.reduction)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        where = args.distributed_state.distributed_type.value
        if where in ("DEEPSPEED", "FSDP"):
            raise ValueError(
                f"MPCLossCallback adds to the parameters' .grad, which {where} does not train on; "
                "add decomp_kernels.mpc_loss(model) to the loss in your own compute_loss"
            )
        self.loss(kwargs["model"])  # raises for what it cannot be, before the first step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.loss(kwargs["model"])
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        # Not backward(): its hooks are for the task's gradient, DDP's and CheckGradientsCallback's.
        grads = torch.autograd.grad(
            loss if scaler is None else scaler.scale(loss), trained, allow_unused=True
        )
        for parameter, grad in zip(trained, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad


class SaveAdapterCallback(TrainerCallback):
    """``save_adapter`` into <checkpoint>/adapter, and into <output_dir>/adapter at the end.

    The Trainer's own files hold the whole model, frozen weights included, and are what it resumes
    from; this is what ``load_adapter`` takes.  With load_best_model_at_end the last one is of the
    best model.  Not for hyperparameter_search, whose checkpoints lie in other folders.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        which_adapter(adapted_layers(kwargs["model"]), None)  # raises now, not after the training

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._save(checkpoint, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(Path(args.output_dir), state, kwargs["model"])

    def _save(self, folder: os.PathLike[str], state: Any, model: nn.Module) -> None:
        if state.is_world_process_zero:
            save_adapter(model, Path(folder) / FOLDER)


class CheckGradientsCallback(TrainerCallback):
    """Raises in the first optimizer step where a parameter that should train has no gradient.

    Found this way: reentrant activation checkpointing of a model whose inputs require no gradient,
    and an adapter on a head whose weight the loss reads directly (as SFTTrainer's does), both of
    which train the rest and say nothing.  Not for layers that a step may leave out, as the experts
    of a mixture.
    """

    def __init__(self) -> None:
        self.reached: set[str] = set()
        self.hooks: dict[str, Any] = {}  # by parameter, until the first step is checked

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reached = set()
        self.hooks = {
            name: parameter.register_post_accumulate_grad_hook(partial(self._reach, name))
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad
        }

    def _reach(self, name: str, _: torch.Tensor) -> None:
        self.reached.add(name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks, self.hooks = self.hooks, {}
        for hook in hooks.values():
            hook.remove()
        without = [name for name in hooks if name not in self.reached]
        if without:
            raise RuntimeError(
                f"{len(without)} of {len(hooks)} trained parameters got no gradient, the first "
                f"of them {without[0]}; with activation checkpointing set use_reentrant=False or "
                "call model.enable_input_require_grads(), and adapt no layer whose weight the "
                "loss reads directly"
            )


def _active(model: nn.Module, kind: type) -> list[Any]:
    """The active adapters' methods of this kind; raises where there is none."""
    layers = [layer for layer in adapted_layers(model).values() if layer.active_adapter is not None]
    methods = [layer.adapters[layer.active_adapter].method for layer in layers]
    found = [method for method in methods if isinstance(method, kind)]
    if not found:
        raise ValueError(
            f"the model must have an active {kind.__name__} adapter; call "
            f"adapt(model, {kind.__name__}(...)) before the Trainer is made"
        )
    return found


def _saved_state(stored: dict[str, Any], callback: type) -> dict[str, torch.Tensor]:
    """The tensors that ``callback`` put into the checkpoint that the Trainer resumes from."""
    if callback.__name__ not in stored:
        raise ValueError(
            f"the checkpoint holds no state of {callback.__name__}: it was saved without one; "
            "resume with the callbacks that the run was started with"
        )
    return decode(base64.b64decode(stored[callback.__name__]["attributes"]["saved"]))
