"""Checks of the arguments: one exception for each kind of mistake, naming the argument and what was expected."""

from numbers import Real

import torch
from torch import Tensor

from .spec import OPEN

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_autocast = torch.is_autocast_enabled


def say(t):
    return f"{tuple(t.shape)} {str(t.dtype)[6:]} on {t.device}"


def dtype_names(dtypes):
    return ", ".join(str(d)[6:] for d in dtypes)


def tensor(t, name):
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    return t


def real(x, name):
    if isinstance(x, (float, int, torch.SymFloat, Real)):
        return float(x) if type(x) is not torch.SymFloat else x
    raise TypeError(f"{name}: expected a number, got {type(x).__name__}")


def same_device(t, name, other, other_name="q"):
    if t.device != other.device:
        raise ValueError(f"{name}: is on {t.device} and {other_name} on {other.device}")


def writable(t, name, x, x_name):
    """t holds each of its numbers once, and shares memory with x only where it is x: as PyTorch checks an out."""
    if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
        raise ValueError(f"{name}: several of its elements are one in memory; give a copy")
    if t is x or t.numel() == 0 or t.is_meta or torch.compiler.is_compiling():
        return
    same = t.data_ptr() == x.data_ptr() and t.stride() == x.stride()
    span = lambda t: t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
    apart = t.data_ptr() + span(t) <= x.data_ptr() or x.data_ptr() + span(x) <= t.data_ptr()
    dense = all(span(u) == u.element_size() * u.numel() for u in (t, x))  # others may lie between each other
    if not same and not apart and dense:
        raise ValueError(f"{name}: shares a part of {x_name}'s memory; give {x_name} itself or memory of its own")


def autocast(q, k, v, bias):
    """Under autocast q, k, v and bias take its dtype, as in PyTorch's scaled_dot_product_attention."""
    if not (isinstance(q, Tensor) and ((q.is_cpu and _autocast("cpu")) or (q.is_cuda and _autocast("cuda")))):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
    return cast(q), cast(k), cast(v), cast(bias)


def qkv(q, k, v, names=("q", "k", "v"), paged=False):
    """Shapes, dtypes and devices of q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv): H, Nq, Nk."""
    for name, t in zip(names, (q, k, v), strict=True):
        if tensor(t, name).dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, heads, sequence, head dim), got shape {tuple(t.shape)}"
            )
    (B, H, Nq, D), (Bk, Hk, Nk, Dk), dtype = q.shape, k.shape, q.dtype
    if v.shape[:3] != (Bk, Hk, Nk):
        raise ValueError(f"{names[2]}: expected shape {(Bk, Hk, Nk, 'Dv')} to match {names[1]}, got {tuple(v.shape)}")
    if Bk != B and not paged:
        raise ValueError(f"{names[1]}: expected batch {B} as in {names[0]}, got shape {tuple(k.shape)}")
    if Dk != D:
        raise ValueError(f"{names[1]}: expected head dim {D} as in {names[0]}, got shape {tuple(k.shape)}")
    if Hk != H and (Hk == 0 or H % Hk):
        raise ValueError(f"{names[1]}: its heads must divide {names[0]}'s, got {Hk} and {H}")
    if k.dtype is not dtype or v.dtype is not dtype:
        raise ValueError(f"{names[0]}, {names[1]}, {names[2]}: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"{names[0]}: expected a dtype of {dtype_names(FLOATS)}, got {dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"{names[0]}, {names[1]}, {names[2]}: expected one device, got {q.device}, {k.device}, {v.device}"
        )
    return H, Nq, Nk


def scale_or_default(scale, q):
    return (q.shape[-1] or 1) ** -0.5 if scale is None else scale if type(scale) is float else real(scale, "scale")


def softcap_and_dropout(softcap, dropout_p):
    if softcap == 0.0 and dropout_p == 0.0:
        return 0.0, 0.0
    softcap, dropout_p = real(softcap, "softcap"), real(dropout_p, "dropout_p")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    return softcap, dropout_p


def band(causal, window, Nq, Nk):
    """(left, right) about the bottom-right diagonal."""
    if causal is not True and causal is not False and causal != "top_left":
        raise ValueError(f'causal: expected True, False or "top_left", got {causal!r}')
    left, right = OPEN, 0 if causal else OPEN
    if window is not None:
        if isinstance(window, (tuple, list)):
            if len(window) != 2 or not all(isinstance(w, int) for w in window):
                raise ValueError(f"window: expected (left, right) integers, got {window!r}")
            left, wr = (OPEN if w < 0 else min(w, OPEN) for w in window)
            right = min(right, wr)
        elif isinstance(window, int) and not isinstance(window, bool):
            if window < 1:
                raise ValueError(f"window: expected at least 1 key, got {window}")
            left = min(window - 1, OPEN)
            right = min(right, left)
        else:
            raise TypeError(f"window: expected an int or a pair of ints, got {type(window).__name__}")
    if causal == "top_left":  # from the top-left diagonal to the bottom-right one
        left, right = (left if left == OPEN else left + Nk - Nq), right + Nq - Nk
    return left, right


def broadcast(t, name, shape, q):
    if t.dim() > len(shape) or any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False)):
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not broadcast to {tuple(shape)}")
    same_device(t, name, q)
    return t[(None,) * (len(shape) - t.dim())] if t.dim() < len(shape) else t


def mask_of(mask, shape, q):
    if mask is None:
        return None
    if tensor(mask, "mask").dtype is not torch.bool:
        raise TypeError(f"mask: expected bool, True = may attend, got {mask.dtype}; a float mask is given as bias")
    return broadcast(mask, "mask", shape, q)


def bias_of(bias, shape, q):
    if bias is None:
        return None
    if tensor(bias, "bias").dtype not in FLOATS:
        raise TypeError(f"bias: expected a floating dtype, got {bias.dtype}; a bool mask is given as mask")
    return broadcast(bias, "bias", shape, q)


def slopes_of(slopes, B, q):
    if slopes is None:
        return None
    if tensor(slopes, "alibi_slopes").dtype is not torch.float32:
        raise TypeError(f"alibi_slopes: expected float32, got {slopes.dtype}")
    if tuple(slopes.shape) not in ((q.shape[1],), (B, q.shape[1])):
        raise ValueError(
            f"alibi_slopes: expected ({q.shape[1]},) or ({B}, {q.shape[1]}), got shape {tuple(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: has no gradient; give the differentiable term as bias, or detach it")
    same_device(slopes, "alibi_slopes", q)
    return slopes


def sinks_of(sinks, q):
    if sinks is None:
        return None
    if tensor(sinks, "sinks").dtype not in FLOATS:
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks: expected ({q.shape[1]},), one for each head, got shape {tuple(sinks.shape)}")
    same_device(sinks, "sinks", q)
    return sinks


def lengths(t, name, q, size=None):
    if tensor(t, name).dtype is not torch.int32:
        raise TypeError(f"{name}: expected int32, got {t.dtype}")
    if t.dim() != 1 or (t.shape[0] != size if size is not None else t.shape[0] < 1):
        raise ValueError(f"{name}: expected shape ({'B + 1' if size is None else size},), got {tuple(t.shape)}")
    same_device(t, name, q)


def seed_of(seed, dropout_p, q):
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=q.device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: expected 64 bits, got {seed}")
        return torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=q.device)
    if tensor(seed, "seed").dtype is not torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed: expected one int64, got {say(seed)}")
    same_device(seed, "seed", q)
    return seed.reshape(())
