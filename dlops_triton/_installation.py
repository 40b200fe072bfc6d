"""What the library needs of an installation, asked for before anything else is imported."""

from __future__ import annotations

import importlib.metadata
import re

DISTRIBUTION = "dlops-triton"


def lacking() -> str:
    """Why the library cannot be imported here, with what to do about it; empty if it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # the latter where a library is missing
        return f"dlops_triton needs torch, and it does not import ({error}): pip install torch"
    try:
        import triton
    except (ImportError, OSError) as error:  # the latter where a library is missing
        return (
            f"dlops_triton needs Triton, also on machines without a GPU, and it does not import "
            f"({error}): pip install triton (there are packages for Linux)"
        )
    if not hasattr(triton, "knobs"):  # which the library reads at once
        return (
            f"dlops_triton needs a newer Triton than {triton.__version__}, and a torch that "
            f"goes with it: pip install --upgrade torch triton"
        )
    return ""


def minimum() -> dict[str, str]:
    """The oldest versions that the package declares, by name; empty in a checkout not installed."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\d.]+)$", line) for line in required)
    return {match[1]: match[2] for match in found if match}


def older(version: str, than: str) -> bool:
    """Whether a version, of which only the leading numbers count, is older than another."""

    def numbers(text: str) -> list[int]:
        leading = re.match(r"[\d.]*\d", text)
        return [int(part) for part in leading[0].split(".")] if leading else []

    return numbers(version) < numbers(than)


if _reason := lacking():
    raise ImportError(_reason)
