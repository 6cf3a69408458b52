"""A described adapter into a model:  Description, tensors, model  ->  adapters in place.

Everything is checked and made first; only then is anything of the model changed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop.description import (
    AdapterFileError,
    Description,
    bias_key,
    module_key,
)
from decomp_kernels.interop.fitting import Fitted, fit
from decomp_kernels.interop.tensor_file import dtype_name
from decomp_kernels.linear import adapted_layers, check_adapter_name
from decomp_kernels.methods.base import Adapter
from decomp_kernels.model import check_can_add, put_adapters
from decomp_kernels.saved_modules import trained_copies


@torch.no_grad()
def install(
    model: nn.Module,
    description: Description,
    tensors: Callable[[], dict[str, Tensor]],
    adapter_name: str | None,
    allow_other_base: bool,
) -> None:
    """See ``load_adapter``; description and tensors are what ``read_folder`` returned."""
    name = description.adapter_name if adapter_name is None else adapter_name
    check_adapter_name(name)
    check_can_add(model, name, trains_biases=bool(description.biases))
    _check_free(model, name)
    fitted = fit(model, description, allow_other_base)
    values = _values(tensors(), fitted)
    adapters = _filled(fitted, values, description)
    for path, module in fitted.copies.items():
        module.load_state_dict({key: values[module_key(path, key)] for key in module.state_dict()})

    # From here on nothing can fail: everything is made.
    for bias, tensor in fitted.biases.items():
        tensor.copy_(values[bias_key(bias)])
    put_adapters(model, name, adapters, fitted.copies, list(fitted.biases))


def _check_free(model: nn.Module, name: str) -> None:
    for path, module in {**adapted_layers(model), **trained_copies(model)}.items():
        if name in getattr(module, "adapters", ()) or name in getattr(module, "copies", ()):
            raise ValueError(
                f"{path or 'the model'} already has an adapter {name!r}; load this one under "
                "another name: load_adapter(model, folder, adapter_name=...)"
            )


def _values(tensors: dict[str, Tensor], fitted: Fitted) -> dict[str, Tensor]:
    """The file's tensors where the model needs them, checked to be finite."""
    found = {}
    for key, place in fitted.places.items():
        tensor = tensors[key]
        dtype = tensor.dtype if tensor.dtype in place.dtypes else place.convert_to
        made = tensor.to(place.device, dtype, copy=True)
        if made.is_floating_point() and not torch.isfinite(made).all():
            raise AdapterFileError(
                f"{key} must be finite, and as {dtype_name(dtype)} it holds NaN or infinity; "
                "the file is damaged, or its numbers do not fit that dtype"
            )
        found[key] = made
    return found


def _filled(
    fitted: Fitted, values: dict[str, Tensor], description: Description
) -> dict[str, Adapter]:
    """The blank adapters with their values.  A shared tensor is one Parameter on all its layers."""
    parameters: dict[str, nn.Parameter] = {}
    for path, adapter in fitted.blanks.items():
        for name, blank in adapter.state_dict(keep_vars=True).items():
            key = description.key(path, name)
            owner_path, _, last = name.rpartition(".")
            owner: Any = adapter.get_submodule(owner_path)
            if isinstance(blank, nn.Parameter):
                if key not in parameters:
                    parameters[key] = nn.Parameter(values[key], requires_grad=blank.requires_grad)
                owner._parameters[last] = parameters[key]
            else:
                owner._buffers[last] = values[key]
        base = fitted.layers[path].base(path)
        adapter.initialized = True
        try:
            adapter.method.check_values(adapter, base)
        except ValueError as error:
            raise AdapterFileError(
                f"the file's tensors for {path or 'the model'} cannot be right: {error}"
            ) from None
        adapter.method.refresh(adapter, base)
        left = [n for n, t in (*adapter.named_parameters(), *adapter.named_buffers()) if t.is_meta]
        if left:
            raise AdapterFileError(
                f"{type(adapter.method).__name__} cannot be loaded: it keeps {left[0]!r} out of "
                "the file, and its refresh does not make it again"
            )
    return fitted.blanks
