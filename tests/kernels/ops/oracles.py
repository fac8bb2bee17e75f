"""What every op should give, written once more: float64 (or Python integers), in loops.

Nothing here is shared with `kernels`: a mistake in the reference must not be its own excuse. Called
by cases.py with the arguments of the op, returns float64 or exact integers.
"""

import math

import gguf
import numpy as np
import torch


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[N, K / 2] -> [N, K]: value j of 32 is the low half of byte j, or the high one of j - 16."""
    rows, half = packed.shape
    out = torch.zeros(rows, 2 * half, dtype=torch.float64)
    for k in range(2 * half):
        run, j = divmod(k, 32)
        byte = packed[:, run * 16 + j % 16].int()
        out[:, k] = (byte % 16 if j < 16 else byte // 16).double()
    return out


def w4(qweight, scales, mins, dtype=None):
    q = nibbles(qweight)
    group = q.shape[1] // scales.shape[1]
    out = torch.zeros_like(q)
    for k in range(q.shape[1]):
        scale = scales[:, k // group].double()
        if mins is None:
            out[:, k] = (q[:, k] - 8) * scale
        else:
            out[:, k] = q[:, k] * scale + mins[:, k // group].double()
    return out


def w8(qweight, scales, dtype=None):
    group = qweight.shape[1] // scales.shape[1]
    out = qweight.double()
    for k in range(out.shape[1]):
        out[:, k] *= scales[:, k // group].double()
    return out


def linear(x, weight, bias):
    y = torch.einsum("mk,nk->mn", x.double(), weight)
    return y if bias is None else y + bias.double()


def w4_linear(x, qweight, scales, mins, bias=None):
    return linear(x, w4(qweight, scales, mins), bias)


def w8_linear(x, qweight, scales, bias=None):
    return linear(x, w8(qweight, scales), bias)


def blocks(stored, form, dtype):
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    if stored.numel() == 0:
        return torch.zeros(0, dtype=torch.float64)
    raw = stored.numpy().reshape(-1, size)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[form])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).flatten()


def quantize_rows(x):
    """In float32, as it is defined: numpy's division and rint are IEEE's."""
    q = np.zeros(x.shape, dtype=np.int8)
    scales = np.zeros(x.shape[0], dtype=np.float32)
    for row, values in enumerate(x.float().numpy()):
        scales[row] = np.float32(np.abs(values).max()) / np.float32(127)
        if scales[row] > 0:
            q[row] = np.rint(values / scales[row])
    return torch.from_numpy(q), torch.from_numpy(scales)


def int8_matmul(a, b):
    return torch.einsum("mk,nk->mn", a.long(), b.long()).int()


def int8_linear(q, scales, qweight, weight_scales, bias=None, dtype=None):
    scaled = q.double() * scales.double()[:, None]
    return linear(scaled, qweight.double() * weight_scales.double()[:, None], bias)


def fp8_linear(x, x_scales, w, w_scales, dtype):
    scaled = x.double() * x_scales.double()[:, None]
    return linear(scaled, w.double() * w_scales.double()[:, None], None)


def rms_norm(x, weight, eps):
    x = x.double()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight.double()


def rms_norm_residual(x, residual, weight, eps):
    added = (x.double() + residual.double()).to(x.dtype)
    return rms_norm(added, weight, eps), x.double() + residual.double()


def rope(q, k, cos, sin):
    """A pair of values is a complex number, and a rotation a product with one."""
    turn = torch.complex(cos.double(), sin.double())[:, None]

    def turned(x):
        half = x.shape[-1] // 2
        z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    return turned(q), turned(k)


def gated(x, activation):
    half = x.shape[1] // 2
    gate, up = x[:, :half].double(), x[:, half:].double()
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def attend(q, k, v, scale, sees):
    """q [T, H, D], k and v [C, KH, D]; sees(head, i, j)."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // k.shape[1])
            seen = [j for j in range(k.shape[0]) if sees(head, i, j)]
            if seen:
                scores = k[seen, kv_head].double() @ q[i, head].double() * scale
                out[i, head] = torch.softmax(scores, 0) @ v[seen, kv_head].double()
    return out


