"""Lightning on a model from adapt(): learning, and resuming from its own checkpoint."""

import logging
import tempfile
import warnings
from typing import Any

import lightning as L
import torch
from common import adapted, batch, data, distance, frozen, llama, main, perturb, trained, unmoved
from torch import Tensor, nn
from torch.utils.data import DataLoader

import decomp_kernels as dk


class Module(L.LightningModule):
    """Any model with a loss; the optimizer is given what trains, in dk.param_groups."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**rows).loss + dk.mpc_loss(self.model, "d", 0.01)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(dk.param_groups(self.model, lr=5e-3))


def run(model: nn.Module, epochs: int, rows: int, resume: str | None = None, **more: Any) -> Any:
    L.seed_everything(3, verbose=False)
    module = Module(model)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **more,
    )  # fmt: skip
    loader = DataLoader(data(rows), batch_size=4, collate_fn=batch)
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


def learning() -> dict[str, Any]:
    model = dk.adapt(llama(), dk.DoRA(r=8, alpha=16, dropout=0.1), modules_to_save=["lm_head"])
    before, base = trained(model), frozen(model)
    module, _ = run(model, 2, 64, gradient_clip_val=1.0)
    return {
        "losses": module.losses,
        "unmoved": unmoved(before, trained(model)),
        "trained": len(before),
        "base_changed": distance(base, frozen(model)),
    }


def resumed() -> dict[str, Any]:
    """Two epochs of 3 steps, against one, a checkpoint, and one more in a new model.  No dropout:
    Lightning's checkpoints hold no state of torch's generator.
    """
    method = dk.DoRA(r=4, alpha=8)
    whole = perturb(adapted(method))
    all_at_once, _ = run(whole, 2, 12)
    with tempfile.TemporaryDirectory() as folder:
        half = perturb(adapted(method))
        _, trainer = run(half, 1, 12)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        again = adapted(method, seed=5)
        module, _ = run(again, 2, 12, f"{folder}/half.ckpt")
        dk.save_adapter(again, f"{folder}/adapter")
        loaded = dk.load_adapter(llama(), f"{folder}/adapter").eval()
    sample = batch(data(2))
    y = again.eval()(**sample).logits
    return {
        "adapter": distance(trained(whole), trained(again)),
        "losses": [all_at_once.losses[3:], module.losses],
        "another_start": distance(trained(whole), trained(adapted(method, seed=5))),
        "loaded": (loaded(**sample).logits - y).abs().max().item(),
        "moved": (llama().eval()(**sample).logits - y).abs().max().item(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main({"learning": learning, "resumed": resumed})
