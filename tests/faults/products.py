"""float32 products that are less than float32 inside, or not asked for."""

from __future__ import annotations

from fault import Fault

_PRODUCTS = "src/preftune/models/products.py"

FAULTS = [
    Fault(
        "products: taken whatever they round to",
        _PRODUCTS,
        "if not error <= ALLOWED:",
        "if False:",
        "tests/models/test_products.py -k rounds_inside",
    ),
    Fault(
        "products: TF32 passes for float32",
        _PRODUCTS,
        "ALLOWED = 2e-6",
        "ALLOWED = 2e-3",
        "tests/models/test_products.py -k tells_float32",
    ),
    Fault(
        "products: narrow models pay for them",
        _PRODUCTS,
        "if width < WIDTH or",
        "if",
        "tests/models/test_products.py -k wide_float32",
    ),
]
