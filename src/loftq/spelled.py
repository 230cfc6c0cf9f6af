"""Figures as people read them."""


def spell_size(size: float) -> str:
    """Bytes, in a unit of which there is at least one: ``34.6 KB``, ``13.48 GB``."""
    for unit, one, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("KB", 1e3, 1)):
        if size >= one:
            return f"{size / one:,.{digits}f} {unit}"
    return f"{size:,.0f} bytes"


def spell_error(error: float) -> str:
    """A relative error: four decimals, or two digits where those would be lost: ``0.1620``, ``3.1e-05``."""
    return f"{error:.1e}" if 0 < error < 5e-4 else f"{error:.4f}"


def spell_time(seconds: float) -> str:
    """In the largest unit of which there are two; one digit of what is less than a tenth of a second."""
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((u for u, n in units.items() if seconds >= 2 * n), "seconds")
    return f"{seconds:.1g} seconds" if 0 < seconds < 0.1 else f"{seconds / units[unit]:.1f} {unit}"
