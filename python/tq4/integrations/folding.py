"""Folding the rotation of V into a model's weights, so that only q and k are rotated at run time.

With R in the weights of v_proj (``R W_v`` for each KV head) and its inverse in those of o_proj (``W_o R^T``
for each query head), V and the attention's output are rotated as they come, and the model computes what it
did.
"""

from __future__ import annotations

import torch

from ..layout import HEAD_DIMS
from ..rotation import make_rotation

_FLAG = "_tq4_folded"
#: Tokens of the check that folding changed nothing, and how much it may change: rounding of the weights.
_CHECK_TOKENS = 16
_CHECK_TOLERANCE = 0.1


def folded(module: torch.nn.Module) -> bool:
    """Whether an attention layer's V comes rotated (and its output goes to an o_proj that expects that)."""
    return getattr(module, _FLAG, False)


@torch.no_grad()
def fold_rotation(model: torch.nn.Module, rotation: str = "hadamard", *, seed: int = 42) -> int:
    """Fold the rotation of V into v_proj and o_proj of a model's attention layers, in place.

    The model stays the same function up to the rounding of its weights, with any attention and any cache;
    with a :class:`TQ4Cache` V and the output are then not rotated at run time.  The logits of a few tokens
    are compared before and after, and a model that does something else between v_proj and o_proj (a norm, a
    gate) is put back and refused.

    Args:
        model: a transformers model with q_proj, v_proj and o_proj in its attention layers.
        rotation: "hadamard" or "haar".
        seed: of the rotation.

    Returns:
        How many layers were folded.

    Raises:
        ValueError: no layer could be folded, one is folded already, or the model computes something else
            then.
        TypeError: weights that are quantised or distributed; fold before.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "v_proj", None), torch.nn.Module) and isinstance(
            getattr(module, "o_proj", None), torch.nn.Module
        ):
            layers.append((name, module, _head_dim(name, module)))
    if not layers:
        raise ValueError("model: found no attention layer with v_proj and o_proj")
    for name, module, _ in layers:
        if folded(module):
            raise ValueError(f"model: the rotation is folded into {name} already")
        _check_weights(name, module)
    before = _logits(model)
    saved = []
    for _, module, head_dim in layers:
        v, o = module.v_proj, module.o_proj
        saved.append((module, v.weight.data, None if v.bias is None else v.bias.data, o.weight.data))
        matrix = make_rotation(rotation, head_dim, seed).double().to(v.weight.device)
        v.weight.data = _rotate(v.weight.data.unflatten(0, (-1, head_dim)), "hdi", matrix).flatten(0, 1)
        if v.bias is not None:
            v.bias.data = _rotate(v.bias.data.unflatten(0, (-1, head_dim)), "hd", matrix).flatten()
        o.weight.data = _rotate(
            o.weight.data.unflatten(1, (-1, head_dim)), "ohd", matrix.to(o.weight.device)
        ).flatten(1)
        setattr(module, _FLAG, True)
    after = _logits(model)
    error = float((after - before).norm() / before.norm())
    if not error < _CHECK_TOLERANCE:
        for module, v_weight, v_bias, o_weight in saved:
            module.v_proj.weight.data, module.o_proj.weight.data = v_weight, o_weight
            if v_bias is not None:
                module.v_proj.bias.data = v_bias
            delattr(module, _FLAG)
        raise ValueError(
            f"model: its logits change by {error:.2g} when the rotation is folded in, so its attention does "
            "more "
            "than weigh V between v_proj and o_proj; it was put back"
        )
    return len(layers)


def _rotate(heads: torch.Tensor, axes: str, matrix: torch.Tensor) -> torch.Tensor:
    """Rotate axis d of a weight by heads: coordinate e of the result is sum over d of R[e, d] x[d]."""
    rotated = torch.einsum(f"ed,{axes}->{axes.replace('d', 'e')}", matrix, heads.double())
    return rotated.to(heads.dtype)


def _head_dim(name: str, module: torch.nn.Module) -> int:
    head_dim = getattr(module, "head_dim", None)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"model: {name} has a head_dim of {head_dim}, expected one of {HEAD_DIMS}")
    return head_dim


def _check_weights(name: str, module: torch.nn.Module) -> None:
    for part in ("v_proj", "o_proj"):
        weight = getattr(getattr(module, part), "weight", None)
        plain = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point()
        if not plain or weight.element_size() < 2 or hasattr(weight, "to_local"):
            raise TypeError(
                f"model: the weights of {name}.{part} are quantised or distributed; fold the rotation into "
                "the "
                "plain model first"
            )
    shared = (
        module.v_proj.weight.shape[0] % module.head_dim or module.o_proj.weight.shape[1] % module.head_dim
    )
    if shared:
        raise ValueError(f"model: v_proj and o_proj of {name} do not divide into heads of {module.head_dim}")


def _logits(model: torch.nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = (torch.arange(_CHECK_TOKENS, device=device) * 7919 % vocabulary)[None]
    training = model.training
    model.eval()
    try:
        return model(tokens, use_cache=False).logits.float()
    finally:
        model.train(training)
