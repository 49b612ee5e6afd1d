"""Triton's interpreter without work that it does again for every call within every program.

What it computes stays what it is. A third of its time and more went into this: the language's
hundreds of functions are looked through and replaced at each call of a jitted function, and the
table of NumPy's types is made anew for each value.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any


class Kept:
    """What was replaced stays so: interpreted programs alone call these functions."""

    def restore(self) -> None:
        pass


@cache
def quicken() -> None:
    """Have the language replaced once for each function, and types looked up in one table."""
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace, find = interpreter._patch_lang, interpreter._get_np_dtype
    replaced, types = set(), dict[str, Any]()

    def once(function: Any) -> Kept:
        if function not in replaced:
            replace(function)
            replaced.add(function)
        return Kept()

    def type_of(kind: Any) -> Any:
        name = (kind.element_ty if isinstance(kind, tl.block_type) else kind).name
        if name not in types:
            types[name] = find(kind)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = once, type_of
