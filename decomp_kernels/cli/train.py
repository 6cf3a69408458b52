"""The main job: put methods on a pretrained model's linears, train them, measure them, save them.

    load -> measure the frozen model -> for each method: train, measure, save, check
         -> time all of them interleaved -> one table, metrics.json, a picture

Output folder:  job.json  adapters/<method>/  checkpoints/<method>.safetensors  metrics.json
                results.md  losses.png
"""

import platform
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench.tables import counted
from decomp_kernels.bench.twins import twin
from decomp_kernels.cli import checks, folder, loop, models
from decomp_kernels.cli.companions import companion
from decomp_kernels.cli.compare import Compared, compare
from decomp_kernels.cli.datasets import Data, gather
from decomp_kernels.cli.errors import BadInput, CheckFailed, need, one_line
from decomp_kernels.cli.language import Language
from decomp_kernels.cli.options import MethodChoice, TrainOptions
from decomp_kernels.cli.report import Trained, write_all
from decomp_kernels.cli.retrieval import Retrieval
from decomp_kernels.cli.tasks import Scores, Task, gain_interval

BUILT_IN_STEPS = 60


@dataclass
class Job:
    """What every method of the job shares."""

    options: TrainOptions
    pretrained: models.Pretrained
    task: Task
    steps: int
    device: torch.device
    before: dict[str, Scores]
    error_of_base: float

    @property
    def base(self) -> nn.Module:
        return self.pretrained.model

    def fresh(self) -> nn.Module:
        return _load(self.options, self.device).model


def run(options: TrainOptions) -> int:
    for package in ("transformers", "tqdm", "matplotlib"):
        need(package, "train")  # now, not after the training
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    pretrained = _load(options, device)
    data = gather(options.data, options.eval_data, options.held_out, pretrained.task)
    task = _task(pretrained, data, options)
    steps = _steps(options, task)
    _rehearse(pretrained.model, options, steps)
    output = folder.open_job(Path(options.output), options, data.sha256)
    _announce(pretrained, data, options, steps, device)

    before = task.evaluate(pretrained.model.eval(), options.batch_size)
    error_of_base = checks.rounding(pretrained.model, task)
    job = Job(options, pretrained, task, steps, device, before, error_of_base)
    adapted: dict[str, nn.Module] = {}
    trained = []
    for choice in options.method:
        adapted[choice.label], result = _one(job, choice, output)
        trained.append(result)
    compared = _compare(job, adapted)
    write_all(
        output, options, pretrained.name, data, task, before, trained, compared, device
    )  # fmt: skip
    broken = [result.label for result in trained if not result.agreement.holds]
    if broken:
        raise CheckFailed(f"{', '.join(broken)}: reloaded or merged outputs differ, see above")
    return 0


def _rehearse(base: nn.Module, options: TrainOptions, steps: int) -> None:
    """Refuse now, and not after the first methods were trained, what the last does not fit.

    On the meta device: the shapes and the modules are the model's, and nothing is computed.
    """
    skeleton = twin(base).to("meta")
    for choice in options.method:
        model = _adapt(twin(skeleton), choice, options)
        companion(model, options.mpc, options.mpc_coef, steps)


def _one(job: Job, choice: MethodChoice, output: Path) -> tuple[nn.Module, Trained]:
    """Train, measure, save and check one method."""
    options, method = job.options, choice.make()
    torch.manual_seed(options.seed)
    model = _adapt(twin(job.base), choice, options)
    models.training_mode(model, options.base_dropout)
    lr = options.learning_rate(choice)
    helper = companion(model, options.mpc, options.mpc_coef, job.steps)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = loop.train(
        model, job.task, helper,
        label=choice.label, steps=job.steps, batch_size=options.batch_size, lr=lr,
        weight_decay=options.weight_decay, seed=options.seed,
        checkpoint_path=output / "checkpoints" / f"{choice.label}.safetensors",
        checkpoint_every=options.checkpoint_every, resume=options.resume,
    )  # fmt: skip
    helper.finish()
    after = job.task.evaluate(model.eval(), options.batch_size)
    saved = output / "adapters" / choice.label
    try:
        dk.save_adapter(model, saved)
    except OSError as error:
        raise BadInput(f"cannot write {saved}: {error.strerror or error}") from None
    agreement = checks.agreement(model, job.base, job.fresh, job.task, saved, job.error_of_base)
    print(agreement.line(choice.label), flush=True)
    gains = {
        name: gain_interval(job.before[name], scores, job.task.higher_is_better, seed=0)
        for name, scores in after.items()
    }
    return model, Trained(
        choice.label, asdict(method) | {"name": method.name}, lr, trainable, history,
        {name: scores.metric for name, scores in after.items()}, gains, agreement,
    )  # fmt: skip


def _adapt(model: nn.Module, choice: MethodChoice, options: TrainOptions) -> nn.Module:
    exclude = options.exclude_modules
    if exclude is None and options.target_modules == "all-linear":
        exclude = models.unused(model) or None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dk.adapt(model, choice.make(), options.target_modules, exclude_modules=exclude)
        except (TypeError, ValueError) as error:
            raise BadInput(f"method {choice.name}: {one_line(error)}") from None
    if next(model.parameters()).device.type != "meta":  # the rehearsal's are the same ones
        for warning in caught:
            print(f"note: {choice.label}: {one_line(warning.message)}")  # type: ignore[arg-type]
    return model


def _compare(job: Job, adapted: dict[str, nn.Module]) -> list[Compared]:
    if job.options.rounds == 0:
        return []
    options = job.options
    rows = loop.rows_of(0, job.task.size, options.batch_size, options.seed)
    return compare(
        job.base, adapted, job.task, rows, rounds=options.rounds, seed=options.seed,
        base_dropout=options.base_dropout, device=job.device,
    )  # fmt: skip


def _load(options: TrainOptions, device: torch.device) -> models.Pretrained:
    return models.load(options.model, options.task, getattr(torch, options.dtype), device)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} cannot be used: {one_line(error)[:120]}") from None
    return device


def _task(pretrained: models.Pretrained, data: Data, options: TrainOptions) -> Task:
    common = data.train, data.held_out, pretrained.tokenizer, options.max_length
    if pretrained.task == "language":
        return Language(*common)
    if options.batch_size < 2:
        raise BadInput("--batch-size must be at least 2: a query's wrong answers are its batch's")
    return Retrieval(*common, options.pooling)


def _steps(options: TrainOptions, task: Task) -> int:
    batches = task.size // options.batch_size
    if batches == 0:
        raise BadInput(
            f"--batch-size must be at most the number of training rows, {task.size}, "
            f"got {options.batch_size}"
        )
    if options.steps is not None:
        return options.steps
    if options.epochs is None and options.data is None:
        return BUILT_IN_STEPS
    return max(1, round((options.epochs or 1) * batches))


def _announce(
    pretrained: models.Pretrained,
    data: Data,
    options: TrainOptions,
    steps: int,
    device: torch.device,
) -> None:
    size = sum(p.numel() for p in pretrained.model.parameters()) / 1e6
    threads, rows = torch.get_num_threads(), counted(len(data.train), "row")
    labels = ", ".join(choice.label for choice in options.method)
    print(
        f"model   {pretrained.name}, {size:.1f} M parameters, {options.dtype}\n"
        f"data    {data.name}: {rows} and {len(data.held_out):,} held out\n"
        f"task    {pretrained.task}\n"
        f"train   {labels}: {counted(steps, 'step')} of {options.batch_size} rows each\n"
        f"on      {device}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        flush=True,
    )
