"""What single configurations of PEFT need beyond their PeftForm."""

import re
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from decomp_kernels.interop.description import AdapterFileError
from decomp_kernels.methods import boft, oft


def read_layer(
    kind: str, config: dict[str, Any], path: str, options: dict[str, Any], theirs: dict[str, Tensor]
) -> None:
    """Change the options and PEFT's tensors of one layer, in place, to what the form says."""
    match kind:
        case "ADALORA":
            _restore_ranks(config, path, options, theirs)
        case "OFT":
            _check_rotation(config)
            options |= _oft_sizes(options, theirs["oft_R.weight"])
        case "BOFT":  # one, whatever was asked for, where PEFT's CUDA extension was not
            options["n_butterfly_factor"] = theirs["boft_R"].shape[0]
        case "HIRA":  # has a rank_pattern, which PEFT 0.21 does not follow everywhere
            options["r"] = theirs["hira_A"].shape[0]


def _restore_ranks(
    config: dict[str, Any], path: str, options: dict[str, Any], theirs: dict[str, Tensor]
) -> None:
    """Put the triplets that AdaLoRA's masks took out of the file back as zeros: s = alpha / init_r
    stays, and so does everything that is computed.
    """
    mask = (config.get("rank_pattern") or {}).get(f"{path}.lora_E")
    if mask is None:
        return
    kept = torch.tensor(mask, dtype=torch.bool).flatten()
    if len(kept) != options["r"] or int(kept.sum()) != theirs["lora_E"].shape[0]:
        raise AdapterFileError(
            f"rank_pattern must have init_r = {options['r']} entries for {path}, true for each of "
            f"the {theirs['lora_E'].shape[0]} ranks in the file; got {mask}"
        )
    for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        shape = list(theirs[name].shape)
        shape[dim] = len(kept)
        places = kept.nonzero().flatten()
        theirs[name] = theirs[name].new_zeros(shape).index_copy(dim, places, theirs[name])


def _check_rotation(config: dict[str, Any]) -> None:
    """PEFT 0.18, the first that writes its version, made another rotation of the same numbers."""
    version = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "0.0")
    old = version is None or (int(version[1]), int(version[2])) < (0, 18)
    if old and config.get("use_cayley_neumann", False):
        raise AdapterFileError(
            "OFT with use_cayley_neumann=True must be of PEFT 0.18 or later, which changed what "
            f"the numbers mean, got peft_version={config.get('peft_version')!r}; use that PEFT"
        )


def _oft_sizes(options: dict[str, Any], rotation: Tensor) -> dict[str, Any]:
    """PEFT takes the nearest divisor where a size does not fit a layer; here it must be given."""
    if options["r"] is None and options["block_size"] == oft.DEFAULT_SIZE:
        return {"block_size": None}
    if options["r"] == rotation.shape[0] and not options["block_share"]:
        return {"block_size": None}
    return {"r": None, "block_size": (1 + isqrt(1 + 8 * rotation.shape[1])) // 2}


def write_fields(config: dict[str, Any]) -> None:
    """Change the fields of a configuration, in place, to what PEFT takes."""
    match config["peft_type"]:
        case "ADALORA":  # the schedule's length is the trainer's to say, and PEFT wants a number
            config["total_step"] = config["tinit"] + config["tfinal"] + 1
        case "OFT":
            _one_size(config, "oft_block_size", "r", oft.DEFAULT_SIZE)
        case "BOFT":
            _one_size(config, "boft_block_size", "boft_block_num", boft.DEFAULT_SIZE)
        case "VERA":
            config["save_projection"] = True
        case "SHIRA":
            if config["r"] is None:
                raise ValueError(
                    "PEFT's SHiRA trains r (N + K) entries of a layer: Sparse must have r to be "
                    "saved in its format, got a density; use the format of decomp_kernels"
                )


def _one_size(config: dict[str, Any], size: str, count: str, default: int) -> None:
    """Of two sizes PEFT wants one, and 0 for the other."""
    if config[size] is None and config[count] is None:
        config[size] = default
    config[size], config[count] = config[size] or 0, config[count] or 0