def prefill(q, k, v, starts, causal=True, window=0, sink_tokens=0, scale=None):
    out = torch.zeros(q.shape, dtype=torch.float64)

    def sees(head, i, j):
        near = window == 0 or abs(i - j) < window or j < sink_tokens
        return near and (j <= i or not causal)

    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        part = slice(start, stop)
        out[part] = attend(q[part], k[part], v[part], scale, sees)
    return out


def block_sparse(q, k, v, block_mask, block, causal=True, scale=None):
    def sees(head, i, j):
        return bool(block_mask[head, i // block, j // block]) and (j <= i or not causal)

    return attend(q, k, v, scale, sees)


def cached(cache, scales):
    """A cache's numbers, token by token: [pages, page_tokens, KH, D]."""
    if cache.dtype.is_floating_point:
        return cache.double()
    if cache.dtype == torch.int8:
        return cache.double() * scales.double()[..., None]
    width = 32 * scales.shape[-1]
    rows = cache.reshape(-1, cache.shape[-1]).numpy()
    q = nibbles(torch.from_numpy(rows[:, : width // 2]))
    if rows.shape[1] > width // 2:  # bits lie in the order of their numbers
        high = np.unpackbits(rows[:, width // 2 :], axis=1, bitorder="little")
        q = q + 16 * torch.from_numpy(high).double() - 16
    else:
        q = q - 8
    q = q * scales.double().reshape(-1, width // 32).repeat_interleave(32, 1)
    return q.reshape(*cache.shape[:-1], -1)


def paged(
    q, keys, values, key_scales, value_scales, tables, contexts, window=0, splits=1, scale=None
):
    out = torch.zeros(q.shape, dtype=torch.float64)
    all_keys, all_values = cached(keys, key_scales), cached(values, value_scales)
    page_tokens = keys.shape[1]
    for row, context in enumerate(contexts.tolist()):
        first = max(0, context - window) if window else 0
        places = [
            (int(tables[row, t // page_tokens]), t % page_tokens) for t in range(first, context)
        ]
        if places:
            k = torch.stack([all_keys[place] for place in places])
            v = torch.stack([all_values[place] for place in places])
            out[row] = attend(q[row : row + 1], k, v, scale, lambda *_: True)[0]
    return out


def merge(outs, lse):
    """Sums of exponentials, added as such."""
    sums = lse.double().exp()
    total = sums.sum(0)
    outs = torch.where(sums[..., None] > 0, outs.double(), 0)
    mixed = (outs * sums[..., None]).sum(0) / torch.where(total > 0, total, 1)[..., None]
    return mixed, total.log()


def kv_write(keys, values, slots, key_cache, value_cache, key_scales, value_scales):
    """Both caches and their scales afterwards, in numpy's float32 and float16."""
    results = []
    for new, cache, scales in ((keys, key_cache, key_scales), (values, value_cache, value_scales)):
        cache, scales = cache.clone(), scales if scales is None else scales.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            page, offset = divmod(slot, cache.shape[1])
            for head in range(new.shape[1]):
                place = page, offset, head
                if cache.dtype.is_floating_point:
                    cache[place] = new[token, head]
                elif cache.dtype == torch.int8:
                    q, scale = quantize_rows(new[token, head][None])
                    store(cache, scales, place, q[0], scale[0])
                else:
                    numbers = new[token, head].float().numpy()
                    bits = cache.shape[-1] * 8 // len(numbers)
                    store(cache, scales, place, *few_bits(numbers, bits))
        results += [cache, scales]
    return tuple(result for result in results if result is not None)


def store(cache, scales, place, numbers, scale):
    cache[place], scales[place] = numbers, scale


def few_bits(values, bits):
    """Bytes and scales: levels around zero, the outermost for the largest number."""
    zero, levels, scales = 2 ** (bits - 1), [], []
    for start in range(0, len(values), 32):
        group = values[start : start + 32]
        outermost = group.max() if group.max() > -group.min() else group.min()
        scale = np.float16(outermost / np.float32(-zero))
        q = np.zeros(32)
        if scale != 0:
            q = np.clip(np.rint(group / np.float32(scale)), -zero, zero - 1)
        levels += [int(each) + zero for each in q]
        scales.append(float(scale))
    low = [each % 16 for each in levels]
    packed = [low[g + j] + 16 * low[g + j + 16] for g in range(0, len(low), 32) for j in range(16)]
    if bits == 5:
        for at in range(0, len(levels), 8):
            packed.append(sum((levels[at + k] // 16) << k for k in range(8)))
    return torch.tensor(packed, dtype=torch.uint8), torch.tensor(scales, dtype=torch.float16)


def moe_align(expert_ids, experts, block):
    flat = expert_ids.flatten().tolist()
    blocks = (len(flat) + min(experts, len(flat)) * (block - 1)) // block
    rows, owners = [], []
    for expert in range(experts):
        mine = [index for index, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        rows += mine
        owners += [expert] * (len(mine) // block)
    used = len(owners)
    rows += [len(flat)] * (blocks * block - len(rows))
    owners += [-1] * (blocks - used)
    return tuple(torch.tensor(each, dtype=torch.int64) for each in (rows, owners, [used]))


def grouped_linear(x, weight, expert_ids):
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for row, expert in enumerate(expert_ids.tolist()):
        if expert >= 0:
            out[row] = weight[expert].double() @ x[row].double()
    return out


def grouped_outer(left, right, expert_ids, experts):
    out = torch.zeros(experts, left.shape[1], right.shape[1], dtype=torch.float64)
    for row, expert in enumerate(expert_ids.tolist()):
        if expert >= 0:
            out[expert] += torch.outer(left[row].double(), right[row].double())
    return out


def nm_linear(x, values, indices, n, m):
    weight = torch.zeros(values.shape[0], x.shape[1], dtype=torch.float64)
    for row in range(values.shape[0]):
        for at in range(values.shape[1]):
            weight[row, at // n * m + int(indices[row, at])] = values[row, at].double()
    return linear(x, weight, None)


def sgmv(x, a, b, adapters, scaling):
    out = torch.zeros(x.shape[0], b.shape[1], dtype=torch.float64)
    for row, adapter in enumerate(adapters.tolist()):
        if adapter >= 0:
            merged = scaling[adapter].double() * (b[adapter].double() @ a[adapter].double())
            out[row] = merged @ x[row].double()
    return out


def selective_scan(x, dt, a, b, c, d, state=None):
    batch, steps, channels = x.shape
    y = torch.zeros(x.shape, dtype=torch.float64)
    last = torch.zeros(batch, *a.shape, dtype=torch.float64)
    if state is not None:
        last += state.double()
    for i in range(batch):
        for channel in range(channels):
            h = last[i, channel]
            for t in range(steps):
                size, value = dt[i, t, channel].double(), x[i, t, channel].double()
                h = torch.exp(size * a[channel].double()) * h + size * b[i, t].double() * value
                y[i, t, channel] = h @ c[i, t].double() + d[channel].double() * value
            last[i, channel] = h
    return y, last


def sample(logits, temperature, top_k, top_p, uniform):
    chosen = []
    for row in range(logits.shape[0]):
        values, heat = logits[row].double().tolist(), float(temperature[row])
        order = sorted(range(len(values)), key=lambda token: (-values[token], token))
        if heat == 0:
            chosen.append(order[0])
            continue
        k = int(top_k[row])
        order = order[:k] if k > 0 else order
        weights = {t: math.exp((values[t] - values[order[0]]) / heat) for t in order}
        kept: list[int] = []
        total, share = math.fsum(weights.values()), 0.0
        for token in order:
            if kept and top_p[row] < 1 and share / total >= float(top_p[row]):
                break
            kept.append(token)
            share += weights[token]
        target, reached = float(uniform[row]) * math.fsum(weights[t] for t in kept), 0.0
        for token in sorted(kept):
            reached += weights[token]
            if reached > target:
                break
        chosen.append(token)
    return torch.tensor(chosen, dtype=torch.int64)
