"""Here because oneDNN's layout of weights is a third of a decoding step's speed on a CPU.

    pack(model)  # once, after loading

A plain weight is laid out anew in every product, which at the few rows of a decoding step
costs as much as the product. Only sampling, known by inference mode, takes the packed copy.
Training, the names in state_dict(), tied weights and saving stay what they are.
"""

import torch
from torch import nn

onednn = torch.ops.mkldnn


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight, renewed when that has changed."""

    packed = packed_from = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_inference_mode_enabled() or not can_pack(self.weight):
            return super().forward(x)
        # An optimizer's step raises the version; .to() changes the address or the dtype.
        state = self.weight.data_ptr(), self.weight._version, self.weight.dtype
        if self.packed_from != state:
            self.packed = onednn._reorder_linear_weight(self.weight)
            self.packed_from = state
        return onednn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def __getstate__(self):
        """What copy.deepcopy takes along: all but the packed copy, which it makes anew."""
        state = super().__getstate__()
        state.pop("packed", None)
        state.pop("packed_from", None)
        return state


def can_pack(weight: torch.Tensor) -> bool:
    """oneDNN is there, the weight is on the CPU, and this CPU multiplies in its dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return onednn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(model: nn.Module) -> None:
    """Every nn.Linear becomes a PackedLinear in place: its Parameter keeps name and tie."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
