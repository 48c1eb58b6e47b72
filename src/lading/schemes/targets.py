"""What a plan fills and compares for one layer, dense or quantised. No torch.

The same specs make the parameters of `lading.nn`, so a load can be planned without building a
model.
"""

from __future__ import annotations

from collections.abc import Callable

from lading.layers import Layer
from lading.layouts import Layout
from lading.plan import Expected, Target
from lading.schemes.choose import LayerScheme
from lading.specs import TensorSpec

__all__ = ["layer_targets"]


def layer_targets(
    prefix: str,
    layer: Layer,
    quant: LayerScheme | None,
    *,
    dtype: str,
    layout_of: Callable[[TensorSpec], Layout],
) -> list[Target]:
    """A target for each stored tensor of a layer.

    prefix     the layer's qualified name
    quant      its scheme, None for a dense layer
    dtype      the model's, for tensors whose format leaves it to the model
    layout_of  gives each spec its layout
    """
    sizes = tuple((part.name, part.size) for part in layer.output.parts)
    targets = []
    for spec in layer.specs() if quant is None else quant.specs:
        expected = None
        if spec.constant is not None:
            expected = Expected(
                constant=spec.constant, outputs=sizes, inputs=layer.input.size, group=spec.group
            )
        stored = quant.dtype(spec.name) if quant is not None else None
        targets.append(
            Target(
                name=f"{prefix}.{spec.attribute}",
                layout=layout_of(spec),
                dtype=stored or dtype,
                leaf=spec.name if spec.attribute != spec.name else "",
                stored=spec.stored,
                expected=expected,
            )
        )
    return targets
