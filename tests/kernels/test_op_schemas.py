"""No op's schema has a default."""

import importlib
import pkgutil

import torch

import miles_fast.kernels


def test_no_default():
    """Inductor's cache on disk leaves defaults out of a graph's key: one more argument with a default, and
    a graph compiled before it came is called with one too few, or after it went with one too many."""
    for module in pkgutil.iter_modules(miles_fast.kernels.__path__):
        if module.name != "quack_products":  # needs quack, and registers nothing
            importlib.import_module(f"miles_fast.kernels.{module.name}")
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("miles_fast::")]
    assert len(schemas) > 10
    assert not [str(s) for s in schemas if any(a.has_default_value() for a in s.arguments)]
