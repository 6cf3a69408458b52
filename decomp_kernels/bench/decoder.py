"""The model suite: one training step of a Llama-shaped decoder, for tokens per second and memory.

    step = loss, its gradient down to the first block's input, AdamW on the adapters

A row is one method at one size, dtype and checkpointing.  Its contenders, in one interleaved run:
the frozen model, an identical second one (the control), ours, PEFT's model of the same method, the
same after ``accelerate``, and, where it is asked for, ours and PEFT's under ``torch.compile``.  For
SSB, which PEFT lacks, the authors' formula is the peer.  All share the random base weights, start
from the same random adapters, none of them zero, and take the same batch.

Before anything is timed, loss and gradients of all are compared: a step that computes something
else is no contender.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from decomp_kernels.bench import engine, formulas
from decomp_kernels.bench.agreement import agree, copy_adapters, kinds_of, move
from decomp_kernels.bench.compiled import fresh_compiler
from decomp_kernels.bench.contenders import (
    ACCELERATED,
    FORMULA,
    OURS,
    OURS_COMPILED,
    PEFT,
    PEFT_COMPILED,
)
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.layers import AS_BASE, DTYPES
from decomp_kernels.bench.trainee import Trainee, causal
from decomp_kernels.bench.twins import peer_of, sibling, twin, with_formulas
from decomp_kernels.interop.peft.accelerate import accelerate
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods import methods
from decomp_kernels.methods.base import Method
from decomp_kernels.model import adapt

FORMULA_COMPILED = "formula, compiled"
COMPILED = {OURS: OURS_COMPILED, PEFT: PEFT_COMPILED, FORMULA: FORMULA_COMPILED}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHECKPOINTING = ("none", "block")


@dataclass(frozen=True)
class Size:
    """A decoder of Llama's shape, and the batch that it takes."""

    hidden: int = 768
    layers: int = 4
    heads: int = 12
    kv_heads: int = 4
    intermediate: int = 2048
    vocab: int = 4096
    batch: int = 2
    sequence: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            each = 2 * max(1, self.hidden // self.heads // 2)
            raise ValueError(
                f"hidden must be an even multiple of heads, got {self.hidden} and {self.heads}; "
                f"take hidden {each * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    @property
    def parameters(self) -> int:
        """Of the whole model, norms left out."""
        attention = self.hidden * self.hidden * (2 + 2 * self.kv_heads / self.heads)
        mlp = 3 * self.hidden * self.intermediate
        return round(self.layers * (attention + mlp)) + 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Row:
    """One line of the table; dtypes by name."""

    method: str
    options: tuple[tuple[str, Any], ...]
    size: Size
    targets: tuple[str, ...]
    dtype: str
    adapter_dtype: str
    checkpointing: str  # "none", or "block": each decoder layer's forward runs again in backward

    @property
    def label(self) -> str:
        dropout = dict(self.options).get("dropout")
        return f"{self.method}, dropout {dropout}" if dropout else self.method

    @property
    def described(self) -> dict[str, Any]:
        """As a results file has it."""
        return asdict(self) | {"label": self.label, "options": dict(self.options)}

    def make(self) -> Method:
        return methods()[self.method](**dict(self.options))


def rows(
    names: Sequence[str],
    size: Size,
    dtypes: Sequence[str],
    *,
    rank: int,
    dropouts: Sequence[float] = (0.0,),
    checkpointing: Sequence[str] = CHECKPOINTING,
    adapter_dtypes: Sequence[str] = (AS_BASE,),
    targets: Sequence[str] = TARGETS,
) -> Iterator[Row]:
    """Every row asked for; methods without dropout once.

    adapter_dtypes: of layers.ADAPTER_DTYPES; on a float32 model they are one.  Raises ValueError
    for a method that is not in the registry, and for options or sizes that it does not take.
    """
    registry = methods()
    for name in names:
        if name not in registry:
            raise ValueError(f"method must be one of {', '.join(registry)}, got {name!r}")
    adapters = {
        dtype: dict.fromkeys(dtype if kind == AS_BASE else kind for kind in adapter_dtypes)
        for dtype in dtypes
    }
    for dtype in dtypes:
        for adapter, kind, name in product(adapters[dtype], checkpointing, names):
            known = {field.name for field in fields(registry[name])}
            for dropout in dropouts if "dropout" in known else (0.0,):
                chosen: dict[str, Any] = {
                    "r": rank,
                    "alpha": 2.0 * rank,
                    "target_r": rank // 2 or 1,
                }
                if dropout:  # DoRA's as PEFT has it
                    chosen |= {"dropout": dropout, "dropout_mode": "peft"}
                options = tuple(sorted((k, v) for k, v in chosen.items() if k in known))
                yield Row(name, options, size, tuple(targets), dtype, adapter, kind)


def check(row: Row) -> None:
    """Raise ValueError where the method takes no such options or fits no layer of this size."""
    one_layer = replace(row, size=replace(row.size, layers=1))
    adapt(base_model(one_layer, torch.device("meta")), row.make(), list(row.targets))


def run(
    row: Row,
    *,
    rounds: int,
    warmup: int,
    seed: int,
    device: torch.device,
    clock: engine.Clock | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Measure one row: times, ratios, memory and losses, as the results file has them.

    clock: the device's wall clock where it is None.  backend: of ``torch.compile``; None leaves its
    contenders out.  Raises Disagreement where two contenders do not compute the same.
    """
    started = time.monotonic()
    clock = engine.device_clock(device) if clock is None else clock
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(fresh_compiler())
        trainees, left_out = build(row, seed=seed, device=device, backend=backend)
        for trainee in trainees:
            trainee.observe()
        agreement = agree(trainees, row.make(), row.dtype)
        contenders = [trainee.contender() for trainee in trainees]
        samples = engine.measure(contenders, rounds, warmup=warmup, seed=seed, clock=clock)
        memories = [trainee.memory(device) for trainee in trainees]
    peer = next((name for name in (PEFT, FORMULA) if name in samples.ns), None)
    measured = {}
    for trainee, memory_of in zip(trainees, memories, strict=True):
        name = trainee.name
        measured[name] = {
            "path": trainee.path(),
            "ratio": samples.by_phase(name),
            "ns": samples.ns[name],
            "tokens_per_second": _rate(row.size, samples.ns[name]["both"])._asdict(),
            "trainable": sum(p.numel() for p in trainee.trained),
        } | memory_of | agreement[name]  # fmt: skip
        if peer is not None:
            measured[name]["over_peer"] = samples.by_phase(name, against=peer)
    return row.described | {
        "parameters": sum(p.numel() for p in trainees[0].model.parameters()),
        "peer": peer,
        "contenders": measured,
        "left_out": left_out,
        "seconds": round(time.monotonic() - started, 2),
    }


def build(
    row: Row, *, seed: int, device: torch.device, backend: str | None = None
) -> tuple[list[Trainee], dict[str, str]]:
    """(the contenders of a row, in training mode; who is not among them, and why)."""
    torch.manual_seed(seed)
    base = base_model(row, device)
    tokens = torch.randint(row.size.vocab, (row.size.batch, row.size.sequence), device=device)
    wide = row.adapter_dtype != row.dtype
    ours = adapt(twin(base), row.make(), list(row.targets), autocast_adapter_dtype=wide)
    move(ours, DTYPES[row.dtype])
    models: dict[str, nn.Module] = {FROZEN: twin(base), CONTROL: twin(base), OURS: ours}
    left_out = {}
    try:
        name, peer = _peer(row, base, ours)
        models[name] = peer
        if name == PEFT:
            models[ACCELERATED] = accelerate(sibling(peer))
    except ValueError as error:
        left_out["peer"] = " ".join(str(error).split())
    if backend is not None:
        models |= {COMPILED[name]: sibling(models[name]) for name in COMPILED if name in models}
    made = []
    for name, model in models.items():
        model.train()
        if row.checkpointing == "block":  # after PEFT's wrapper, which would put a hook on x
            checkpoint_layers(model)
        made.append(Trainee(name, model, tokens, list(adapted_layers(ours))))
        if backend is not None and name in COMPILED.values():
            made[-1].compile(backend)
    return made, left_out


def _peer(row: Row, base: nn.Module, ours: nn.Module) -> tuple[str, nn.Module]:
    """(PEFT or FORMULA, its model with the values of our adapters); ValueError where none is."""
    method, layers = row.make(), adapted_layers(ours)
    if formulas.why_not(method) is None:
        dtype = DTYPES[row.adapter_dtype]

        def make(path: str, linear: nn.Linear) -> nn.Module:
            return formulas.of_adapter(linear, layers[path].adapters["default"], dtype)

        return FORMULA, with_formulas(base, layers, make)
    if not kinds_of(method, next(iter(layers.values())).adapters["default"]):
        raise ValueError(f"PEFT has {method.name} in tensors that cannot be given our values")
    wide = row.adapter_dtype != row.dtype
    found = peer_of(base, method, list(layers), wide=wide)
    if found is None:
        raise ValueError(f"nobody else has {method.name}, or PEFT is not installed")
    copy_adapters(ours, method, found[0])
    return PEFT, found[0]


def checkpoint_layers(model: nn.Module) -> None:
    """Keep the input of each decoder layer alone, and run it again in backward."""
    inner = causal(model)
    # Its name since transformers 5.23, which warns of the other one.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def base_model(row: Row, device: torch.device) -> nn.Module:
    """A frozen LlamaForCausalLM with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = row.size
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        max_position_embeddings=max(size.sequence, 64),
        use_cache=False,
        tie_word_embeddings=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[row.dtype])
    return model.requires_grad_(False)


def _rate(size: Size, ns: list[int]) -> engine.Spread:
    """Tokens per second, from the nanoseconds of each round's step."""
    return engine.spread([1e9 * size.batch * size.sequence / each for each in ns])
