"""Here because oneDNN's layout of weights is a third of a decoding step's speed on a CPU.

A plain weight is laid out anew in every product. Only sampling, known by inference mode,
takes the packed copy.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn

onednn = torch.ops.mkldnn
# Layer -> (packed copy, what it was made from). Apart from the layer, which may be copied.
PACKED = WeakKeyDictionary()


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight, renewed when that has changed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_inference_mode_enabled() or not can_pack(self.weight):
            return super().forward(x)
        # An optimizer's step raises the version; .to() changes the address or the dtype.
        source = self.weight.data_ptr(), self.weight._version, self.weight.dtype
        packed, packed_from = PACKED.get(self, (None, None))
        if packed_from != source:
            packed = onednn._reorder_linear_weight(self.weight)
            PACKED[self] = packed, source
        return onednn._linear_pointwise(x, packed, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """oneDNN is there, the weight is on the CPU, and this CPU multiplies in its dtype."""
    known = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if weight.dtype == torch.bfloat16:
        return known and onednn._is_mkldnn_bf16_supported()
    return known and weight.dtype == torch.float32


def pack(model: nn.Module) -> None:
    """Every nn.Linear becomes a PackedLinear in place: its Parameter keeps name and tie."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
