"""Operations as torch sees them: `sanderling::<name>`, one signature for every device.

Importing this package registers them all; functions are taken from its modules, as in
`from kernels.ops.linear_w4 import w4_linear`. The CPU runs `kernels/reference`, a CUDA or ROCm
device `kernels/triton`. Called by `models`; README.md says how to add one.
"""

from kernels.ops import (
    attention_paged,
    attention_prefill,
    attention_sparse,
    gated,
    gguf_split,
    integer,
    kv_cache,
    linear_fp8,
    linear_int8,
    linear_nm,
    linear_w4,
    linear_w8,
    lora_batched,
    moe,
    norm,
    rope,
    sampling,
    scan,
)

MODULES = (
    attention_paged,
    attention_prefill,
    attention_sparse,
    gated,
    gguf_split,
    integer,
    kv_cache,
    linear_fp8,
    linear_int8,
    linear_nm,
    linear_w4,
    linear_w8,
    lora_batched,
    moe,
    norm,
    rope,
    sampling,
    scan,
)
