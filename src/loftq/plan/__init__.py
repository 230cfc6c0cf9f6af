"""What is quantized, how, and why not: data about tensors and a policy in, a plan out. Knows no torch."""

from loftq.plan.patterns import Rules, parse_rules
from loftq.plan.plan import (
    FLOATS,
    Kept,
    Matrix,
    Plan,
    Policy,
    Role,
    Stack,
    make,
    natural,
    nominal_bits,
    target_suffixes,
    task_type,
)

__all__ = [
    "FLOATS",
    "Kept",
    "Matrix",
    "Plan",
    "Policy",
    "Role",
    "Rules",
    "Stack",
    "make",
    "natural",
    "nominal_bits",
    "parse_rules",
    "target_suffixes",
    "task_type",
]
