"""The package's layers, from the bottom up, and what each holds: for the import test and docs.

A file may import what stands in a lower layer, its own folder, and its PEERS.
"""

LAYERS = [
    {
        "tables": "choices by architecture and size, shipped and measured",
        "native_library": "what was built of csrc/, loaded on first use",
        "sharding": "tensors that lie on several processes",
    },
    {
        "factors": "the form that every method lowers to",
        "quantized_weight": "a weight as codes and scales",
        "peft_form": "how PEFT spells a method",
        "dispatch": "which implementation runs, and why",
        "roofline": "what an implementation computes and moves at the least",
    },
    {"reference": "the definition of each operator and its gradients, plainly"},
    {"kernels": "fast implementations: aten, of library calls; triton; native, of csrc/"},
    {"ops": "schema, fake, autograd, public function: one file an operator"},
    {"methods": "LoRA, DoRA, SSB, ...: one file a method, found by a registry"},
    {
        "linear": "DecomposedLinear",
        "conv1d": "the same for GPT-2's Conv1D",
        "quantized": "quantised weights of bitsandbytes, torchao and ours",
        "quantized_linear": "the layer on torchao's and on our own",
        "bitsandbytes_linear": "the layer on bitsandbytes'",
    },
    {
        "targets": "which modules a method goes on",
        "saved_modules": "modules trained whole",
        "making": "the adapters of a whole model, beside it",
    },
    {
        "model": "adapt, merge, remove, ...",
        "quantization": "quantising a model's linears",
        "constraints": "MPC over a whole model",
        "optimizer": "parameter groups",
        "options": "options of adapters that are made",
        "explanation": "one layer's choice, with its reason and its roofline",
    },
    {
        "interop": "files; other libraries",
        "planning": "memory of fine-tuning, counted on shapes",
        "testing": "the tolerance policy",
    },
    {"bench": "measuring: the engine, the suites, their tables and pictures"},
    {"cli": "the decomp-kernels command"},
]

# conv1d and bitsandbytes_linear are parts of linear, in files of their own because they need other
# libraries, quantized_linear because few models have one.
PEERS = {
    ("linear", "conv1d"),
    ("conv1d", "linear"),
    ("linear", "quantized"),
    ("linear", "quantized_linear"),
    ("quantized_linear", "quantized"),
    ("quantized_linear", "linear"),
    ("quantized_linear", "bitsandbytes_linear"),
    ("bitsandbytes_linear", "linear"),
    ("bitsandbytes_linear", "quantized"),
    ("bitsandbytes_linear", "quantized_linear"),
    ("targets", "saved_modules"),
    ("making", "targets"),
}

# The library calls that every implementation is made of; other kernel files stay apart.  But those
# of kernels/triton and of kernels/native are among themselves: a composition is made of theirs.
SHARED_KERNELS = {"gemm", "columns", "mask", "composition", "over_dy"}

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
