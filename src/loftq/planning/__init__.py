"""What is quantized, how, and why not: data about tensors and a policy in, a plan out. Knows no torch."""

from loftq.planning.bits import widths
from loftq.planning.budget import Allocation, Choice, allocate, check_budget_solver, frontier, parse_size
from loftq.planning.candidates import Candidate, candidates, curve, factor_bytes, first_layers, limit
from loftq.planning.fused import apart, fused, together
from loftq.planning.names import natural, target_suffixes
from loftq.planning.patterns import Rules, parse_rules
from loftq.planning.pieces import Made, Piece, PlacedPiece, of_stack, restored, sources
from loftq.planning.plan import (
    FLOATS,
    HEADS,
    NO_PARAMETER,
    Kept,
    Matrix,
    Plan,
    Role,
    Stack,
    main_dtype,
    make,
    mean_bits,
    nominal_bits,
)
from loftq.planning.policy import Policy, make_policy
