"""Our methods as PEFT methods, for get_peft_model, save_pretrained, PeftModel.from_pretrained."""

from types import SimpleNamespace


def register_with_peft() -> SimpleNamespace:
    """Enter the methods that PEFT lacks into PEFT, and return their configuration classes.

        configs = dk.register_with_peft()
        model = get_peft_model(model, configs.SSBConfig(target_modules=["q_proj", "v_proj"]))

    The names are those of the methods and "Config": SSLConfig, SSBConfig, SVDiffConfig, ...  A
    configuration takes PEFT's target_modules, exclude_modules, modules_to_save, layers_to_transform
    and layers_pattern, and the method's own options.  Its peft_type is "DK_" and the method's name,
    never one of PEFT's: a file read where this was not called fails, naming the type.

    Once in a process is enough, and again does no harm.  Raises ImportError where PEFT is missing,
    and RuntimeError where this Python or this PEFT cannot be extended.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "register_with_peft needs PEFT: pip install peft; decomp_kernels.adapt, save_adapter "
            "and load_adapter do without"
        ) from error
    try:
        from decomp_kernels.interop.peft.tuner import CONFIGS
    except Exception as error:
        raise RuntimeError(
            f"PEFT {peft.__version__} cannot take further methods here ({error}); use "
            "decomp_kernels.adapt, save_adapter and load_adapter, which do without PEFT"
        ) from error
    return SimpleNamespace(**CONFIGS)
