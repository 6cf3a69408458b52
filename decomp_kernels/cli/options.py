"""What a training job is asked to do: defaults < configuration file < command line.

A configuration file (YAML or JSON) has the command line's long options as its keys, with - or _:

    model: ./my-encoder
    data: pairs.jsonl
    method: [ssb, {name: lora, r: 16, alpha: 32, lr: 0.002}]
    steps: 200
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import decomp_kernels as dk
from decomp_kernels.cli.errors import BadInput, need, one_line
from decomp_kernels.methods.base import Method

CHOICES = {
    "task": ("auto", "retrieval", "language"),
    "dtype": ("float32", "bfloat16", "float16"),
    "pooling": ("mean", "cls"),
    "mpc": (None, "o", "d"),
}
# Methods that train scales near 1 need larger steps than those that train matrices.
SCALES = ("ia3", "ssb", "ssl", "vera")
RATE, RATE_OF_SCALES = 2e-4, 5e-3  # the customary ones of LoRA and of (IA)^3
BUILT_IN_RATE, BUILT_IN_RATE_OF_SCALES = (
    4e-3,
    3e-2,
)  # found by short runs: a small encoder, few steps
# These may differ between the parts of an interrupted job: they do not change its weights.
NUMBERS = ("lr", "epochs", "weight_decay", "mpc_coef")
FREE = ("output", "resume", "overwrite", "config", "checkpoint_every", "rounds")


@dataclass
class MethodChoice:
    """One method of the job: its options as given, and its own learning rate."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    label: str = ""  # the name, numbered where the job has it more than once

    def make(self) -> Method:
        known = dk.methods()
        if self.name not in known:
            raise BadInput(
                f"unknown method {self.name!r}; the methods are {', '.join(known)} "
                "(decomp-kernels methods shows them)"
            )
        try:
            return known[self.name](**self.options)
        except (TypeError, ValueError) as error:
            raise BadInput(f"method {self.name}: {one_line(error)}") from None


@dataclass
class TrainOptions:
    """One field an option; the command line's help is main.py's."""

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    task: str = "auto"
    method: list[MethodChoice] = field(
        default_factory=lambda: [MethodChoice(name) for name in ("ssb", "lora", "dora")]
    )
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    lr: float | None = None
    weight_decay: float = 0.0
    mpc: str | None = None
    mpc_coef: float = 0.1
    max_length: int = 64
    pooling: str = "mean"
    base_dropout: bool = False
    held_out: int | None = None
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    threads: int | None = None
    rounds: int = 12
    checkpoint_every: int = 10
    output: str = "runs/train"
    overwrite: bool = False
    resume: bool = False
    config: str | None = None

    def check(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            if option.name != "method":
                _check(option.name, getattr(self, option.name), hints[option.name])
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise BadInput(
                    f"{_flag(name)} must be one of {', '.join(filter(None, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("steps", "batch_size", "max_length", "threads", "checkpoint_every",
                     "held_out", "epochs", "lr"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{_flag(name)} must be greater than 0, got {value}")
        for name in ("rounds", "weight_decay", "seed", "mpc_coef"):
            if getattr(self, name) < 0:
                raise BadInput(f"{_flag(name)} must not be negative, got {getattr(self, name)}")
        if self.steps is not None and self.epochs is not None:
            raise BadInput("give --steps or --epochs, not both")
        if self.resume and self.overwrite:
            raise BadInput("give --resume or --overwrite, not both")
        if self.model is not None and self.data is None:
            raise BadInput("--model needs --data: without both, the built-in example is trained")
        if not self.method:
            raise BadInput("--method must name at least one method")
        seen: dict[str, int] = {}
        for choice in self.method:
            choice.make()
            if choice.lr is not None and not choice.lr > 0:
                raise BadInput(f"--lr must be greater than 0, got {choice.lr}")
            seen[choice.name] = seen.get(choice.name, 0) + 1
            count = seen[choice.name]
            choice.label = choice.name if count == 1 else f"{choice.name}-{count}"

    def learning_rate(self, choice: MethodChoice) -> float:
        if choice.lr or self.lr:
            return choice.lr or self.lr or 0.0
        if choice.name in SCALES:
            return BUILT_IN_RATE_OF_SCALES if self.data is None else RATE_OF_SCALES
        return BUILT_IN_RATE if self.data is None else RATE

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def same_job(self) -> dict[str, Any]:
        """The options that decide the weights: resuming asks for the same ones."""
        return {name: value for name, value in self.as_json().items() if name not in FREE}


def gather(given: dict[str, Any]) -> TrainOptions:
    """Options from a command line's ``given`` ones over those of its configuration file."""
    merged: dict[str, Any] = {}
    if given.get("config") is not None:
        merged = _read_config(Path(given["config"]))
    merged |= given
    options = TrainOptions(**merged)
    options.check()
    return options


def parse_value(text: str) -> Any:
    """A method option from the command line: JSON where it is some, true/false/none, else text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_names(text: str) -> str | list[str]:
    """ "all-linear", a regular expression, or a list: "query,value"; a lone name is a list too."""
    if text == "all-linear" or not all(c.isalnum() or c in "_.,-" for c in text):
        return text
    return [name for name in text.split(",") if name]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} must be UTF-8 text") from None
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    elif path.suffix.lower() in (".yaml", ".yml"):
        yaml = need("yaml", "train")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"{path} is not valid YAML: {one_line(error)}") from None
    else:
        raise BadInput(f"--config must be a .yaml, .yml or .json file, got {path}")
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold a mapping of options, got {type(values).__name__}")
    known = {option.name for option in fields(TrainOptions)} - {"config"}
    read = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise BadInput(f"{path}: unknown key {key!r}; the keys are {', '.join(sorted(known))}")
        if name == "method":
            value = _methods(value, path)
        elif name in NUMBERS and isinstance(value, str):
            value = _number(name, value)
        read[name] = value
    return read


def _methods(value: Any, path: Path) -> list[MethodChoice]:
    entries = value if isinstance(value, list) else [value]
    choices = []
    for entry in entries:
        if isinstance(entry, str):
            choices += [MethodChoice(name.strip()) for name in entry.split(",")]
        elif isinstance(entry, dict) and isinstance(entry.get("name"), str):
            options = {str(k): v for k, v in entry.items() if k not in ("name", "lr")}
            lr = _number("lr", entry["lr"]) if "lr" in entry else None
            choices.append(MethodChoice(entry["name"], options, lr))
        else:
            raise BadInput(
                f"{path}: method must be names or mappings such as {{name: lora, r: 16}}, "
                f"got {entry!r}"
            )
    return choices


def _number(name: str, value: Any) -> float:
    """YAML reads 1e-3, without a dot, as text."""
    try:
        return float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        raise BadInput(f"{_flag(name)} must be a number, got {value!r}") from None


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return
    if float in kinds and type(value) in (int, float):
        return
    for kind in kinds:
        if kind in (str, int, bool) and type(value) is kind:
            return
        if kind == list[str] and isinstance(value, list) and all(type(v) is str for v in value):
            return
    wanted = " or ".join(
        {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
            kind, "a list of names"
        )
        for kind in kinds
        if kind is not type(None)
    )
    raise BadInput(f"{_flag(name)} must be {wanted}, got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
